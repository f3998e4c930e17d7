-- A database as the first released schema of PostgreSQL (3) had it: dumped after its node was
-- killed at work.
CREATE SCHEMA oldest;

CREATE TYPE oldest.changed_lane AS (
	n bigint,
	base_version bigint,
	version bigint,
	accept_seq bigint,
	turn bigint,
	waiting_runs bigint,
	waiting_since bigint,
	input_tokens bigint,
	output_tokens bigint,
	cache_read_tokens bigint,
	cache_write_tokens bigint,
	requests bigint,
	stored_bytes bigint,
	at bigint,
	tenant text,
	session_id text,
	active_run_id text
);

CREATE TYPE oldest.changed_run AS (
	rank bigint,
	turn bigint,
	started_at bigint,
	ended_at bigint,
	attempt bigint,
	tenant text,
	run_id text,
	session_id text,
	state text,
	host text,
	folded_into text,
	cancel_reason text,
	finish_reason text,
	error_reason text,
	error_message text,
	message_id text,
	usage text
);

CREATE TYPE oldest.compaction AS (
	events bigint,
	compacted bigint,
	more boolean
);

CREATE TYPE oldest.fence AS (
	n bigint,
	attempt bigint,
	tenant text,
	run_id text
);

CREATE TYPE oldest.kept_attachment AS (
	is_text boolean,
	name text,
	mime_type text,
	content bytea
);

CREATE TYPE oldest.new_attachment AS (
	n bigint,
	is_text boolean,
	tenant text,
	run_id text,
	name text,
	mime_type text,
	content bytea
);

CREATE TYPE oldest.new_event AS (
	ended_at bigint,
	bytes bigint,
	tenant text,
	session_id text,
	run_id text,
	body text
);

CREATE TYPE oldest.new_lane AS (
	n bigint,
	created boolean,
	version bigint,
	accept_seq bigint,
	turn bigint,
	waiting_runs bigint,
	waiting_since bigint,
	input_tokens bigint,
	output_tokens bigint,
	cache_read_tokens bigint,
	cache_write_tokens bigint,
	requests bigint,
	stored_bytes bigint,
	at bigint,
	tenant text,
	session_id text,
	active_run_id text,
	title text,
	metadata text
);

CREATE TYPE oldest.new_message AS (
	turn bigint,
	ordinal bigint,
	created_at bigint,
	tenant text,
	session_id text,
	message_id text,
	run_id text,
	role text,
	finish_reason text,
	model text,
	parts text
);

CREATE TYPE oldest.new_prompt AS (
	tenant text,
	run_id text,
	rest text
);

CREATE TYPE oldest.new_run AS (
	n bigint,
	accept_seq bigint,
	rank bigint,
	turn bigint,
	timeout bigint,
	accepted_at bigint,
	started_at bigint,
	ended_at bigint,
	max_attempts bigint,
	attempt bigint,
	attachments bigint,
	tenant text,
	run_id text,
	session_id text,
	state text,
	host text,
	when_busy text,
	folded_into text,
	cancel_reason text,
	finish_reason text,
	error_reason text,
	error_message text,
	message_id text,
	usage text,
	metadata text,
	prompt_fingerprint text,
	prompt_head text
);

CREATE TYPE oldest.new_run_event AS (
	idx bigint,
	at bigint,
	tenant text,
	run_id text,
	kind text,
	body text
);

CREATE TYPE oldest.raised AS (
	n bigint,
	after bigint
);

CREATE TYPE oldest.refusal AS (
	n bigint,
	reason text
);

CREATE TYPE oldest.removed_lane AS (
	n bigint,
	base_version bigint,
	tenant text,
	session_id text
);

CREATE FUNCTION oldest.append_to_log(new_events oldest.new_event[]) RETURNS bigint
    LANGUAGE plpgsql
    AS $$
DECLARE
    sizes bigint[];
    head bigint;
    head_bytes bigint;
BEGIN
    sizes := ARRAY(
        SELECT ended.bytes + coalesce(own.bytes, 0)
        FROM unnest(new_events) WITH ORDINALITY AS ended
            CROSS JOIN LATERAL (
                SELECT sum(100 + coalesce(octet_length(run_events.body), 0))::bigint AS bytes
                FROM run_events
                WHERE run_events.tenant = ended.tenant AND run_events.run_id = ended.run_id
            ) AS own
        ORDER BY ordinality
    );
    PERFORM pg_advisory_xact_lock('events'::regclass::oid::bigint);
    -- A statement of its own, to see what was committed by whoever had the lock.
    SELECT coalesce(last.position, store.compacted), coalesce(last.log_bytes, store.compacted_bytes)
    INTO head, head_bytes
    FROM store LEFT JOIN LATERAL (
        SELECT events.position, events.log_bytes FROM events ORDER BY events.position DESC LIMIT 1
    ) AS last ON true;
    INSERT INTO events (position, ended_at, log_bytes, tenant, session_id, run_id, body)
    SELECT
        head + ordinality, ended_at, head_bytes + sum(size) OVER (ORDER BY ordinality), tenant,
        session_id, run_id, body
    FROM ROWS FROM (unnest(new_events), unnest(sizes)) WITH ORDINALITY
        AS ended (ended_at, bytes, tenant, session_id, run_id, body, size, ordinality);
    RETURN head + 1;
END $$;

