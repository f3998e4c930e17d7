-- Events of an attempt are only taken from the node that hosts it: an attempt of a worker keeps its
-- number when it moves to another node, and what the first one still sends must not be written
-- between the events of the second.

CREATE TYPE host_fence AS (
    n bigint, attempt bigint, tenant text, run_id text, host text COLLATE "C"
);

-- Commits units as commit_updates does, with fences that name the host.
CREATE FUNCTION commit_fenced(
    new_lanes opened_lane[], changed_lanes advanced_lane[], removed_lanes removed_lane[],
    new_runs accepted_run[], changed_runs changed_run[], new_prompts new_prompt[],
    new_attachments new_attachment[], new_messages new_message[], new_run_events new_run_event[],
    fences host_fence[], new_events new_event[], new_inputs new_input[],
    closed_inputs closed_input[], asking_runs asking_run[], retried_runs retried_run[],
    new_lane_events lane_event[], updated_runs updated_run[], edited_prompts new_prompt[],
    edited_attachments new_attachment[],
    OUT refused refusal[], OUT raised raised[], OUT first_position bigint
) LANGUAGE plpgsql AS $$
DECLARE
    more refusal[];
BEGIN
    IF cardinality(fences) > 0 THEN
        -- First the locks of lanes, in the order that all flushes have.
        refused := refusals(new_lanes, changed_lanes, removed_lanes, new_runs, '{}'::fence[]);
        -- See 0018_seek_taken.sql about the plan.
        WITH held AS MATERIALIZED (
            SELECT ordered.n
            FROM (SELECT * FROM unnest(fences) ORDER BY tenant, run_id) AS ordered
            CROSS JOIN LATERAL (
                SELECT FROM runs
                WHERE runs.tenant = ordered.tenant AND runs.run_id = ordered.run_id
                    AND runs.attempt = ordered.attempt AND runs.host = ordered.host
                    AND runs.state IN ('active', 'cancelling') AND runs.folded_into = ''
                LIMIT 1 FOR SHARE
            ) AS found
        )
        SELECT array_agg(ROW(n, 'fenced')::refusal) INTO more
        FROM unnest(fences) WHERE n NOT IN (SELECT held.n FROM held);
        refused := refused || coalesce(more, '{}');
        IF cardinality(refused) > 0 THEN
            RETURN;
        END IF;
    END IF;
    SELECT made.refused, made.raised, made.first_position INTO refused, raised, first_position
    FROM commit_updates(
        new_lanes, changed_lanes, removed_lanes, new_runs, changed_runs, new_prompts,
        new_attachments, new_messages, new_run_events, '{}'::fence[], new_events, new_inputs,
        closed_inputs, asking_runs, retried_runs, new_lane_events, updated_runs, edited_prompts,
        edited_attachments
    ) AS made;
END $$;
