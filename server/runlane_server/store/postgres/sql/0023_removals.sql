-- Sessions that were deleted, and whose rows are removed piece by piece. For callers they do not exist;
-- their ids are free when the last row is gone.
CREATE TABLE removals (
    removal_no bigint GENERATED ALWAYS AS IDENTITY,
    tenant     text COLLATE "C" NOT NULL,
    session_id text COLLATE "C" NOT NULL,
    CONSTRAINT removals_key PRIMARY KEY (tenant, session_id)
);

-- Copies of transcripts that no session has any more, removed in the same way.
CREATE TABLE dropped_copies (copy_id bigint PRIMARY KEY);

DROP TRIGGER remove_lane_events ON sessions;

-- The functions below are planned at each call: they are rare, and the tables were empty when a
-- connection has planned them first. They skip rows that a compaction holds, so that no two
-- transactions wait for each other.

-- Removes runs with all that belongs to them; returns whether they are gone. It removes at most as many
-- rows, and as many parts of long messages; NULL for all.
CREATE FUNCTION remove_runs(of_tenant text, run_ids text[], most_rows bigint, most_parts bigint)
RETURNS boolean LANGUAGE plpgsql SET plan_cache_mode = force_custom_plan AS $$
DECLARE
    removed bigint;
BEGIN
    -- The last event stays until the run goes: its index is what is remembered of them.
    DELETE FROM run_events WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM run_events
        WHERE tenant = of_tenant AND run_id = ANY (run_ids) AND kind <> 'run_complete'
        ORDER BY tenant, run_id, idx LIMIT most_rows FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS removed = ROW_COUNT;
    IF removed = most_rows OR most_rows > 0 AND EXISTS (
        SELECT FROM run_events
        WHERE tenant = of_tenant AND run_id = ANY (run_ids) AND kind <> 'run_complete'
    ) THEN
        RETURN false;
    END IF;
    DELETE FROM kept_parts WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM kept_parts WHERE tenant = of_tenant AND run_id = ANY (run_ids)
        LIMIT most_parts
    ));
    GET DIAGNOSTICS removed = ROW_COUNT;
    IF removed = most_parts THEN
        RETURN false;
    END IF;
    INSERT INTO deleted_runs (tenant, run_id, session_id, prompt_fingerprint, events)
    SELECT
        tenant, run_id, session_id, prompt_fingerprint,
        (
            SELECT coalesce(max(idx), 0) FROM run_events
            WHERE run_events.tenant = runs.tenant AND run_events.run_id = runs.run_id
        )
    FROM runs WHERE tenant = of_tenant AND run_id = ANY (run_ids)
    ON CONFLICT ON CONSTRAINT deleted_runs_key DO UPDATE SET
        session_id = excluded.session_id,
        prompt_fingerprint = excluded.prompt_fingerprint,
        events = excluded.events,
        deleted_at = now();
    DELETE FROM run_events WHERE tenant = of_tenant AND run_id = ANY (run_ids);
    DELETE FROM attachments WHERE tenant = of_tenant AND run_id = ANY (run_ids);
    DELETE FROM prompts WHERE tenant = of_tenant AND run_id = ANY (run_ids);
    DELETE FROM runs WHERE tenant = of_tenant AND run_id = ANY (run_ids);
    RETURN true;
END $$;

-- Removes a piece of a deleted session: up to 1,000 rows of a table, 200 runs, and 20 parts of long
-- messages or attachments. Runs go last, as they have the other rows of theirs.
CREATE FUNCTION remove_piece(of_tenant text, of_session text)
RETURNS void LANGUAGE plpgsql SET plan_cache_mode = force_custom_plan AS $$
DECLARE
    removed bigint;
    run_ids text[];
BEGIN
    DELETE FROM messages WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM messages WHERE tenant = of_tenant AND session_id = of_session LIMIT 1000
    ));
    GET DIAGNOSTICS removed = ROW_COUNT;
    IF removed = 1000 THEN
        RETURN;
    END IF;
    DELETE FROM lane_events WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM lane_events WHERE tenant = of_tenant AND session_id = of_session
        LIMIT 1000 FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS removed = ROW_COUNT;
    IF removed = 1000 THEN
        RETURN;
    END IF;
    DELETE FROM input_requests WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM input_requests
        WHERE tenant = of_tenant AND session_id = of_session AND request_no > 0 LIMIT 1000
    ));
    GET DIAGNOSTICS removed = ROW_COUNT;
    IF removed = 1000 THEN
        RETURN;
    END IF;
    run_ids := ARRAY(
        SELECT run_id FROM (
            SELECT
                run_id, run_no, row_number() OVER (ORDER BY run_no) AS n,
                sum(attachments) OVER (ORDER BY run_no) AS kept
            FROM (
                SELECT run_id, run_no, attachments FROM runs
                WHERE tenant = of_tenant AND session_id = of_session AND run_no > 0
                ORDER BY run_no LIMIT 200
            ) AS first
        ) AS counted
        WHERE n = 1 OR kept <= 20
        ORDER BY run_no
    );
    IF NOT remove_runs(of_tenant, run_ids, 1000, 20) THEN
        RETURN;
    END IF;
    -- A statement of its own, which sees what was removed.
    IF NOT EXISTS (
        SELECT FROM runs WHERE tenant = of_tenant AND session_id = of_session AND run_no > 0
    ) AND NOT EXISTS (
        SELECT FROM lane_events WHERE tenant = of_tenant AND session_id = of_session
    ) THEN
        DELETE FROM removals WHERE tenant = of_tenant AND session_id = of_session;
    END IF;
END $$;