CREATE FUNCTION oldest.commit_units(new_lanes oldest.new_lane[], changed_lanes oldest.changed_lane[], removed_lanes oldest.removed_lane[], new_runs oldest.new_run[], changed_runs oldest.changed_run[], new_prompts oldest.new_prompt[], new_attachments oldest.new_attachment[], new_messages oldest.new_message[], new_run_events oldest.new_run_event[], fences oldest.fence[], new_events oldest.new_event[], OUT refused oldest.refusal[], OUT raised oldest.raised[], OUT first_position bigint) RETURNS record
    LANGUAGE plpgsql
    AS $$
BEGIN
    refused := refusals(new_lanes, changed_lanes, removed_lanes, new_runs, fences);
    IF cardinality(refused) > 0 THEN
        RETURN;
    END IF;
    raised := write_lanes(new_lanes, changed_lanes, removed_lanes);
    PERFORM write_runs(
        new_runs, changed_runs, new_prompts, new_attachments, new_messages, new_run_events
    );
    IF cardinality(new_events) > 0 THEN
        first_position := append_to_log(new_events);
    END IF;
END $$;

CREATE FUNCTION oldest.compact(before bigint, most_events bigint, keep_bytes bigint, most_rows bigint, most_bytes bigint) RETURNS oldest.compaction
    LANGUAGE plpgsql
    AS $$
DECLARE
    state store;
    event record;
    trimmed record;
    head_bytes bigint;
    rows bigint := 0;
    bytes bigint := 0;
    done compaction := ROW(0, NULL, false);
BEGIN
    -- Two nodes that compact take turns.
    SELECT * INTO state FROM store FOR UPDATE;
    SELECT log_bytes INTO head_bytes FROM events ORDER BY position DESC LIMIT 1;
    FOR event IN
        SELECT position, tenant, run_id, ended_at, log_bytes FROM events
        ORDER BY position LIMIT most_events
    LOOP
        EXIT WHEN event.ended_at >= before
            AND (keep_bytes IS NULL OR head_bytes - state.compacted_bytes <= keep_bytes);
        done.more := rows >= most_rows OR bytes >= most_bytes;
        EXIT WHEN done.more;
        trimmed := trim_run(
            event.tenant, event.run_id, event.position, most_rows - rows, most_bytes - bytes
        );
        rows := rows + trimmed.removed + 1;
        done.more := NOT trimmed.complete;
        EXIT WHEN done.more;
        bytes := bytes + event.log_bytes - state.compacted_bytes;
        state.compacted := event.position;
        state.compacted_bytes := event.log_bytes;
        done.events := done.events + 1;
    END LOOP;
    IF done.events > 0 THEN
        DELETE FROM events WHERE position <= state.compacted;
        UPDATE store
        SET compacted = state.compacted, compacted_bytes = state.compacted_bytes;
    END IF;
    done.compacted := state.compacted;
    RETURN done;
END $$;

CREATE FUNCTION oldest.forget_removed(age interval, most bigint) RETURNS bigint
    LANGUAGE plpgsql
    AS $$
DECLARE
    forgotten bigint;
BEGIN
    DELETE FROM removed_sessions
    WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM removed_sessions
        WHERE removed_at < now() - age ORDER BY removed_at LIMIT most FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS forgotten = ROW_COUNT;
    RETURN forgotten;
END $$;

CREATE FUNCTION oldest.refusals(new_lanes oldest.new_lane[], changed_lanes oldest.changed_lane[], removed_lanes oldest.removed_lane[], new_runs oldest.new_run[], fences oldest.fence[]) RETURNS oldest.refusal[]
    LANGUAGE plpgsql
    AS $$
DECLARE
    every refusal[] := '{}';
    more refusal[];
BEGIN
    IF cardinality(changed_lanes) + cardinality(removed_lanes) > 0 THEN
        WITH wanted AS MATERIALIZED (
            SELECT n, base_version, tenant, session_id FROM unnest(changed_lanes)
            UNION ALL
            SELECT n, base_version, tenant, session_id FROM unnest(removed_lanes)
        ), held AS MATERIALIZED (
            SELECT wanted.n
            FROM wanted JOIN sessions USING (tenant, session_id)
            WHERE sessions.version = wanted.base_version
            ORDER BY tenant, session_id FOR UPDATE OF sessions
        )
        SELECT array_agg(ROW(n, 'stale')::refusal) INTO more
        FROM wanted WHERE n NOT IN (SELECT held.n FROM held);
        every := every || coalesce(more, '{}');
    END IF;
    IF cardinality(new_lanes) > 0 THEN
        SELECT array_agg(ROW(n, CASE WHEN created THEN 'session_taken' ELSE 'stale' END)::refusal)
        INTO more
        FROM unnest(new_lanes) AS made
        WHERE EXISTS (
            SELECT FROM sessions
            WHERE sessions.tenant = made.tenant AND sessions.session_id = made.session_id
        );
        every := every || coalesce(more, '{}');
    END IF;
    IF cardinality(new_runs) > 0 THEN
        SELECT array_agg(DISTINCT ROW(n, 'run_id_taken')::refusal) INTO more
        FROM unnest(new_runs) AS made
        WHERE EXISTS (
            SELECT FROM runs WHERE runs.tenant = made.tenant AND runs.run_id = made.run_id
        );
        every := every || coalesce(more, '{}');
    END IF;
    IF cardinality(fences) > 0 THEN
        -- A run that was folded into another is never the active one, though a cancel puts it into
        -- the same state.
        WITH held AS MATERIALIZED (
            SELECT fence.n
            FROM unnest(fences) AS fence JOIN runs USING (tenant, run_id)
            WHERE runs.attempt = fence.attempt AND runs.state IN ('active', 'cancelling')
                AND runs.folded_into = ''
            ORDER BY tenant, run_id FOR SHARE OF runs
        )
        SELECT array_agg(ROW(n, 'fenced')::refusal) INTO more
        FROM unnest(fences) WHERE n NOT IN (SELECT held.n FROM held);
        every := every || coalesce(more, '{}');
    END IF;
    RETURN every;
