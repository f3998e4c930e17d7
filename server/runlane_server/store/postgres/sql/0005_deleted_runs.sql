-- Runs whose session was deleted: a repeated request must not execute them again. events is their
-- number.

CREATE TABLE deleted_runs (
    events             bigint           NOT NULL,
    tenant             text COLLATE "C" NOT NULL,
    run_id             text COLLATE "C" NOT NULL,
    session_id         text COLLATE "C" NOT NULL,
    prompt_fingerprint text             NOT NULL,
    deleted_at         timestamptz      NOT NULL DEFAULT now(),
    CONSTRAINT deleted_runs_key PRIMARY KEY (tenant, run_id)
);

CREATE INDEX deleted_runs_by_age ON deleted_runs (deleted_at);

-- Which units may not be written, and why. What the others depend on is locked until the end of the
-- transaction, in one order over all nodes, so that no two flushes wait for each other.
CREATE OR REPLACE FUNCTION refusals(
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
        DELETE FROM runs
        WHERE tenant = lane.tenant AND session_id = lane.session_id AND run_no > 0;
        DELETE FROM sessions WHERE tenant = lane.tenant AND session_id = lane.session_id;
    END LOOP;
END $$;
