-- Times are microseconds since the Unix epoch where they come from a node, and timestamptz where the
-- database's own clock decides. Everything is keyed by tenant. Columns named metadata, parts, usage
-- and body hold JSON as text; NULL stands for an empty one. Text that a caller gave has its NULs
-- escaped (store/postgres_text.py), as a text of PostgreSQL cannot have one.
--
-- Plans are made once for a connection, and that may be while the tables are empty. One index is as
-- good as another then, so none may serve a statement that it would have to walk for: what is for
-- lists begins with the tenant, and has a predicate that is always true and that only the statements
-- for lists repeat (created_no > 0, run_no > 0).

-- Of the store as a whole; one row. peer_key is what nodes show one another to be taken for one. compacted_bytes is the log_bytes of the last event that was
-- removed. Whoever compacts holds the row's lock.
CREATE TABLE store (
    single          boolean PRIMARY KEY DEFAULT true CHECK (single),
    store_id        bytea   NOT NULL,
    peer_key        text    NOT NULL,
    compacted       bigint  NOT NULL DEFAULT 0,
    compacted_bytes bigint  NOT NULL DEFAULT 0
);

INSERT INTO store (store_id, peer_key) VALUES (
    substring(uuid_send(gen_random_uuid()) FROM 9 FOR 8),
    replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', '')
);

-- Who works over this database. A node that is lost stays so: what it hosted is given to others.
-- steady_since is when it had last been silent for too long itself (see beat).
CREATE TABLE nodes (
    node_id      text COLLATE "C" PRIMARY KEY,
    address      text             NOT NULL,
    joined_at    timestamptz      NOT NULL DEFAULT now(),
    heartbeat    timestamptz      NOT NULL DEFAULT now(),
    steady_since timestamptz      NOT NULL DEFAULT '-infinity',
    lost         boolean          NOT NULL DEFAULT false
);

-- created_no is the order of the list. stored_bytes is what stays of it until it is deleted, as
-- store/weight.py weighs it. waiting_since is when the longest waiting run was accepted.
-- A lane that waits for a node is left to claimed_by until claimed_until; both are NULL, and so take
-- no room, while it is not claimed. They are in no index, so that a claim is a change of this row
-- alone.
CREATE TABLE sessions (
    created_no         bigint GENERATED ALWAYS AS IDENTITY,
    version            bigint  NOT NULL,
    accept_seq         bigint  NOT NULL,
    turn               bigint  NOT NULL,
    waiting_runs       bigint  NOT NULL,
    waiting_since      bigint,
    claimed_until      timestamptz,
    input_tokens       bigint  NOT NULL DEFAULT 0,
    output_tokens      bigint  NOT NULL DEFAULT 0,
    cache_read_tokens  bigint  NOT NULL DEFAULT 0,
    cache_write_tokens bigint  NOT NULL DEFAULT 0,
    requests           bigint  NOT NULL DEFAULT 0,
    stored_bytes       bigint  NOT NULL DEFAULT 0,
    created_at         bigint  NOT NULL,
    updated_at         bigint  NOT NULL,
    tenant             text COLLATE "C" NOT NULL,
    session_id         text COLLATE "C" NOT NULL,
    active_run_id      text    NOT NULL,
    title              text    NOT NULL,
    metadata           text,
    claimed_by         text COLLATE "C",
    CONSTRAINT sessions_key PRIMARY KEY (tenant, session_id)
);

CREATE INDEX sessions_by_tenant ON sessions (tenant, created_no) WHERE created_no > 0;

-- Sessions without work, the longest untouched first.
CREATE INDEX sessions_idle ON sessions (updated_at) WHERE active_run_id = '' AND waiting_runs = 0;

-- Lanes with runs that wait: those that any node may serve come first, by tenant, of each the longest
-- waiting first. All of them together tell how many runs wait.
CREATE INDEX sessions_waiting ON sessions (active_run_id, tenant, waiting_since)
INCLUDE (waiting_runs) WHERE waiting_runs > 0;

-- The last version of a session that was removed. Should one of the same id come, its versions go on
-- from there: a node that has the old lane at hand must not take the new one for it.
CREATE TABLE removed_sessions (
    tenant     text COLLATE "C" NOT NULL,
    session_id text COLLATE "C" NOT NULL,
    version    bigint           NOT NULL,
    removed_at timestamptz      NOT NULL DEFAULT now(),
    CONSTRAINT removed_sessions_key PRIMARY KEY (tenant, session_id)
);

CREATE INDEX removed_sessions_by_age ON removed_sessions (removed_at);