END $$;

CREATE FUNCTION oldest.remove_lanes(removed_lanes oldest.removed_lane[]) RETURNS void
    LANGUAGE plpgsql
    AS $$
DECLARE
    lane removed_lane;
BEGIN
    -- One at a time: how many runs a session has is not to be guessed by the planner.
    FOREACH lane IN ARRAY removed_lanes LOOP
        INSERT INTO removed_sessions (tenant, session_id, version)
        VALUES (lane.tenant, lane.session_id, lane.base_version)
        ON CONFLICT ON CONSTRAINT removed_sessions_key
        DO UPDATE SET version = excluded.version, removed_at = now();
        DELETE FROM messages WHERE tenant = lane.tenant AND session_id = lane.session_id;
        DELETE FROM run_events USING runs
        WHERE runs.tenant = lane.tenant AND runs.session_id = lane.session_id AND runs.run_no > 0
            AND run_events.tenant = lane.tenant AND run_events.run_id = runs.run_id;
        DELETE FROM attachments USING runs
        WHERE runs.tenant = lane.tenant AND runs.session_id = lane.session_id AND runs.run_no > 0
            AND attachments.tenant = lane.tenant AND attachments.run_id = runs.run_id;
        DELETE FROM prompts USING runs
        WHERE runs.tenant = lane.tenant AND runs.session_id = lane.session_id AND runs.run_no > 0
            AND prompts.tenant = lane.tenant AND prompts.run_id = runs.run_id;
        DELETE FROM runs
        WHERE tenant = lane.tenant AND session_id = lane.session_id AND run_no > 0;
        DELETE FROM sessions WHERE tenant = lane.tenant AND session_id = lane.session_id;
    END LOOP;
END $$;

CREATE FUNCTION oldest.trim_run(of_tenant text, of_run_id text, of_position bigint, most_rows bigint, most_bytes bigint, OUT removed bigint, OUT complete boolean) RETURNS record
    LANGUAGE plpgsql
    AS $$
DECLARE
    last bigint;
    upto bigint;
BEGIN
    removed := 0;
    complete := true;
    SELECT max(idx) INTO last FROM run_events WHERE tenant = of_tenant AND run_id = of_run_id;
    IF last IS NULL
        OR NOT EXISTS (
            SELECT FROM runs
            WHERE tenant = of_tenant AND run_id = of_run_id AND ended_at IS NOT NULL
        )
        OR EXISTS (
            SELECT FROM events
            WHERE tenant = of_tenant AND run_id = of_run_id AND position > of_position
        )
    THEN
        RETURN;
    END IF;
    -- The sizes of so many are looked at, and not of all that a run may have.
    SELECT max(idx), count(*) INTO upto, removed FROM (
        SELECT idx, sum(size) OVER (ORDER BY idx) - size AS before FROM (
            SELECT idx, coalesce(octet_length(body), 0) AS size FROM run_events
            WHERE tenant = of_tenant AND run_id = of_run_id AND idx < last
            ORDER BY idx LIMIT most_rows
        ) AS first
    ) AS sized
    WHERE before < most_bytes;
    IF upto IS NOT NULL THEN
        DELETE FROM run_events WHERE tenant = of_tenant AND run_id = of_run_id AND idx <= upto;
    END IF;
    complete := NOT EXISTS (
        SELECT FROM run_events
        WHERE tenant = of_tenant AND run_id = of_run_id AND idx > coalesce(upto, 0) AND idx < last
    );
END $$;

CREATE FUNCTION oldest.write_lanes(new_lanes oldest.new_lane[], changed_lanes oldest.changed_lane[], removed_lanes oldest.removed_lane[]) RETURNS oldest.raised[]
    LANGUAGE plpgsql
    AS $$
DECLARE
    raised raised[] := '{}';