-- Removes a piece of a copy that no session has.
CREATE FUNCTION remove_copy_piece(of_copy bigint)
RETURNS void LANGUAGE plpgsql SET plan_cache_mode = force_custom_plan AS $$
DECLARE
    removed bigint;
BEGIN
    DELETE FROM copied_attachments WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM copied_attachments WHERE copy_id = of_copy LIMIT 20
    ));
    GET DIAGNOSTICS removed = ROW_COUNT;
    IF removed = 20 THEN
        RETURN;
    END IF;
    DELETE FROM copied_parts WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM copied_parts WHERE copy_id = of_copy LIMIT 20
    ));
    GET DIAGNOSTICS removed = ROW_COUNT;
    IF removed = 20 THEN
        RETURN;
    END IF;
    DELETE FROM copied_messages WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM copied_messages WHERE copy_id = of_copy LIMIT 1000
    ));
    GET DIAGNOSTICS removed = ROW_COUNT;
    IF removed < 1000 THEN
        DELETE FROM dropped_copies WHERE copy_id = of_copy;
    END IF;
END $$;

CREATE OR REPLACE FUNCTION remove_copy() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM sessions WHERE copy_id = OLD.copy_id AND copy_id IS NOT NULL) THEN
        RETURN NULL;  -- the copy is finished, and a session has it
    END IF;
    INSERT INTO dropped_copies (copy_id) VALUES (OLD.copy_id) ON CONFLICT DO NOTHING;
    PERFORM remove_copy_piece(OLD.copy_id);
    RETURN NULL;
END $$;

-- Deletes sessions, and removes the first piece of what belongs to them: all of a small one. Their
-- terminal events stay in the log, and their runs are remembered. Open runs, of a session that is
-- discarded, do not outlast it.
CREATE OR REPLACE FUNCTION remove_lanes(removed_lanes removed_lane[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    lane removed_lane;
    open_runs text[];
BEGIN
    FOREACH lane IN ARRAY removed_lanes LOOP
        INSERT INTO removed_sessions (tenant, session_id, version)
        VALUES (lane.tenant, lane.session_id, lane.base_version)
        ON CONFLICT ON CONSTRAINT removed_sessions_key
        DO UPDATE SET version = excluded.version, removed_at = now();
        INSERT INTO removals (tenant, session_id) VALUES (lane.tenant, lane.session_id)
        ON CONFLICT DO NOTHING;
        DELETE FROM sessions WHERE tenant = lane.tenant AND session_id = lane.session_id;
        open_runs := ARRAY(
            SELECT run_id FROM runs
            WHERE tenant = lane.tenant AND session_id = lane.session_id AND ended_at IS NULL
                AND run_no > 0
        );
        IF cardinality(open_runs) > 0 THEN
            PERFORM remove_runs(lane.tenant, open_runs, NULL, NULL);
        END IF;
        PERFORM remove_piece(lane.tenant, lane.session_id);
    END LOOP;
END $$;

-- Removes the next piece of what was deleted; returns whether there was any. Nodes work on different
-- ones.
CREATE FUNCTION remove_next() RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    removal removals;
    copy bigint;
BEGIN
    SELECT * INTO removal FROM removals ORDER BY removal_no LIMIT 1 FOR UPDATE SKIP LOCKED;
    IF FOUND THEN
        PERFORM remove_piece(removal.tenant, removal.session_id);
        RETURN true;
    END IF;
    SELECT copy_id INTO copy FROM dropped_copies LIMIT 1 FOR UPDATE SKIP LOCKED;
    IF FOUND THEN
        PERFORM remove_copy_piece(copy);
        RETURN true;
    END IF;
    RETURN false;
END $$;

-- See 0018_seek_taken.sql; the id of a session that is being removed is taken.
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
            UNION ALL
            SELECT FROM removals
            WHERE removals.tenant = made.tenant AND removals.session_id = made.session_id
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

-- See 0020_forks.sql; the id of a session that is being removed is taken.
CREATE OR REPLACE FUNCTION create_fork(
    of_tenant text, source_id text, source_no bigint, copy bigint, last_turn bigint,
    new_id text, new_title text, new_metadata text, new_agent text, bytes bigint, at bigint
) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    made bigint;
BEGIN
    PERFORM FROM sessions
    WHERE tenant = of_tenant AND session_id = source_id AND created_no = source_no FOR KEY SHARE;
    IF FOUND THEN
        PERFORM FROM unfinished_copies WHERE copy_id = copy FOR UPDATE;
    END IF;
    IF NOT FOUND THEN
        -- It is repeated if the connection was lost after the commit: then the fork has the copy.
        SELECT version INTO made FROM sessions
        WHERE tenant = of_tenant AND session_id = new_id AND copy_id = copy;
        RETURN coalesce(made, -1);
    END IF;
    IF EXISTS (SELECT FROM removals WHERE tenant = of_tenant AND session_id = new_id) THEN
        RETURN 0;
    END IF;
    INSERT INTO sessions (
        version, accept_seq, turn, waiting_runs, stored_bytes, created_at, updated_at, origin_turn,
        copy_id, tenant, session_id, active_run_id, title, metadata, agent, origin_id
    ) VALUES (
        1 + coalesce((
            SELECT version FROM removed_sessions WHERE tenant = of_tenant AND session_id = new_id
        ), 0),
        0, last_turn, 0, bytes, at, at, last_turn,
        copy, of_tenant, new_id, '', new_title, new_metadata, new_agent, source_id
    )
    ON CONFLICT ON CONSTRAINT sessions_key DO NOTHING
    RETURNING version INTO made;
    IF made IS NULL THEN
        RETURN 0;
    END IF;
    DELETE FROM unfinished_copies WHERE copy_id = copy;
    RETURN made;
END $$;
