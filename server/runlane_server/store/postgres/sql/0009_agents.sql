-- The agent of a run, and that of a session's runs that name none. '' stands for the server's
-- default, and for runs from before agents had names. next_agent is the agent of the next run of a
-- lane that waits: a node claims only lanes whose next run it can execute.
--
-- What a node sends has new types, and the function it calls a new name, because nodes of the version
-- before may serve at the same time.

ALTER TABLE sessions ADD COLUMN agent text COLLATE "C" NOT NULL DEFAULT '';

ALTER TABLE sessions ADD COLUMN next_agent text COLLATE "C" NOT NULL DEFAULT '';

ALTER TABLE runs ADD COLUMN agent text COLLATE "C" NOT NULL DEFAULT '';

-- Lanes with waiting runs: those that any node may serve come first, by agent and tenant, the longest
-- waiting first.
DROP INDEX sessions_waiting;

CREATE INDEX sessions_waiting ON sessions (active_run_id, next_agent, tenant, waiting_since)
INCLUDE (waiting_runs) WHERE waiting_runs > 0;

CREATE TYPE opened_lane AS (
    n bigint, created boolean, version bigint, accept_seq bigint, turn bigint,
    waiting_runs bigint, waiting_since bigint, input_tokens bigint, output_tokens bigint,
    cache_read_tokens bigint, cache_write_tokens bigint, requests bigint, stored_bytes bigint,
    at bigint,
    tenant text, session_id text, active_run_id text, next_agent text, agent text, title text,
    metadata text
);

CREATE TYPE advanced_lane AS (
    n bigint, base_version bigint, version bigint, accept_seq bigint, turn bigint,
    waiting_runs bigint, waiting_since bigint, input_tokens bigint, output_tokens bigint,
    cache_read_tokens bigint, cache_write_tokens bigint, requests bigint, stored_bytes bigint,
    at bigint,
    tenant text, session_id text, active_run_id text, next_agent text
);

CREATE TYPE accepted_run AS (
    n bigint, accept_seq bigint, rank bigint, turn bigint, timeout bigint, accepted_at bigint,
    started_at bigint, ended_at bigint, max_attempts bigint, attempt bigint, attachments bigint,
    tenant text, run_id text, session_id text, state text, host text, when_busy text,
    folded_into text, cancel_reason text, finish_reason text, error_reason text,
    error_message text, message_id text, usage text, metadata text, prompt_fingerprint text,
    prompt_head text, trace text, agent text
);

-- Which units may not be written, and why. What the others depend on is locked until the end of the
-- transaction, in one order over all nodes, so that no two flushes wait for each other.
CREATE FUNCTION refusals(
    new_lanes opened_lane[], changed_lanes advanced_lane[], removed_lanes removed_lane[],
    new_runs accepted_run[], fences fence[]
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
        ) OR EXISTS (
            SELECT FROM deleted_runs
            WHERE deleted_runs.tenant = made.tenant AND deleted_runs.run_id = made.run_id
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
    new_lanes opened_lane[], changed_lanes advanced_lane[], removed_lanes removed_lane[]
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
            next_agent = changed.next_agent,
            -- A claim is for a lane that waits.
            claimed_by = CASE WHEN changed.active_run_id = '' THEN sessions.claimed_by END,
            claimed_until = CASE WHEN changed.active_run_id = '' THEN sessions.claimed_until END,
            input_tokens = sessions.input_tokens
                + least(changed.input_tokens, 9223372036854775807 - sessions.input_tokens),
            output_tokens = sessions.output_tokens
                + least(changed.output_tokens, 9223372036854775807 - sessions.output_tokens),
            cache_read_tokens = sessions.cache_read_tokens
                + least(changed.cache_read_tokens, 9223372036854775807 - sessions.cache_read_tokens),
            cache_write_tokens = sessions.cache_write_tokens
                + least(changed.cache_write_tokens, 9223372036854775807 - sessions.cache_write_tokens),
            requests = sessions.requests
                + least(changed.requests, 9223372036854775807 - sessions.requests),
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
                created_at, updated_at, tenant, session_id, active_run_id, title, metadata,
                agent, next_agent
            )
            OVERRIDING SYSTEM VALUE
            SELECT
                created_no, version + after, accept_seq, turn, waiting_runs, waiting_since,
                input_tokens, output_tokens, cache_read_tokens, cache_write_tokens, requests,
                stored_bytes, at, at, tenant, session_id, active_run_id, title, metadata,
                agent, next_agent
            FROM made ORDER BY tenant, session_id
        )
        SELECT array_agg(ROW(n, after)::raised) INTO raised FROM made WHERE after > 0;
    END IF;
    RETURN coalesce(raised, '{}');
END $$;

-- Writes runs and what belongs to them. An error of it refuses the whole flush.
CREATE FUNCTION write_runs(
    new_runs accepted_run[], changed_runs changed_run[], new_prompts new_prompt[],
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
            usage, metadata, prompt_fingerprint, prompt_head, trace, agent
        )
        OVERRIDING SYSTEM VALUE
        SELECT
            run_no, accept_seq, rank, turn, timeout, accepted_at, started_at, ended_at,
            max_attempts, attempt, attachments, tenant, run_id, session_id, state, host, when_busy,
            folded_into, cancel_reason, finish_reason, error_reason, error_message, message_id,
            usage, metadata, prompt_fingerprint, prompt_head, trace, agent
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

-- Commits units: writes all of them; or nothing, and reports which are refused. See commit_units.
CREATE FUNCTION commit_all(
    new_lanes opened_lane[], changed_lanes advanced_lane[], removed_lanes removed_lane[],
    new_runs accepted_run[], changed_runs changed_run[], new_prompts new_prompt[],
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