BEGIN
    IF cardinality(changed_lanes) > 0 THEN
        UPDATE sessions SET
            version = changed.version,
            accept_seq = changed.accept_seq,
            turn = changed.turn,
            waiting_runs = changed.waiting_runs,
            waiting_since = changed.waiting_since,
            active_run_id = changed.active_run_id,
            -- A claim is for a lane that waits.
            claimed_by = CASE WHEN changed.active_run_id = '' THEN sessions.claimed_by END,
            claimed_until = CASE WHEN changed.active_run_id = '' THEN sessions.claimed_until END,
            input_tokens = sessions.input_tokens + changed.input_tokens,
            output_tokens = sessions.output_tokens + changed.output_tokens,
            cache_read_tokens = sessions.cache_read_tokens + changed.cache_read_tokens,
            cache_write_tokens = sessions.cache_write_tokens + changed.cache_write_tokens,
            requests = sessions.requests + changed.requests,
            stored_bytes = sessions.stored_bytes + changed.stored_bytes,
            updated_at = greatest(sessions.updated_at, changed.at)
        FROM unnest(changed_lanes) AS changed
        WHERE sessions.tenant = changed.tenant AND sessions.session_id = changed.session_id;
    END IF;
    IF cardinality(removed_lanes) > 0 THEN
        PERFORM remove_lanes(removed_lanes);
    END IF;
    IF cardinality(new_lanes) > 0 THEN
        -- The order of the list is that of the units, the order of the locks that of the keys.
        WITH made AS MATERIALIZED (
            SELECT
                nextval(pg_get_serial_sequence('sessions', 'created_no')) AS created_no, lane.*,
                coalesce(removed.version, 0) AS after
            FROM unnest(new_lanes) WITH ORDINALITY AS lane
                LEFT JOIN removed_sessions AS removed USING (tenant, session_id)
            ORDER BY ordinality
        ), written AS (
            INSERT INTO sessions (
                created_no, version, accept_seq, turn, waiting_runs, waiting_since, input_tokens,
                output_tokens, cache_read_tokens, cache_write_tokens, requests, stored_bytes,
                created_at, updated_at, tenant, session_id, active_run_id, title, metadata
            )
            OVERRIDING SYSTEM VALUE
            SELECT
                created_no, version + after, accept_seq, turn, waiting_runs, waiting_since,
                input_tokens, output_tokens, cache_read_tokens, cache_write_tokens, requests,
                stored_bytes, at, at, tenant, session_id, active_run_id, title, metadata
            FROM made ORDER BY tenant, session_id
        )
        SELECT array_agg(ROW(n, after)::raised) INTO raised FROM made WHERE after > 0;
    END IF;
    RETURN coalesce(raised, '{}');
END $$;

CREATE FUNCTION oldest.write_runs(new_runs oldest.new_run[], changed_runs oldest.changed_run[], new_prompts oldest.new_prompt[], new_attachments oldest.new_attachment[], new_messages oldest.new_message[], new_run_events oldest.new_run_event[]) RETURNS void
    LANGUAGE plpgsql
    AS $$
DECLARE
    written bigint;
BEGIN
    IF cardinality(new_runs) > 0 THEN
        INSERT INTO runs (
            run_no, accept_seq, rank, turn, timeout, accepted_at, started_at, ended_at,
            max_attempts, attempt, attachments, tenant, run_id, session_id, state, host, when_busy,
            folded_into, cancel_reason, finish_reason, error_reason, error_message, message_id,
            usage, metadata, prompt_fingerprint, prompt_head
        )
        OVERRIDING SYSTEM VALUE
        SELECT
            run_no, accept_seq, rank, turn, timeout, accepted_at, started_at, ended_at,
            max_attempts, attempt, attachments, tenant, run_id, session_id, state, host, when_busy,
            folded_into, cancel_reason, finish_reason, error_reason, error_message, message_id,
            usage, metadata, prompt_fingerprint, prompt_head
        FROM (
            SELECT nextval(pg_get_serial_sequence('runs', 'run_no')) AS run_no, run.*
            FROM unnest(new_runs) WITH ORDINALITY AS run ORDER BY ordinality
        ) AS made
        ORDER BY tenant, run_id;
    END IF;
    IF cardinality(changed_runs) > 0 THEN
        UPDATE runs SET
            rank = changed.rank,
            turn = changed.turn,
            started_at = changed.started_at,
            ended_at = changed.ended_at,
            attempt = changed.attempt,
            state = changed.state,
            host = changed.host,
            folded_into = changed.folded_into,
            cancel_reason = changed.cancel_reason,
            finish_reason = changed.finish_reason,
            error_reason = changed.error_reason,
            error_message = changed.error_message,
            message_id = changed.message_id,
            usage = changed.usage
        FROM unnest(changed_runs) AS changed
        WHERE runs.tenant = changed.tenant AND runs.run_id = changed.run_id
            AND runs.session_id = changed.session_id AND runs.ended_at IS NULL;
        GET DIAGNOSTICS written = ROW_COUNT;
        IF written <> cardinality(changed_runs) THEN
            RAISE integrity_constraint_violation
            USING MESSAGE = 'a run is not what the transition was made from';
        END IF;
    END IF;
    IF cardinality(new_prompts) > 0 THEN
        INSERT INTO prompts (tenant, run_id, rest)
        SELECT tenant, run_id, rest FROM unnest(new_prompts);
    END IF;
    IF cardinality(new_attachments) > 0 THEN
        INSERT INTO attachments (tenant, run_id, n, is_text, name, mime_type, content)
        SELECT tenant, run_id, n, is_text, name, mime_type, content FROM unnest(new_attachments);
    END IF;
    IF cardinality(new_messages) > 0 THEN
        INSERT INTO messages (
            turn, ordinal, created_at, tenant, session_id, message_id, run_id, role, finish_reason,
            model, parts
        )
        SELECT
            turn, ordinal, created_at, tenant, session_id, message_id, run_id, role, finish_reason,
            model, parts
        FROM unnest(new_messages);
    END IF;
    IF cardinality(new_run_events) > 0 THEN
        INSERT INTO run_events (idx, at, tenant, run_id, kind, body)
        SELECT idx, at, tenant, run_id, kind, body FROM unnest(new_run_events);
    END IF;
END $$;

CREATE TABLE oldest.attachments (
    tenant text NOT NULL COLLATE pg_catalog."C",
    run_id text NOT NULL COLLATE pg_catalog."C",
    n bigint NOT NULL,
    is_text boolean NOT NULL,
    name text NOT NULL,
    mime_type text NOT NULL,
    content bytea NOT NULL
);

