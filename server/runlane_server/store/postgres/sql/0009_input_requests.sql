-- Questions of agents to people, and their answers.

-- asking is JSON: what the lane knows of the requests of a run, the open ones first. NULL without
-- any.
ALTER TABLE runs ADD COLUMN asking text;

ALTER TYPE new_run ADD ATTRIBUTE asking text;

ALTER TYPE changed_run ADD ATTRIBUTE asking text;

-- Runs whose agent waits on a node for input.
CREATE INDEX runs_asking ON runs (host, started_at)
WHERE state = 'input_required' AND host <> '' AND run_no > 0;

-- Runs that have waited for input and need none any more.
CREATE INDEX runs_answered ON runs (host, run_no)
WHERE state = 'input_required' AND left(asking, 4) = '[[],' AND run_no > 0;

-- The row is written twice: with the question, and at the end of the request with its answer.
CREATE TABLE input_requests (
    request_no       bigint GENERATED ALWAYS AS IDENTITY,
    requested_at     bigint NOT NULL,
    expires_at       bigint,
    closed_at        bigint,
    tenant           text COLLATE "C" NOT NULL,
    input_request_id text COLLATE "C" NOT NULL,
    session_id       text COLLATE "C" NOT NULL,
    run_id           text COLLATE "C" NOT NULL,
    key              text COLLATE "C" NOT NULL,
    state            text COLLATE "C" NOT NULL,
    question         text NOT NULL,
    answer           text,
    CONSTRAINT input_requests_key PRIMARY KEY (tenant, input_request_id)
);

CREATE INDEX input_requests_by_tenant ON input_requests (tenant, request_no) WHERE request_no > 0;

CREATE INDEX input_requests_by_session ON input_requests (tenant, session_id, request_no)
WHERE request_no > 0;

CREATE INDEX input_requests_by_run ON input_requests (tenant, run_id, request_no)
WHERE request_no > 0;

CREATE INDEX input_requests_open ON input_requests (tenant, request_no)
WHERE state = 'open' AND request_no > 0;

CREATE INDEX input_requests_due ON input_requests (expires_at)
WHERE state = 'open' AND expires_at IS NOT NULL;

CREATE TYPE new_input AS (
    requested_at bigint, expires_at bigint, closed_at bigint, tenant text, input_request_id text,
    session_id text, run_id text, key text, state text, answer text, question text
);

CREATE TYPE closed_input AS (
    closed_at bigint, tenant text, input_request_id text, state text, answer text
);

-- Writes runs and what belongs to them. An error of it refuses the whole flush.
CREATE OR REPLACE FUNCTION write_runs(
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
            usage, metadata, prompt_fingerprint, prompt_head, trace, asking
        )
        OVERRIDING SYSTEM VALUE
        SELECT
            run_no, accept_seq, rank, turn, timeout, accepted_at, started_at, ended_at,
            max_attempts, attempt, attachments, tenant, run_id, session_id, state, host, when_busy,
            folded_into, cancel_reason, finish_reason, error_reason, error_message, message_id,
            usage, metadata, prompt_fingerprint, prompt_head, trace, asking
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
            usage = changed.usage,
            asking = changed.asking
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

-- Removes sessions with all that belongs to them. Their terminal events stay in the log, and their
-- runs are remembered.
CREATE OR REPLACE FUNCTION remove_lanes(removed_lanes removed_lane[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    lane removed_lane;
BEGIN
    -- One at a time: how many runs a session has is not to be guessed by the planner.
    FOREACH lane IN ARRAY removed_lanes LOOP
        INSERT INTO removed_sessions (tenant, session_id, version)
        VALUES (lane.tenant, lane.session_id, lane.base_version)
        ON CONFLICT ON CONSTRAINT removed_sessions_key
        DO UPDATE SET version = excluded.version, removed_at = now();
        INSERT INTO deleted_runs (tenant, run_id, session_id, prompt_fingerprint, events)
        SELECT
            tenant, run_id, session_id, prompt_fingerprint,
            (
                SELECT coalesce(max(idx), 0) FROM run_events
                WHERE run_events.tenant = runs.tenant AND run_events.run_id = runs.run_id
            )
        FROM runs
        WHERE tenant = lane.tenant AND session_id = lane.session_id AND run_no > 0
        ON CONFLICT ON CONSTRAINT deleted_runs_key DO UPDATE SET
            session_id = excluded.session_id,
            prompt_fingerprint = excluded.prompt_fingerprint,
            events = excluded.events,
            deleted_at = now();
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
        DELETE FROM input_requests
        WHERE tenant = lane.tenant AND session_id = lane.session_id AND request_no > 0;
        DELETE FROM runs
        WHERE tenant = lane.tenant AND session_id = lane.session_id AND run_no > 0;
        DELETE FROM sessions WHERE tenant = lane.tenant AND session_id = lane.session_id;
    END LOOP;
END $$;

-- Writes input requests. An error of it refuses the whole flush.
CREATE FUNCTION write_inputs(new_inputs new_input[], closed_inputs closed_input[])
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    written bigint;
BEGIN
    IF cardinality(new_inputs) > 0 THEN
        INSERT INTO input_requests (
            requested_at, expires_at, closed_at, tenant, input_request_id, session_id, run_id, key,
            state, question, answer
        )
        SELECT
            requested_at, expires_at, closed_at, tenant, input_request_id, session_id, run_id, key,
            state, question, answer
        FROM unnest(new_inputs);
    END IF;
    IF cardinality(closed_inputs) > 0 THEN
        UPDATE input_requests SET
            state = closed.state, closed_at = closed.closed_at, answer = closed.answer
        FROM unnest(closed_inputs) AS closed
        WHERE input_requests.tenant = closed.tenant
            AND input_requests.input_request_id = closed.input_request_id
            AND input_requests.state = 'open';
        GET DIAGNOSTICS written = ROW_COUNT;
        IF written <> cardinality(closed_inputs) THEN
            RAISE integrity_constraint_violation
            USING MESSAGE = 'an input request is not what the transition was made from';
        END IF;
    END IF;
END $$;

-- See 0002_commit.sql. The function with fewer parameters is that of nodes of earlier versions.
CREATE FUNCTION commit_units(
    new_lanes new_lane[], changed_lanes changed_lane[], removed_lanes removed_lane[],
    new_runs new_run[], changed_runs changed_run[], new_prompts new_prompt[],
    new_attachments new_attachment[], new_messages new_message[], new_run_events new_run_event[],
    fences fence[], new_events new_event[], new_inputs new_input[], closed_inputs closed_input[],
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
    IF cardinality(new_inputs) + cardinality(closed_inputs) > 0 THEN
        PERFORM write_inputs(new_inputs, closed_inputs);
    END IF;
    IF cardinality(new_events) > 0 THEN
        first_position := append_to_log(new_events);
    END IF;
END $$;
