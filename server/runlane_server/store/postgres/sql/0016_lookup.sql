-- Indexes of filtered lists: see store/lookup_sql.py. Each has a predicate of its own that is always
-- true, which the statements that need it repeat.

CREATE INDEX runs_by_agent ON runs (tenant, agent, run_no) WHERE agent >= '';

CREATE INDEX runs_by_accepted ON runs (tenant, accepted_at, run_no) WHERE accepted_at >= 0;

CREATE INDEX runs_by_ended ON runs (tenant, ended_at, run_no) WHERE ended_at >= 0;

CREATE INDEX sessions_by_agent ON sessions (tenant, agent, created_no) WHERE agent <> '';

CREATE INDEX sessions_by_created ON sessions (tenant, created_at, created_no)
WHERE created_at >= 0;

CREATE INDEX sessions_busy ON sessions (tenant, created_no)
WHERE (active_run_id <> '' OR waiting_runs > 0);

-- The labels of runs and sessions, each by a digest of its JSON: an index cannot hold a long one.
-- Triggers keep them: few runs have any, and nodes of the version before may write at the same time.
CREATE TABLE run_labels (
    tenant text COLLATE "C" NOT NULL,
    label  uuid             NOT NULL,
    run_no bigint           NOT NULL,
    run_id text COLLATE "C" NOT NULL,
    CONSTRAINT run_labels_key PRIMARY KEY (tenant, label, run_no)
);

CREATE TABLE session_labels (
    tenant     text COLLATE "C" NOT NULL,
    label      uuid             NOT NULL,
    created_no bigint           NOT NULL,
    session_id text COLLATE "C" NOT NULL,
    CONSTRAINT session_labels_key PRIMARY KEY (tenant, label, created_no)
);

-- The digests of the labels in a text that store/codec.py has encoded. It is no JSON for PostgreSQL,
-- which knows no NUL, so it is taken apart as text.
CREATE FUNCTION labels_of(metadata text) RETURNS SETOF uuid LANGUAGE sql IMMUTABLE AS $$
    SELECT DISTINCT md5(found[1])::uuid
    FROM regexp_matches(metadata, '"(?:[^"\\]|\\.)*":"(?:[^"\\]|\\.)*"', 'g') AS found
$$;

INSERT INTO run_labels (tenant, label, run_no, run_id)
SELECT tenant, label, run_no, run_id FROM runs CROSS JOIN LATERAL labels_of(metadata) AS label
WHERE metadata IS NOT NULL;

INSERT INTO session_labels (tenant, label, created_no, session_id)
SELECT tenant, label, created_no, session_id
FROM sessions CROSS JOIN LATERAL labels_of(metadata) AS label
WHERE metadata IS NOT NULL;

CREATE FUNCTION label_run() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        DELETE FROM run_labels WHERE tenant = OLD.tenant AND run_no = OLD.run_no
            AND label IN (SELECT labels_of(OLD.metadata));
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO run_labels (tenant, label, run_no, run_id)
        SELECT NEW.tenant, label, NEW.run_no, NEW.run_id FROM labels_of(NEW.metadata) AS label
        ON CONFLICT DO NOTHING;
    END IF;
    RETURN NULL;
END $$;

CREATE TRIGGER label_run AFTER INSERT ON runs
FOR EACH ROW WHEN (NEW.metadata IS NOT NULL) EXECUTE FUNCTION label_run();

CREATE TRIGGER unlabel_run AFTER DELETE ON runs
FOR EACH ROW WHEN (OLD.metadata IS NOT NULL) EXECUTE FUNCTION label_run();

CREATE TRIGGER relabel_run AFTER UPDATE OF metadata ON runs
FOR EACH ROW WHEN (OLD.metadata IS DISTINCT FROM NEW.metadata) EXECUTE FUNCTION label_run();

CREATE FUNCTION label_session() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        DELETE FROM session_labels WHERE tenant = OLD.tenant AND created_no = OLD.created_no
            AND label IN (SELECT labels_of(OLD.metadata));
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO session_labels (tenant, label, created_no, session_id)
        SELECT NEW.tenant, label, NEW.created_no, NEW.session_id
        FROM labels_of(NEW.metadata) AS label
        ON CONFLICT DO NOTHING;
    END IF;
    RETURN NULL;
END $$;

CREATE TRIGGER label_session AFTER INSERT ON sessions
FOR EACH ROW WHEN (NEW.metadata IS NOT NULL) EXECUTE FUNCTION label_session();

CREATE TRIGGER unlabel_session AFTER DELETE ON sessions
FOR EACH ROW WHEN (OLD.metadata IS NOT NULL) EXECUTE FUNCTION label_session();

CREATE TRIGGER relabel_session AFTER UPDATE OF metadata ON sessions
FOR EACH ROW WHEN (OLD.metadata IS DISTINCT FROM NEW.metadata) EXECUTE FUNCTION label_session();
