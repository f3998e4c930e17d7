-- Webhooks, and the places of input requests in the event log.

-- settings, secrets and progress are JSON (store/webhooks.py). Only the node in leased_by delivers,
-- and writes progress, until leased_until.
CREATE TABLE webhooks (
    webhook_no   bigint GENERATED ALWAYS AS IDENTITY,
    revision     bigint NOT NULL,
    fence        bigint NOT NULL,
    created_at   bigint NOT NULL,
    updated_at   bigint NOT NULL,
    leased_until timestamptz,
    enabled      boolean NOT NULL,
    tenant       text COLLATE "C" NOT NULL,
    webhook_id   text COLLATE "C" NOT NULL,
    leased_by    text COLLATE "C",
    settings     text NOT NULL,
    secrets      text NOT NULL,
    progress     text NOT NULL,
    CONSTRAINT webhooks_key PRIMARY KEY (tenant, webhook_id)
);

-- The terminal event before the request, and its number among the requests after that event. NULL
-- for requests from before there were webhooks, which none delivers. The pair never repeats: a
-- request is deleted with its session, and its run ends before that, with a terminal event.
ALTER TABLE input_requests ADD COLUMN log_position bigint, ADD COLUMN log_number bigint;

CREATE UNIQUE INDEX input_requests_in_log ON input_requests (log_position, log_number)
WHERE log_position IS NOT NULL;

CREATE INDEX input_requests_of_tenant_in_log
ON input_requests (tenant, log_position, log_number) WHERE log_position IS NOT NULL;

CREATE INDEX input_requests_of_session_in_log
ON input_requests (tenant, session_id, log_position, log_number) WHERE log_position IS NOT NULL;

-- Writes input requests. An error of it refuses the whole flush. New ones are the last step: as with
-- append_to_log, the lock is held over the commit, so that nobody sees a place in the log while an
-- earlier one is still to come.
CREATE OR REPLACE FUNCTION write_inputs(
    new_inputs new_input[], closed_inputs closed_input[], asking_runs asking_run[]
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    written bigint;
    head bigint;
    before bigint;
BEGIN
    -- A request may be closed in the commit that makes it.
    IF cardinality(asking_runs) > 0 THEN
        UPDATE runs SET asking = changed.asking
        FROM unnest(asking_runs) AS changed
        WHERE runs.tenant = changed.tenant AND runs.run_id = changed.run_id;
    END IF;
    IF cardinality(new_inputs) > 0 THEN
        PERFORM pg_advisory_xact_lock('events'::regclass::oid::bigint);
        -- A statement of its own, to see what was committed by whoever had the lock.
        SELECT greatest(store.compacted, (SELECT max(events.position) FROM events))
        INTO head FROM store;
        SELECT coalesce(max(log_number), 0) INTO before
        FROM input_requests WHERE log_position = head;
        INSERT INTO input_requests (
            requested_at, expires_at, closed_at, tenant, input_request_id, session_id, run_id, key,
            state, question, answer, log_position, log_number
        )
        SELECT
            requested_at, expires_at, closed_at, tenant, input_request_id, session_id, run_id, key,
            state, question, answer, head, before + ordinality
        FROM unnest(new_inputs) WITH ORDINALITY AS made (
            requested_at, expires_at, closed_at, tenant, input_request_id, session_id, run_id, key,
            state, answer, question, ordinality
        );
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