CREATE TABLE oldest.events (
    "position" bigint NOT NULL,
    ended_at bigint NOT NULL,
    log_bytes bigint NOT NULL,
    tenant text NOT NULL COLLATE pg_catalog."C",
    session_id text NOT NULL COLLATE pg_catalog."C",
    run_id text NOT NULL COLLATE pg_catalog."C",
    body text NOT NULL
);

CREATE TABLE oldest.messages (
    turn bigint NOT NULL,
    ordinal bigint NOT NULL,
    created_at bigint NOT NULL,
    tenant text NOT NULL COLLATE pg_catalog."C",
    session_id text NOT NULL COLLATE pg_catalog."C",
    message_id text NOT NULL,
    run_id text NOT NULL,
    role text NOT NULL,
    finish_reason text,
    model text NOT NULL,
    parts text
);

CREATE TABLE oldest.nodes (
    node_id text NOT NULL COLLATE pg_catalog."C",
    address text NOT NULL,
    joined_at timestamp with time zone DEFAULT now() NOT NULL,
    heartbeat timestamp with time zone DEFAULT now() NOT NULL,
    steady_since timestamp with time zone DEFAULT '-infinity'::timestamp with time zone NOT NULL,
    lost boolean DEFAULT false NOT NULL
);

CREATE TABLE oldest.prompts (
    tenant text NOT NULL COLLATE pg_catalog."C",
    run_id text NOT NULL COLLATE pg_catalog."C",
    rest text NOT NULL
);

CREATE TABLE oldest.removed_sessions (
    tenant text NOT NULL COLLATE pg_catalog."C",
    session_id text NOT NULL COLLATE pg_catalog."C",
    version bigint NOT NULL,
    removed_at timestamp with time zone DEFAULT now() NOT NULL
);

CREATE TABLE oldest.run_events (
    idx bigint NOT NULL,
    at bigint NOT NULL,
    tenant text NOT NULL COLLATE pg_catalog."C",
    run_id text NOT NULL COLLATE pg_catalog."C",
    kind text NOT NULL,
    body text
);

CREATE TABLE oldest.runs (
    run_no bigint NOT NULL,
    accept_seq bigint NOT NULL,
    rank bigint NOT NULL,
    turn bigint NOT NULL,
    timeout bigint,
    accepted_at bigint NOT NULL,
    started_at bigint,
    ended_at bigint,
    max_attempts bigint NOT NULL,
    attempt bigint NOT NULL,
    attachments bigint NOT NULL,
    tenant text NOT NULL COLLATE pg_catalog."C",
    run_id text NOT NULL COLLATE pg_catalog."C",
    session_id text NOT NULL COLLATE pg_catalog."C",
    state text NOT NULL COLLATE pg_catalog."C",
    host text NOT NULL COLLATE pg_catalog."C",
    when_busy text NOT NULL,
    folded_into text NOT NULL,
    cancel_reason text NOT NULL,
    finish_reason text,
    error_reason text,
    error_message text,
    message_id text,
    usage text,
    metadata text,
    prompt_fingerprint text NOT NULL,
    prompt_head text NOT NULL
);

ALTER TABLE oldest.runs ALTER COLUMN run_no ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME oldest.runs_run_no_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE oldest.schema_versions (
    version integer NOT NULL,
    applied_at timestamp with time zone DEFAULT now() NOT NULL
);

CREATE TABLE oldest.sessions (
    created_no bigint NOT NULL,
    version bigint NOT NULL,
    accept_seq bigint NOT NULL,
    turn bigint NOT NULL,
    waiting_runs bigint NOT NULL,
    waiting_since bigint,
    claimed_until timestamp with time zone,
    input_tokens bigint DEFAULT 0 NOT NULL,
    output_tokens bigint DEFAULT 0 NOT NULL,
    cache_read_tokens bigint DEFAULT 0 NOT NULL,
    cache_write_tokens bigint DEFAULT 0 NOT NULL,
    requests bigint DEFAULT 0 NOT NULL,
    stored_bytes bigint DEFAULT 0 NOT NULL,
    created_at bigint NOT NULL,
    updated_at bigint NOT NULL,
    tenant text NOT NULL COLLATE pg_catalog."C",
    session_id text NOT NULL COLLATE pg_catalog."C",
    active_run_id text NOT NULL,
    title text NOT NULL,
    metadata text,
    claimed_by text COLLATE pg_catalog."C"
);

ALTER TABLE oldest.sessions ALTER COLUMN created_no ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME oldest.sessions_created_no_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE oldest.store (
    single boolean DEFAULT true NOT NULL,
    store_id bytea NOT NULL,
    peer_key text NOT NULL,
    compacted bigint DEFAULT 0 NOT NULL,
    compacted_bytes bigint DEFAULT 0 NOT NULL,
    CONSTRAINT store_single_check CHECK (single)
);

INSERT INTO oldest.attachments VALUES ('default', 'completed', 0, false, 'b.bin', 'application/octet-stream', '\x00ff');
INSERT INTO oldest.attachments VALUES ('default', 'long', 0, true, 'a.txt', 'text/plain', '\x736f6d652074657874');

