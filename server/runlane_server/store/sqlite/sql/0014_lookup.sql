-- Indexes of filtered lists: see store/lookup_sql.py.

CREATE INDEX runs_by_agent ON runs (tenant, agent, run_no);

CREATE INDEX runs_by_accepted ON runs (tenant, accepted_at, run_no);

CREATE INDEX runs_by_ended ON runs (tenant, ended_at, run_no) WHERE ended_at IS NOT NULL;

CREATE INDEX sessions_by_agent ON sessions (tenant, agent, created_no) WHERE agent <> '';

CREATE INDEX sessions_by_created ON sessions (tenant, created_at, created_no);

CREATE INDEX sessions_busy ON sessions (tenant, created_no)
WHERE (active_run_id <> '' OR waiting_runs > 0);

-- The labels of runs and sessions. Triggers keep them: few runs have any, and nothing else may forget
-- them. Labels that cannot be read are left out. A NUL, at which json_each would end a text, is
-- replaced.
CREATE TABLE run_labels (
    tenant TEXT NOT NULL,
    key    TEXT NOT NULL,
    value  TEXT NOT NULL,
    run_no INTEGER NOT NULL,
    PRIMARY KEY (tenant, key, value, run_no)
) WITHOUT ROWID;

CREATE TABLE session_labels (
    tenant     TEXT NOT NULL,
    key        TEXT NOT NULL,
    value      TEXT NOT NULL,
    created_no INTEGER NOT NULL,
    PRIMARY KEY (tenant, key, value, created_no)
) WITHOUT ROWID;

INSERT OR IGNORE INTO run_labels (tenant, key, value, run_no)
SELECT tenant, label.key, label.value, run_no
FROM runs CROSS JOIN json_each(iif(json_valid(metadata), replace(metadata, '\u0000', '\ue000'), '{}')) AS label
WHERE metadata IS NOT NULL AND label.key IS NOT NULL AND label.value IS NOT NULL;

INSERT OR IGNORE INTO session_labels (tenant, key, value, created_no)
SELECT tenant, label.key, label.value, created_no
FROM sessions CROSS JOIN json_each(iif(json_valid(metadata), replace(metadata, '\u0000', '\ue000'), '{}')) AS label
WHERE metadata IS NOT NULL AND label.key IS NOT NULL AND label.value IS NOT NULL;

CREATE TRIGGER label_run AFTER INSERT ON runs WHEN NEW.metadata IS NOT NULL
BEGIN
    INSERT OR IGNORE INTO run_labels (tenant, key, value, run_no)
    SELECT NEW.tenant, label.key, label.value, NEW.run_no
    FROM json_each(iif(json_valid(NEW.metadata), replace(NEW.metadata, '\u0000', '\ue000'), '{}')) AS label
    WHERE label.key IS NOT NULL AND label.value IS NOT NULL;
END;

CREATE TRIGGER unlabel_run AFTER DELETE ON runs WHEN OLD.metadata IS NOT NULL
BEGIN
    DELETE FROM run_labels WHERE (tenant, key, value, run_no) IN (
        SELECT OLD.tenant, label.key, label.value, OLD.run_no
        FROM json_each(iif(json_valid(OLD.metadata), replace(OLD.metadata, '\u0000', '\ue000'), '{}')) AS label
    );
END;

CREATE TRIGGER relabel_run AFTER UPDATE OF metadata ON runs
WHEN OLD.metadata IS NOT NEW.metadata
BEGIN
    DELETE FROM run_labels WHERE (tenant, key, value, run_no) IN (
        SELECT OLD.tenant, label.key, label.value, OLD.run_no
        FROM json_each(iif(json_valid(OLD.metadata), replace(OLD.metadata, '\u0000', '\ue000'), '{}')) AS label
    );
    INSERT OR IGNORE INTO run_labels (tenant, key, value, run_no)
    SELECT NEW.tenant, label.key, label.value, NEW.run_no
    FROM json_each(iif(json_valid(NEW.metadata), replace(NEW.metadata, '\u0000', '\ue000'), '{}')) AS label
    WHERE label.key IS NOT NULL AND label.value IS NOT NULL;
END;

CREATE TRIGGER label_session AFTER INSERT ON sessions WHEN NEW.metadata IS NOT NULL
BEGIN
    INSERT OR IGNORE INTO session_labels (tenant, key, value, created_no)
    SELECT NEW.tenant, label.key, label.value, NEW.created_no
    FROM json_each(iif(json_valid(NEW.metadata), replace(NEW.metadata, '\u0000', '\ue000'), '{}')) AS label
    WHERE label.key IS NOT NULL AND label.value IS NOT NULL;
END;

CREATE TRIGGER unlabel_session AFTER DELETE ON sessions WHEN OLD.metadata IS NOT NULL
BEGIN
    DELETE FROM session_labels WHERE (tenant, key, value, created_no) IN (
        SELECT OLD.tenant, label.key, label.value, OLD.created_no
        FROM json_each(iif(json_valid(OLD.metadata), replace(OLD.metadata, '\u0000', '\ue000'), '{}')) AS label
    );
END;

CREATE TRIGGER relabel_session AFTER UPDATE OF metadata ON sessions
WHEN OLD.metadata IS NOT NEW.metadata
BEGIN
    DELETE FROM session_labels WHERE (tenant, key, value, created_no) IN (
        SELECT OLD.tenant, label.key, label.value, OLD.created_no
        FROM json_each(iif(json_valid(OLD.metadata), replace(OLD.metadata, '\u0000', '\ue000'), '{}')) AS label
    );
    INSERT OR IGNORE INTO session_labels (tenant, key, value, created_no)
    SELECT NEW.tenant, label.key, label.value, NEW.created_no
    FROM json_each(iif(json_valid(NEW.metadata), replace(NEW.metadata, '\u0000', '\ue000'), '{}')) AS label
    WHERE label.key IS NOT NULL AND label.value IS NOT NULL;
END;
