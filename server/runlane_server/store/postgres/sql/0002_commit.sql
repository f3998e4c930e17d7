-- How nodes write: one call of commit_units for all that a node has to write at a time. A change to
-- what a node sends is a function of another name, as nodes of two versions may serve at once.

-- What a node sends. n is the number of the unit that a row belongs to.

CREATE TYPE new_lane AS (
    n bigint, created boolean, version bigint, accept_seq bigint, turn bigint,
    waiting_runs bigint, waiting_since bigint, input_tokens bigint, output_tokens bigint,
    cache_read_tokens bigint, cache_write_tokens bigint, requests bigint, stored_bytes bigint,
    at bigint,
    tenant text, session_id text, active_run_id text, title text, metadata text
);

CREATE TYPE changed_lane AS (
    n bigint, base_version bigint, version bigint, accept_seq bigint, turn bigint,
    waiting_runs bigint, waiting_since bigint, input_tokens bigint, output_tokens bigint,
    cache_read_tokens bigint, cache_write_tokens bigint, requests bigint, stored_bytes bigint,
    at bigint,
    tenant text, session_id text, active_run_id text
);

CREATE TYPE removed_lane AS (n bigint, base_version bigint, tenant text, session_id text);

CREATE TYPE new_run AS (
    n bigint, accept_seq bigint, rank bigint, turn bigint, timeout bigint, accepted_at bigint,
    started_at bigint, ended_at bigint, max_attempts bigint, attempt bigint, attachments bigint,
    tenant text, run_id text, session_id text, state text, host text, when_busy text,
    folded_into text, cancel_reason text, finish_reason text, error_reason text,
    error_message text, message_id text, usage text, metadata text, prompt_fingerprint text,
    prompt_head text
);

CREATE TYPE changed_run AS (
    rank bigint, turn bigint, started_at bigint, ended_at bigint, attempt bigint,
    tenant text, run_id text, session_id text, state text, host text, folded_into text,
    cancel_reason text, finish_reason text, error_reason text, error_message text, message_id text, usage text
);

CREATE TYPE new_prompt AS (tenant text, run_id text, rest text);

CREATE TYPE new_attachment AS (
    n bigint, is_text boolean, tenant text, run_id text, name text, mime_type text, content bytea
);

CREATE TYPE new_message AS (
    turn bigint, ordinal bigint, created_at bigint, tenant text, session_id text, message_id text,
    run_id text, role text, finish_reason text, model text, parts text
);

CREATE TYPE new_run_event AS (
    idx bigint, at bigint, tenant text, run_id text, kind text, body text
);

-- An append: to the active run, and to that attempt of it.
CREATE TYPE fence AS (n bigint, attempt bigint, tenant text, run_id text);

CREATE TYPE new_event AS (
    ended_at bigint, bytes bigint, tenant text, session_id text, run_id text, body text
);

CREATE TYPE refusal AS (n bigint, reason text);

-- A new lane that goes on from the versions of a removed session: after was its last one.
CREATE TYPE raised AS (n bigint, after bigint);

-- Which units may not be written, and why. What the others depend on is locked until the end of the
-- transaction, in one order over all nodes, so that no two flushes wait for each other.
CREATE FUNCTION refusals(
    new_lanes new_lane[], changed_lanes changed_lane[], removed_lanes removed_lane[],
    new_runs new_run[], fences fence[]
) RETURNS refusal[] LANGUAGE plpgsql AS $$
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

-- Writes sessions. Returns which of the new ones go on from a removed one.
CREATE FUNCTION write_lanes(
    new_lanes new_lane[], changed_lanes changed_lane[], removed_lanes removed_lane[]
) RETURNS raised[] LANGUAGE plpgsql AS $$
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

-- Removes sessions with all that belongs to them; their terminal events stay in the log.
CREATE FUNCTION remove_lanes(removed_lanes removed_lane[]) RETURNS void LANGUAGE plpgsql AS $$
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

-- Writes runs and what belongs to them. An error of it refuses the whole flush.
CREATE FUNCTION write_runs(
    new_runs new_run[], changed_runs changed_run[], new_prompts new_prompt[],
    new_attachments new_attachment[], new_messages new_message[], new_run_events new_run_event[]
) RETURNS void LANGUAGE plpgsql AS $$
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

-- Puts terminal events into the log; returns the position of the first. It has to be the last step
-- of a transaction: the lock is held over the commit, so that whoever comes next finds these events,
-- and nobody ever sees a position while one before it is still to come. The lock is no row: the dead
-- versions of a counter's row would pile up behind every long transaction in the database.
CREATE FUNCTION append_to_log(new_events new_event[]) RETURNS bigint LANGUAGE plpgsql AS $$
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

-- Commits units: writes all of them; or nothing, and tells which are refused.
--
-- first_position is that of the first of new_events, NULL without any. An error means that some unit
-- among them was refused by a row that another transaction wrote meanwhile.
CREATE FUNCTION commit_units(
    new_lanes new_lane[], changed_lanes changed_lane[], removed_lanes removed_lane[],
    new_runs new_run[], changed_runs changed_run[], new_prompts new_prompt[],
    new_attachments new_attachment[], new_messages new_message[], new_run_events new_run_event[],
    fences fence[], new_events new_event[],
    OUT refused refusal[], OUT raised raised[], OUT first_position bigint
) LANGUAGE plpgsql AS $$
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