INSERT INTO oldest.events VALUES (1, 1796042519911472, 1522, 'default', 'done', 'completed', '{"session_id":"done","run_id":"completed","accept_seq":1,"state":"completed","finish_reason":"stop","message_id":"completed-m3","text":"an answer","text_truncated":false,"error":null,"folded_into":"","usage":[3,2,0,0,0],"attempt":1,"cancel_reason":"","accepted_at":1796042519903847,"started_at":1796042519903847,"ended_at":1796042519911472}');
INSERT INTO oldest.events VALUES (2, 1796042519930025, 2667, 'default', 'done', 'failed', '{"session_id":"done","run_id":"failed","accept_seq":2,"state":"failed","finish_reason":"error","message_id":"failed-m1","text":"","text_truncated":false,"error":["AGENT_ERROR","no"],"folded_into":"","usage":[0,0,0,0,0],"attempt":1,"cancel_reason":"","accepted_at":1796042519927430,"started_at":1796042519927430,"ended_at":1796042519930025}');
INSERT INTO oldest.events VALUES (3, 1796042519944361, 6924, 'default', 'done', 'long', '{"session_id":"done","run_id":"long","accept_seq":3,"state":"completed","finish_reason":"stop","message_id":"long-m1","text":"long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long \n\nsome text","text_truncated":false,"error":null,"folded_into":"","usage":[0,0,0,0,0],"attempt":1,"cancel_reason":"","accepted_at":1796042519933669,"started_at":1796042519933669,"ended_at":1796042519944361}');
INSERT INTO oldest.events VALUES (4, 1796042520471441, 8183, 'default', 'lane', 'cancelled', '{"session_id":"lane","run_id":"cancelled","accept_seq":1,"state":"cancelled","finish_reason":"canceled","message_id":"cancelled-m1","text":"one ","text_truncated":false,"error":null,"folded_into":"","usage":[0,0,0,0,0],"attempt":1,"cancel_reason":"enough","accepted_at":1796042519954336,"started_at":1796042519954336,"ended_at":1796042520471441}');
INSERT INTO oldest.events VALUES (5, 1796042520574068, 9438, 'default', 'gone', 'deleted', '{"session_id":"gone","run_id":"deleted","accept_seq":1,"state":"completed","finish_reason":"stop","message_id":"deleted-m1","text":"delete me","text_truncated":false,"error":null,"folded_into":"","usage":[0,0,0,0,0],"attempt":1,"cancel_reason":"","accepted_at":1796042520568035,"started_at":1796042520568035,"ended_at":1796042520574068}');

INSERT INTO oldest.messages VALUES (1, 0, 1796042519903847, 'default', 'done', 'completed-m0', 'completed', 'user', NULL, '', NULL);
INSERT INTO oldest.messages VALUES (1, 1, 1796042519911472, 'default', 'done', 'completed-m1', 'completed', 'assistant', 'tool_calls', '', '[["tool_call","t1","look","{\"at\": \"\\u00e9\"}"]]');
INSERT INTO oldest.messages VALUES (1, 2, 1796042519911472, 'default', 'done', 'completed-m2', 'completed', 'tool', NULL, '', '[["tool_result","t1","look","seen",false]]');
INSERT INTO oldest.messages VALUES (1, 3, 1796042519911472, 'default', 'done', 'completed-m3', 'completed', 'assistant', 'stop', '', '[["text","an answer"]]');
INSERT INTO oldest.messages VALUES (2, 0, 1796042519927430, 'default', 'done', 'failed-m0', 'failed', 'user', NULL, '', NULL);
INSERT INTO oldest.messages VALUES (2, 1, 1796042519930025, 'default', 'done', 'failed-m1', 'failed', 'assistant', 'error', '', NULL);
INSERT INTO oldest.messages VALUES (3, 0, 1796042519933669, 'default', 'done', 'long-m0', 'long', 'user', NULL, '', NULL);
INSERT INTO oldest.messages VALUES (3, 1, 1796042519944361, 'default', 'done', 'long-m1', 'long', 'assistant', 'stop', '', '[["text","long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long \n\nsome text"]]');
INSERT INTO oldest.messages VALUES (1, 0, 1796042519954336, 'default', 'lane', 'cancelled-m0', 'cancelled', 'user', NULL, '', NULL);
INSERT INTO oldest.messages VALUES (1, 1, 1796042520471441, 'default', 'lane', 'cancelled-m1', 'cancelled', 'assistant', 'canceled', '', '[["text","one "]]');
INSERT INTO oldest.messages VALUES (2, 0, 1796042521081026, 'default', 'lane', 'active-m0', 'active', 'user', NULL, '', NULL);
INSERT INTO oldest.messages VALUES (1, 0, 1796042521102619, 'default', 'other', 'retried-m0', 'retried', 'user', NULL, '', NULL);

INSERT INTO oldest.nodes VALUES ('01a22c79-ea7c-7ac3-9b31-99d57ecd49eb', '127.0.0.1:50777', '2026-11-30 12:41:57.139429+00', '2026-11-30 12:41:59.730708+00', '-infinity', false);

INSERT INTO oldest.prompts VALUES ('default', 'long', 'ong long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long ');

INSERT INTO oldest.removed_sessions VALUES ('default', 'gone', 2, '2026-11-30 12:42:01.076678+00');

