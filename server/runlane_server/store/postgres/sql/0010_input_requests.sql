-- Questions of agents to people, and their answers.

-- asking is JSON: what the lane knows of the requests of a run, the open ones first. NULL without
-- any.
ALTER TABLE runs ADD COLUMN asking text;

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

CREATE TYPE asking_run AS (tenant text, run_id text, asking text);

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
CREATE FUNCTION write_inputs(
    new_inputs new_input[], closed_inputs closed_input[], asking_runs asking_run[]
) RETURNS void LANGUAGE plpgsql AS $$
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
    IF cardinality(asking_runs) > 0 THEN
        UPDATE runs SET asking = changed.asking
        FROM unnest(asking_runs) AS changed
        WHERE runs.tenant = changed.tenant AND runs.run_id = changed.run_id;
    END IF;
END $$;

-- Commits units, as commit_all does, with what concerns input requests.
CREATE FUNCTION commit_with_inputs(
    new_lanes opened_lane[], changed_lanes advanced_lane[], removed_lanes removed_lane[],
    new_runs accepted_run[], changed_runs changed_run[], new_prompts new_prompt[],
    new_attachments new_attachment[], new_messages new_message[], new_run_events new_run_event[],
    fences fence[], new_events new_event[], new_inputs new_input[], closed_inputs closed_input[],
    asking_runs asking_run[],
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
    IF cardinality(new_inputs) + cardinality(closed_inputs) + cardinality(asking_runs) > 0 THEN
        PERFORM write_inputs(new_inputs, closed_inputs, asking_runs);
    END IF;
    IF cardinality(new_events) > 0 THEN
        first_position := append_to_log(new_events);
    END IF;
END $$;
