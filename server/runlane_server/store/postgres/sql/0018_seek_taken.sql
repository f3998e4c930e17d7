-- Which units may not be written, and why; see 0002_commit.sql. Each id is a seek in an index: a LATERAL
-- subquery with a LIMIT has no other plan. Otherwise the planner, which finds the tables empty, makes a
-- hash of all ids for an EXISTS below OR, and reads all of them to get a join in its order. It keeps
-- these plans as the tables grow.
CREATE OR REPLACE FUNCTION refusals(
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
            SELECT ordered.n
            FROM (SELECT * FROM wanted ORDER BY tenant, session_id) AS ordered
            CROSS JOIN LATERAL (
                SELECT FROM sessions
                WHERE sessions.tenant = ordered.tenant
                    AND sessions.session_id = ordered.session_id
                    AND sessions.version = ordered.base_version
                LIMIT 1 FOR UPDATE
            ) AS found
        )
        SELECT array_agg(ROW(n, 'stale')::refusal) INTO more
        FROM wanted WHERE n NOT IN (SELECT held.n FROM held);
        every := every || coalesce(more, '{}');
    END IF;
    IF cardinality(new_lanes) > 0 THEN
        SELECT array_agg(ROW(n, CASE WHEN created THEN 'session_taken' ELSE 'stale' END)::refusal)
        INTO more
        FROM unnest(new_lanes) AS made CROSS JOIN LATERAL (
            SELECT FROM sessions
            WHERE sessions.tenant = made.tenant AND sessions.session_id = made.session_id
            LIMIT 1
        ) AS taken;
        every := every || coalesce(more, '{}');
    END IF;
    IF cardinality(new_runs) > 0 THEN
        SELECT array_agg(DISTINCT ROW(n, 'run_id_taken')::refusal) INTO more
        FROM unnest(new_runs) AS made CROSS JOIN LATERAL (
            SELECT FROM runs WHERE runs.tenant = made.tenant AND runs.run_id = made.run_id
            UNION ALL
            SELECT FROM deleted_runs
            WHERE deleted_runs.tenant = made.tenant AND deleted_runs.run_id = made.run_id
            LIMIT 1
        ) AS taken;
        every := every || coalesce(more, '{}');
    END IF;
    IF cardinality(fences) > 0 THEN
        -- A run that was folded into another is never the active one, though a cancel puts it into
        -- the same state.
        WITH held AS MATERIALIZED (
            SELECT ordered.n
            FROM (SELECT * FROM unnest(fences) ORDER BY tenant, run_id) AS ordered
            CROSS JOIN LATERAL (
                SELECT FROM runs
                WHERE runs.tenant = ordered.tenant AND runs.run_id = ordered.run_id
                    AND runs.attempt = ordered.attempt
                    AND runs.state IN ('active', 'cancelling') AND runs.folded_into = ''
                LIMIT 1 FOR SHARE
            ) AS found
        )
        SELECT array_agg(ROW(n, 'fenced')::refusal) INTO more
        FROM unnest(fences) WHERE n NOT IN (SELECT held.n FROM held);
        every := every || coalesce(more, '{}');
    END IF;
    RETURN every;
END $$;

-- Removes sessions with all that belongs to them. Their terminal events stay in the log, and their
-- runs are remembered.
CREATE OR REPLACE FUNCTION remove_lanes(removed_lanes removed_lane[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    lane removed_lane;
    run_ids text[];
BEGIN
    -- One at a time: how many runs a session has is not to be guessed by the planner.
    FOREACH lane IN ARRAY removed_lanes LOOP
        INSERT INTO removed_sessions (tenant, session_id, version)
        VALUES (lane.tenant, lane.session_id, lane.base_version)
        ON CONFLICT ON CONSTRAINT removed_sessions_key
        DO UPDATE SET version = excluded.version, removed_at = now();
        -- In the order of the one index that has it.
        run_ids := ARRAY(
            SELECT run_id FROM runs
            WHERE tenant = lane.tenant AND session_id = lane.session_id AND run_no > 0
            ORDER BY session_id, run_no
        );
        INSERT INTO deleted_runs (tenant, run_id, session_id, prompt_fingerprint, events)
        SELECT
            lane.tenant, ended.run_id, lane.session_id, run.prompt_fingerprint,
            (
                SELECT coalesce(max(idx), 0) FROM run_events
                WHERE run_events.tenant = lane.tenant AND run_events.run_id = ended.run_id
            )
        FROM unnest(run_ids) AS ended (run_id) CROSS JOIN LATERAL (
            SELECT prompt_fingerprint FROM runs
            WHERE runs.tenant = lane.tenant AND runs.run_id = ended.run_id LIMIT 1
        ) AS run
        ON CONFLICT ON CONSTRAINT deleted_runs_key DO UPDATE SET
            session_id = excluded.session_id,
            prompt_fingerprint = excluded.prompt_fingerprint,
            events = excluded.events,
            deleted_at = now();
        DELETE FROM messages WHERE tenant = lane.tenant AND session_id = lane.session_id;
        DELETE FROM run_events WHERE tenant = lane.tenant AND run_id = ANY (run_ids);
        DELETE FROM attachments WHERE tenant = lane.tenant AND run_id = ANY (run_ids);
        DELETE FROM prompts WHERE tenant = lane.tenant AND run_id = ANY (run_ids);
        DELETE FROM input_requests
        WHERE tenant = lane.tenant AND session_id = lane.session_id AND request_no > 0;
        DELETE FROM runs WHERE tenant = lane.tenant AND run_id = ANY (run_ids);
        DELETE FROM sessions WHERE tenant = lane.tenant AND session_id = lane.session_id;
    END LOOP;
END $$;
