-- The order of the events of a session: the events of all its runs but the output of agents, by their
-- place in the log of the lane (store/lane_log.py). An idx of 0 marks the place up to which events
-- were removed.
CREATE TABLE lane_events (
    place      bigint NOT NULL,
    idx        bigint NOT NULL,
    tenant     text COLLATE "C" NOT NULL,
    session_id text COLLATE "C" NOT NULL,
    run_id     text COLLATE "C" NOT NULL,
    CONSTRAINT lane_events_key PRIMARY KEY (tenant, session_id, place)
);

CREATE TYPE lane_event AS (
    n bigint, place bigint, idx bigint, tenant text, session_id text, run_id text
);

-- With a terminal event, the log of its lane is removed up to the end of the run.
CREATE FUNCTION trim_lane() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    ended bigint;
BEGIN
    SELECT place INTO ended FROM lane_events
    WHERE tenant = OLD.tenant AND session_id = OLD.session_id AND run_id = OLD.run_id
        AND idx = (
            SELECT max(run_events.idx) FROM run_events
            WHERE run_events.tenant = OLD.tenant AND run_events.run_id = OLD.run_id
        )
    ORDER BY tenant, session_id, place LIMIT 1;
    IF ended IS NOT NULL THEN
        DELETE FROM lane_events
        WHERE tenant = OLD.tenant AND session_id = OLD.session_id AND place < ended;
        UPDATE lane_events SET idx = 0
        WHERE tenant = OLD.tenant AND session_id = OLD.session_id AND place = ended;
    END IF;
    RETURN NULL;
END $$;

CREATE TRIGGER trim_lane AFTER DELETE ON events FOR EACH ROW EXECUTE FUNCTION trim_lane();

CREATE FUNCTION remove_lane_events() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM lane_events WHERE tenant = OLD.tenant AND session_id = OLD.session_id;
    RETURN NULL;
END $$;

CREATE TRIGGER remove_lane_events AFTER DELETE ON sessions
FOR EACH ROW EXECUTE FUNCTION remove_lane_events();

-- Commits units: writes all of them; or nothing, and returns which are refused. It does what
-- commit_retries does, and keeps the order of the events of each session. A new lane that continues
-- the versions of a removed one continues its places.
CREATE FUNCTION commit_in_order(
    new_lanes opened_lane[], changed_lanes advanced_lane[], removed_lanes removed_lane[],
    new_runs accepted_run[], changed_runs changed_run[], new_prompts new_prompt[],
    new_attachments new_attachment[], new_messages new_message[], new_run_events new_run_event[],
    fences fence[], new_events new_event[], new_inputs new_input[], closed_inputs closed_input[],
    asking_runs asking_run[], retried_runs retried_run[], new_lane_events lane_event[],
    OUT refused refusal[], OUT raised raised[], OUT first_position bigint
) LANGUAGE plpgsql AS $$
BEGIN
    -- The log comes last: its lock is held over the commit.
    SELECT made.refused, made.raised INTO refused, raised
    FROM commit_retries(
        new_lanes, changed_lanes, removed_lanes, new_runs, changed_runs, new_prompts,
        new_attachments, new_messages, new_run_events, fences, '{}'::new_event[],
        new_inputs, closed_inputs, asking_runs, retried_runs
    ) AS made;
    IF cardinality(refused) > 0 THEN
        RETURN;
    END IF;
    IF cardinality(new_lane_events) > 0 THEN
        INSERT INTO lane_events (place, idx, tenant, session_id, run_id)
        SELECT
            made.place + (coalesce(lane.after, 0) << 20), made.idx, made.tenant, made.session_id,
            made.run_id
        FROM unnest(new_lane_events) AS made LEFT JOIN unnest(raised) AS lane USING (n);
    END IF;
    IF cardinality(new_events) > 0 THEN
        first_position := append_to_log(new_events);
    END IF;
END $$;