INSERT INTO oldest.run_events VALUES (1, 1796042519903847, 'default', 'completed', 'accepted', '[1]');
INSERT INTO oldest.run_events VALUES (2, 1796042519903847, 'default', 'completed', 'started', '[1]');
INSERT INTO oldest.run_events VALUES (3, 1796042519911472, 'default', 'completed', 'tool_call', '["t1","look","{\"at\": \"\\u00e9\"}"]');
INSERT INTO oldest.run_events VALUES (4, 1796042519911472, 'default', 'completed', 'tool_result', '["t1","look","seen",false]');
INSERT INTO oldest.run_events VALUES (5, 1796042519911472, 'default', 'completed', 'text_delta', '["an answer"]');
INSERT INTO oldest.run_events VALUES (6, 1796042519911472, 'default', 'completed', 'run_complete', NULL);
INSERT INTO oldest.run_events VALUES (1, 1796042519927430, 'default', 'failed', 'accepted', '[2]');
INSERT INTO oldest.run_events VALUES (2, 1796042519927430, 'default', 'failed', 'started', '[1]');
INSERT INTO oldest.run_events VALUES (3, 1796042519930025, 'default', 'failed', 'run_complete', NULL);
INSERT INTO oldest.run_events VALUES (1, 1796042519933669, 'default', 'long', 'accepted', '[3]');
INSERT INTO oldest.run_events VALUES (2, 1796042519933669, 'default', 'long', 'started', '[1]');
INSERT INTO oldest.run_events VALUES (3, 1796042519944361, 'default', 'long', 'text_delta', '["long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long \n\nsome text"]');
INSERT INTO oldest.run_events VALUES (4, 1796042519944361, 'default', 'long', 'run_complete', NULL);
INSERT INTO oldest.run_events VALUES (1, 1796042519954336, 'default', 'cancelled', 'accepted', '[1]');
INSERT INTO oldest.run_events VALUES (2, 1796042519954336, 'default', 'cancelled', 'started', '[1]');
INSERT INTO oldest.run_events VALUES (3, 1796042519958386, 'default', 'cancelled', 'text_delta', '["one "]');
INSERT INTO oldest.run_events VALUES (4, 1796042520471441, 'default', 'cancelled', 'run_complete', NULL);
INSERT INTO oldest.run_events VALUES (1, 1796042521081026, 'default', 'active', 'accepted', '[2]');
INSERT INTO oldest.run_events VALUES (2, 1796042521081026, 'default', 'active', 'started', '[1]');
INSERT INTO oldest.run_events VALUES (3, 1796042521090734, 'default', 'active', 'text_delta', '["one "]');
INSERT INTO oldest.run_events VALUES (1, 1796042521091992, 'default', 'waiting', 'accepted', '[3]');
INSERT INTO oldest.run_events VALUES (1, 1796042521102619, 'default', 'retried', 'accepted', '[1]');
INSERT INTO oldest.run_events VALUES (2, 1796042521102619, 'default', 'retried', 'started', '[1]');
INSERT INTO oldest.run_events VALUES (3, 1796042521106407, 'default', 'retried', 'text_delta', '["one "]');

INSERT INTO oldest.runs OVERRIDING SYSTEM VALUE VALUES (1, 1, 1, 1, NULL, 1796042519903847, 1796042519903847, 1796042519911472, 1, 1, 1, 'default', 'completed', 'done', 'completed', '', 'queue', '', '', 'stop', NULL, NULL, 'completed-m3', '[3,2,0,0,0]', '{"label":"x"}', 'c0a4cb34dff77447c62ccea10b567121', '[{"usage": {"input_tokens": 3, "output_tokens": 2}}, {"tool_call": {"id": "t1", "name": "look", "arguments": {"at": "\u00e9"}}}, {"tool_result": {"id": "t1", "name": "look", "content": "seen"}}, {"text": "an answer"}]');
INSERT INTO oldest.runs OVERRIDING SYSTEM VALUE VALUES (2, 2, 2, 2, NULL, 1796042519927430, 1796042519927430, 1796042519930025, 1, 1, 0, 'default', 'failed', 'done', 'failed', '', 'queue', '', '', 'error', 'AGENT_ERROR', 'no', 'failed-m1', NULL, NULL, '11e05610f9729f9425a3c6931e4bc4b5', '[{"fail": "no"}]');
INSERT INTO oldest.runs OVERRIDING SYSTEM VALUE VALUES (3, 3, 3, 3, NULL, 1796042519933669, 1796042519933669, 1796042519944361, 1, 1, 1, 'default', 'long', 'done', 'completed', '', 'queue', '', '', 'stop', NULL, NULL, 'long-m1', NULL, NULL, '436c29a2f63dc10ec81d2f94297b05ab', 'long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long l');
INSERT INTO oldest.runs OVERRIDING SYSTEM VALUE VALUES (4, 1, 1, 1, NULL, 1796042519954336, 1796042519954336, 1796042520471441, 1, 1, 0, 'default', 'cancelled', 'lane', 'cancelled', '', 'queue', '', 'enough', 'canceled', NULL, NULL, 'cancelled-m1', NULL, NULL, '275daca973c1476fdd5473bd9f3fe0cb', '[{"text": "one "}, {"wait": "never"}, {"text": "two"}]');
INSERT INTO oldest.runs OVERRIDING SYSTEM VALUE VALUES (6, 2, 2, 2, NULL, 1796042521081026, 1796042521081026, NULL, 1, 1, 0, 'default', 'active', 'lane', 'active', '01a22c79-ea7c-7ac3-9b31-99d57ecd49eb', 'queue', '', '', NULL, NULL, NULL, NULL, NULL, NULL, '275daca973c1476fdd5473bd9f3fe0cb', '[{"text": "one "}, {"wait": "never"}, {"text": "two"}]');
INSERT INTO oldest.runs OVERRIDING SYSTEM VALUE VALUES (7, 3, 3, 0, NULL, 1796042521091992, NULL, NULL, 1, 0, 0, 'default', 'waiting', 'lane', 'queued', '', 'queue', '', '', NULL, NULL, NULL, NULL, NULL, NULL, 'bfd859d66676030e62c5bd8dc36b3a99', '[{"text": "waited"}]');
INSERT INTO oldest.runs OVERRIDING SYSTEM VALUE VALUES (8, 1, 1, 1, NULL, 1796042521102619, 1796042521102619, NULL, 2, 1, 0, 'default', 'retried', 'other', 'active', '01a22c79-ea7c-7ac3-9b31-99d57ecd49eb', 'queue', '', '', NULL, NULL, NULL, NULL, NULL, NULL, '22ae8c0ed564b45c83375126a339336e', '[{"text": "one "}, {"wait": "none"}, {"text": "two"}]');

