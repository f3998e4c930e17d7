-- The updates of a run while it waited: their number, and the digest of the last one. NULL for most.

ALTER TABLE runs ADD COLUMN revision bigint NOT NULL DEFAULT 0;

ALTER TABLE runs ADD COLUMN last_update text;

-- is_edited: its prompt and its labels are new; else they have no meaning here.
CREATE TYPE updated_run AS (
    revision bigint, attachments bigint, is_edited boolean, tenant text, run_id text,
    when_busy text, last_update text, metadata text, prompt_head text
);

-- Commits units as commit_in_order does, and updates of waiting runs.
CREATE FUNCTION commit_updates(
    new_lanes opened_lane[], changed_lanes advanced_lane[], removed_lanes removed_lane[],
    new_runs accepted_run[], changed_runs changed_run[], new_prompts new_prompt[],
    new_attachments new_attachment[], new_messages new_message[], new_run_events new_run_event[],
    fences fence[], new_events new_event[], new_inputs new_input[], closed_inputs closed_input[],
    asking_runs asking_run[], retried_runs retried_run[], new_lane_events lane_event[],
    updated_runs updated_run[], edited_prompts new_prompt[], edited_attachments new_attachment[],
    OUT refused refusal[], OUT raised raised[], OUT first_position bigint
) LANGUAGE plpgsql AS $$
BEGIN
    IF cardinality(updated_runs) = 0 THEN
        SELECT made.refused, made.raised, made.first_position INTO refused, raised, first_position
        FROM commit_in_order(
            new_lanes, changed_lanes, removed_lanes, new_runs, changed_runs, new_prompts,
            new_attachments, new_messages, new_run_events, fences, new_events,
            new_inputs, closed_inputs, asking_runs, retried_runs, new_lane_events
        ) AS made;
        RETURN;
    END IF;
    -- The log comes last: its lock is held over the commit.
    SELECT made.refused, made.raised INTO refused, raised
    FROM commit_in_order(
        new_lanes, changed_lanes, removed_lanes, new_runs, changed_runs, new_prompts,
        new_attachments, new_messages, new_run_events, fences, '{}'::new_event[],
        new_inputs, closed_inputs, asking_runs, retried_runs, new_lane_events
    ) AS made;
    IF cardinality(refused) > 0 THEN
        RETURN;
    END IF;
    UPDATE runs SET
        revision = made.revision,
        when_busy = made.when_busy,
        last_update = made.last_update,
        attachments = CASE WHEN made.is_edited THEN made.attachments ELSE runs.attachments END,
        metadata = CASE WHEN made.is_edited THEN made.metadata ELSE runs.metadata END,
        prompt_head = CASE WHEN made.is_edited THEN made.prompt_head ELSE runs.prompt_head END
    FROM unnest(updated_runs) AS made
    WHERE runs.tenant = made.tenant AND runs.run_id = made.run_id;
    DELETE FROM prompts USING unnest(updated_runs) AS made
    WHERE made.is_edited AND prompts.tenant = made.tenant AND prompts.run_id = made.run_id;
    DELETE FROM attachments USING unnest(updated_runs) AS made
    WHERE made.is_edited AND attachments.tenant = made.tenant AND attachments.run_id = made.run_id;
    INSERT INTO prompts (tenant, run_id, rest)
    SELECT tenant, run_id, rest FROM unnest(edited_prompts);
    INSERT INTO attachments (tenant, run_id, n, is_text, name, mime_type, content)
    SELECT tenant, run_id, n, is_text, name, mime_type, content FROM unnest(edited_attachments);
    IF cardinality(new_events) > 0 THEN
        first_position := append_to_log(new_events);
    END IF;
END $$;