-- A run is open, or not terminal, as long as ended_at is NULL. The row is rewritten with every
-- change of state, so what may be large is kept elsewhere: the prompt beyond its head in prompts,
-- the attachments (here is only how many), the text of the end in messages. run_no is the order of
-- the list. host is the node where the run is active, '' while it is not.
CREATE TABLE runs (
    run_no             bigint GENERATED ALWAYS AS IDENTITY,
    accept_seq         bigint  NOT NULL,
    rank               bigint  NOT NULL,
    turn               bigint  NOT NULL,
    timeout            bigint,
    accepted_at        bigint  NOT NULL,
    started_at         bigint,
    ended_at           bigint,
    max_attempts       bigint  NOT NULL,
    attempt            bigint  NOT NULL,
    attachments        bigint  NOT NULL,
    tenant             text COLLATE "C" NOT NULL,
    run_id             text COLLATE "C" NOT NULL,
    session_id         text COLLATE "C" NOT NULL,
    state              text COLLATE "C" NOT NULL,
    host               text COLLATE "C" NOT NULL,
    when_busy          text    NOT NULL,
    folded_into        text    NOT NULL,
    cancel_reason      text    NOT NULL,
    finish_reason      text,
    error_reason       text,
    error_message      text,
    message_id         text,
    usage              text,
    metadata           text,
    prompt_fingerprint text    NOT NULL,
    prompt_head        text    NOT NULL,
    CONSTRAINT runs_key PRIMARY KEY (tenant, run_id)
);

CREATE INDEX runs_by_session ON runs (tenant, session_id, run_no) WHERE run_no > 0;

-- A lane is loaded, and the work found at start, without touching the runs that have ended.
CREATE INDEX runs_open ON runs (tenant, session_id, run_no)
WHERE ended_at IS NULL AND run_no > 0;

CREATE INDEX runs_ended ON runs (tenant, state, run_no)
WHERE ended_at IS NOT NULL AND run_no > 0;

-- What a node has to answer for, the longest active first. A run that joined another's turn is not
-- active by itself.
CREATE INDEX runs_active ON runs (host, state, started_at)
WHERE state IN ('active', 'cancelling') AND folded_into = '' AND run_no > 0;

-- What follows the head of a prompt, where there is more of it.
CREATE TABLE prompts (
    tenant text COLLATE "C" NOT NULL,
    run_id text COLLATE "C" NOT NULL,
    rest   text             NOT NULL,
    PRIMARY KEY (tenant, run_id)
);

-- content is UTF-8 where is_text.
CREATE TABLE attachments (
    tenant    text COLLATE "C" NOT NULL,
    run_id    text COLLATE "C" NOT NULL,
    n         bigint           NOT NULL,
    is_text   boolean          NOT NULL,
    name      text             NOT NULL,
    mime_type text             NOT NULL,
    content   bytea            NOT NULL,
    PRIMARY KEY (tenant, run_id, n)
);

-- How attachments are read: all of a run in one field.
CREATE TYPE kept_attachment AS (is_text boolean, name text, mime_type text, content bytea);

CREATE TABLE messages (
    turn          bigint  NOT NULL,
    ordinal       bigint  NOT NULL,
    created_at    bigint  NOT NULL,
    tenant        text COLLATE "C" NOT NULL,
    session_id    text COLLATE "C" NOT NULL,
    message_id    text    NOT NULL,
    run_id        text    NOT NULL,
    role          text    NOT NULL,
    finish_reason text,
    model         text    NOT NULL,
    parts         text,
    PRIMARY KEY (tenant, session_id, turn, ordinal)
);

-- body is NULL for run_complete: it is the end that the run's own row tells of.
CREATE TABLE run_events (
    idx    bigint  NOT NULL,
    at     bigint  NOT NULL,
    tenant text COLLATE "C" NOT NULL,
    run_id text COLLATE "C" NOT NULL,
    kind   text    NOT NULL,
    body   text,
    PRIMARY KEY (tenant, run_id, idx)
);

-- The event log. Positions have no gap and are in commit order over all nodes (see append_to_log);
-- compaction removes a prefix. log_bytes is about how large the log was with this event: its own size
-- and all before it, with the events of their runs, counted from the first one ever. body is whole:
-- it outlives the session.
CREATE TABLE events (
    position   bigint  NOT NULL,
    ended_at   bigint  NOT NULL,
    log_bytes  bigint  NOT NULL,
    tenant     text COLLATE "C" NOT NULL,
    session_id text COLLATE "C" NOT NULL,
    run_id     text COLLATE "C" NOT NULL,
    body       text    NOT NULL,
    CONSTRAINT events_key PRIMARY KEY (position)
);

CREATE INDEX events_by_session ON events (session_id, tenant, position);

CREATE INDEX events_by_run ON events (run_id, tenant, position);
