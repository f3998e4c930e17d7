-- Times are microseconds since the Unix epoch. Everything is keyed by tenant. Columns named
-- metadata, parts, usage and body hold JSON; NULL stands for an empty one.

CREATE TABLE meta (
    name  TEXT NOT NULL PRIMARY KEY,
    value NOT NULL
) WITHOUT ROWID;

INSERT INTO meta (name, value) VALUES ('store_id', randomblob(8)), ('compacted', 0);

-- created_no is the order of the list. A number may be used again after its session was deleted;
-- among the sessions that are there it still is the order in which they were created.
CREATE TABLE sessions (
    created_no         INTEGER PRIMARY KEY,
    tenant             TEXT NOT NULL,
    session_id         TEXT NOT NULL,
    version            INTEGER NOT NULL,
    accept_seq         INTEGER NOT NULL,
    turn               INTEGER NOT NULL,
    active_run_id      TEXT NOT NULL,
    waiting_runs       INTEGER NOT NULL,
    title              TEXT NOT NULL,
    metadata           TEXT,
    input_tokens       INTEGER NOT NULL DEFAULT 0,
    output_tokens      INTEGER NOT NULL DEFAULT 0,
    cache_read_tokens  INTEGER NOT NULL DEFAULT 0,
    cache_write_tokens INTEGER NOT NULL DEFAULT 0,
    requests           INTEGER NOT NULL DEFAULT 0,
    created_at         INTEGER NOT NULL,
    updated_at         INTEGER NOT NULL,
    UNIQUE (tenant, session_id)
);

CREATE INDEX sessions_by_tenant ON sessions (tenant, created_no);

-- A run is open, or not terminal, as long as ended_at is NULL. The row is rewritten with every
-- change of state, so what may be large is kept elsewhere: the prompt beyond its head in prompts,
-- the attachments (here is only how many), the text of the end in messages.
CREATE TABLE runs (
    run_no             INTEGER PRIMARY KEY,
    tenant             TEXT NOT NULL,
    run_id             TEXT NOT NULL,
    session_id         TEXT NOT NULL,
    accept_seq         INTEGER NOT NULL,
    state              TEXT NOT NULL,
    when_busy          TEXT NOT NULL,
    rank               INTEGER NOT NULL,
    turn               INTEGER NOT NULL,
    timeout            INTEGER,
    max_attempts       INTEGER NOT NULL,
    attempt            INTEGER NOT NULL,
    accepted_at        INTEGER NOT NULL,
    started_at         INTEGER,
    ended_at           INTEGER,
    folded_into        TEXT NOT NULL,
    cancel_reason      TEXT NOT NULL,
    finish_reason      TEXT,
    error_reason       TEXT,
    error_message      TEXT,
    message_id         TEXT,
    usage              TEXT,
    metadata           TEXT,
    attachments        INTEGER NOT NULL,
    prompt_fingerprint TEXT NOT NULL,
    prompt_head        TEXT NOT NULL,
    UNIQUE (tenant, run_id)
);

CREATE INDEX runs_by_session ON runs (tenant, session_id, run_no);

-- A lane is loaded, and the work found at start, without touching the runs that have ended.
CREATE INDEX runs_open ON runs (tenant, session_id, run_no) WHERE ended_at IS NULL;

CREATE INDEX runs_ended ON runs (tenant, state, run_no) WHERE ended_at IS NOT NULL;

-- What follows the head of a prompt, where there is more of it.
CREATE TABLE prompts (
    tenant TEXT NOT NULL,
    run_id TEXT NOT NULL,
    rest   TEXT NOT NULL,
    PRIMARY KEY (tenant, run_id)
);

-- content is TEXT or BLOB, as the attachment is text or bytes.
CREATE TABLE attachments (
    tenant    TEXT NOT NULL,
    run_id    TEXT NOT NULL,
    n         INTEGER NOT NULL,
    name      TEXT NOT NULL,
    mime_type TEXT NOT NULL,
    content   NOT NULL,
    PRIMARY KEY (tenant, run_id, n)
);

CREATE TABLE messages (
    tenant        TEXT NOT NULL,
    session_id    TEXT NOT NULL,
    turn          INTEGER NOT NULL,
    ordinal       INTEGER NOT NULL,
    message_id    TEXT NOT NULL,
    run_id        TEXT NOT NULL,
    role          TEXT NOT NULL,
    finish_reason TEXT,
    model         TEXT NOT NULL,
    created_at    INTEGER NOT NULL,
    parts         TEXT,
    PRIMARY KEY (tenant, session_id, turn, ordinal)
);

-- body is NULL for run_complete: it is the end that the run's own row tells of.
CREATE TABLE run_events (
    tenant TEXT NOT NULL,
    run_id TEXT NOT NULL,
    idx    INTEGER NOT NULL,
    at     INTEGER NOT NULL,
    kind   TEXT NOT NULL,
    body   TEXT,
    PRIMARY KEY (tenant, run_id, idx)
) WITHOUT ROWID;

-- The event log. body is whole: it outlives the session. The writer numbers the positions, without
-- a gap and in commit order; compaction removes a prefix.
CREATE TABLE events (
    position   INTEGER PRIMARY KEY,
    tenant     TEXT NOT NULL,
    session_id TEXT NOT NULL,
    run_id     TEXT NOT NULL,
    ended_at   INTEGER NOT NULL,
    body       TEXT NOT NULL
);

CREATE INDEX events_by_session ON events (tenant, session_id, position);

CREATE INDEX events_by_run ON events (tenant, run_id, position);
