-- The retry policy of a run, and where its retries stand, as JSON (see codec.encode_retry). NULL for most.

ALTER TABLE runs ADD COLUMN retry text;

-- hold: in how many microseconds the next attempt may start, 0 if the run waits for none.
CREATE TYPE retried_run AS (hold bigint, tenant text, run_id text, session_id text, retry text);

-- Commits units as commit_with_inputs does, and runs with a retry policy. No node claims a lane whose first
-- run waits for its next attempt, by the clock of the database.
CREATE FUNCTION commit_retries(
    new_lanes opened_lane[], changed_lanes advanced_lane[], removed_lanes removed_lane[],
    new_runs accepted_run[], changed_runs changed_run[], new_prompts new_prompt[],
    new_attachments new_attachment[], new_messages new_message[], new_run_events new_run_event[],
    fences fence[], new_events new_event[], new_inputs new_input[], closed_inputs closed_input[],
    asking_runs asking_run[], retried_runs retried_run[],
    OUT refused refusal[], OUT raised raised[], OUT first_position bigint
) LANGUAGE plpgsql AS $$
BEGIN
    SELECT made.refused, made.raised, made.first_position INTO refused, raised, first_position
    FROM commit_with_inputs(
        new_lanes, changed_lanes, removed_lanes, new_runs, changed_runs, new_prompts,
        new_attachments, new_messages, new_run_events, fences, new_events,
        new_inputs, closed_inputs, asking_runs
    ) AS made;
    IF cardinality(refused) > 0 OR cardinality(retried_runs) = 0 THEN
        RETURN;
    END IF;
    UPDATE runs SET retry = made.retry FROM unnest(retried_runs) AS made
    WHERE runs.tenant = made.tenant AND runs.run_id = made.run_id;
    UPDATE sessions SET
        claimed_by = NULL,
        claimed_until = CASE
            WHEN made.hold > 0 THEN clock_timestamp() + made.hold * interval '1 microsecond'
        END
    FROM (
        SELECT tenant, session_id, max(hold) AS hold FROM unnest(retried_runs)
        GROUP BY tenant, session_id
    ) AS made
    WHERE sessions.tenant = made.tenant AND sessions.session_id = made.session_id
        AND (made.hold > 0 OR sessions.claimed_by IS NULL);
END $$;