INSERT INTO oldest.schema_versions VALUES (1, '2026-11-30 12:41:57.052098+00');
INSERT INTO oldest.schema_versions VALUES (2, '2026-11-30 12:41:57.052098+00');
INSERT INTO oldest.schema_versions VALUES (3, '2026-11-30 12:41:57.052098+00');

INSERT INTO oldest.sessions OVERRIDING SYSTEM VALUE VALUES (1, 1, 0, 0, 0, NULL, NULL, 0, 0, 0, 0, 0, 0, 1796042519857000, 1796042519857000, 'default', 'empty', '', 'A title', '{"k":"v"}', NULL);
INSERT INTO oldest.sessions OVERRIDING SYSTEM VALUE VALUES (2, 6, 3, 3, 0, NULL, NULL, 3, 2, 0, 0, 0, 6485, 1796042519903847, 1796042519944361, 'default', 'done', '', '', NULL, NULL);
INSERT INTO oldest.sessions OVERRIDING SYSTEM VALUE VALUES (3, 4, 3, 2, 1, 1796042521091992, NULL, 0, 0, 0, 0, 0, 2245, 1796042519954336, 1796042521091992, 'default', 'lane', 'active', '', NULL, NULL);
INSERT INTO oldest.sessions OVERRIDING SYSTEM VALUE VALUES (5, 1, 1, 1, 0, NULL, NULL, 0, 0, 0, 0, 0, 753, 1796042521102619, 1796042521102619, 'default', 'other', 'retried', '', NULL, NULL);

INSERT INTO oldest.store VALUES (true, '\xa203bb38dc07b4d4', 'b107c24070324faf98abad77d03e69b02abaf8feb2384dada4734552e5b86449', 0, 0);

SELECT pg_catalog.setval('oldest.runs_run_no_seq', 8, true);

SELECT pg_catalog.setval('oldest.sessions_created_no_seq', 5, true);

ALTER TABLE ONLY oldest.attachments
    ADD CONSTRAINT attachments_pkey PRIMARY KEY (tenant, run_id, n);

ALTER TABLE ONLY oldest.events
    ADD CONSTRAINT events_key PRIMARY KEY ("position");

ALTER TABLE ONLY oldest.messages
    ADD CONSTRAINT messages_pkey PRIMARY KEY (tenant, session_id, turn, ordinal);

ALTER TABLE ONLY oldest.nodes
    ADD CONSTRAINT nodes_pkey PRIMARY KEY (node_id);

ALTER TABLE ONLY oldest.prompts
    ADD CONSTRAINT prompts_pkey PRIMARY KEY (tenant, run_id);

ALTER TABLE ONLY oldest.removed_sessions
    ADD CONSTRAINT removed_sessions_key PRIMARY KEY (tenant, session_id);

ALTER TABLE ONLY oldest.run_events
    ADD CONSTRAINT run_events_pkey PRIMARY KEY (tenant, run_id, idx);

ALTER TABLE ONLY oldest.runs
    ADD CONSTRAINT runs_key PRIMARY KEY (tenant, run_id);

ALTER TABLE ONLY oldest.schema_versions
    ADD CONSTRAINT schema_versions_pkey PRIMARY KEY (version);

ALTER TABLE ONLY oldest.sessions
    ADD CONSTRAINT sessions_key PRIMARY KEY (tenant, session_id);

ALTER TABLE ONLY oldest.store
    ADD CONSTRAINT store_pkey PRIMARY KEY (single);

CREATE INDEX events_by_run ON oldest.events USING btree (run_id, tenant, "position");

CREATE INDEX events_by_session ON oldest.events USING btree (session_id, tenant, "position");

CREATE INDEX removed_sessions_by_age ON oldest.removed_sessions USING btree (removed_at);

CREATE INDEX runs_active ON oldest.runs USING btree (host, state, started_at) WHERE ((state = ANY (ARRAY['active'::text, 'cancelling'::text])) AND (folded_into = ''::text) AND (run_no > 0));

CREATE INDEX runs_by_session ON oldest.runs USING btree (tenant, session_id, run_no) WHERE (run_no > 0);

CREATE INDEX runs_ended ON oldest.runs USING btree (tenant, state, run_no) WHERE ((ended_at IS NOT NULL) AND (run_no > 0));

CREATE INDEX runs_open ON oldest.runs USING btree (tenant, session_id, run_no) WHERE ((ended_at IS NULL) AND (run_no > 0));

CREATE INDEX sessions_by_tenant ON oldest.sessions USING btree (tenant, created_no) WHERE (created_no > 0);

CREATE INDEX sessions_idle ON oldest.sessions USING btree (updated_at) WHERE ((active_run_id = ''::text) AND (waiting_runs = 0));

CREATE INDEX sessions_waiting ON oldest.sessions USING btree (active_run_id, tenant, waiting_since) INCLUDE (waiting_runs) WHERE (waiting_runs > 0);
