-- The usage of a session stays at the largest number that fits, as in core/model.py: an overflow
-- would refuse the whole flush, and the run could never end.

-- Writes sessions. Returns which of the new ones go on from a removed one.
CREATE OR REPLACE FUNCTION write_lanes(
    new_lanes new_lane[], changed_lanes changed_lane[], removed_lanes removed_lane[]
) RETURNS raised[] LANGUAGE plpgsql AS $$
DECLARE
    raised raised[] := '{}';
BEGIN
    IF cardinality(changed_lanes) > 0 THEN
        UPDATE sessions SET
            version = changed.version,
            accept_seq = changed.accept_seq,
            turn = changed.turn,
            waiting_runs = changed.waiting_runs,
            waiting_since = changed.waiting_since,
            active_run_id = changed.active_run_id,
            -- A claim is for a lane that waits.
            claimed_by = CASE WHEN changed.active_run_id = '' THEN sessions.claimed_by END,
            claimed_until = CASE WHEN changed.active_run_id = '' THEN sessions.claimed_until END,
            input_tokens = sessions.input_tokens
                + least(changed.input_tokens, 9223372036854775807 - sessions.input_tokens),
            output_tokens = sessions.output_tokens
                + least(changed.output_tokens, 9223372036854775807 - sessions.output_tokens),
            cache_read_tokens = sessions.cache_read_tokens
                + least(changed.cache_read_tokens, 9223372036854775807 - sessions.cache_read_tokens),
            cache_write_tokens = sessions.cache_write_tokens
                + least(changed.cache_write_tokens, 9223372036854775807 - sessions.cache_write_tokens),
            requests = sessions.requests
                + least(changed.requests, 9223372036854775807 - sessions.requests),
            stored_bytes = sessions.stored_bytes + changed.stored_bytes,
            updated_at = greatest(sessions.updated_at, changed.at)
        FROM unnest(changed_lanes) AS changed
        WHERE sessions.tenant = changed.tenant AND sessions.session_id = changed.session_id;
    END IF;
    IF cardinality(removed_lanes) > 0 THEN
        PERFORM remove_lanes(removed_lanes);
    END IF;
    IF cardinality(new_lanes) > 0 THEN
        -- The order of the list is that of the units, the order of the locks that of the keys.
        WITH made AS MATERIALIZED (
            SELECT
                nextval(pg_get_serial_sequence('sessions', 'created_no')) AS created_no, lane.*,
                coalesce(removed.version, 0) AS after
            FROM unnest(new_lanes) WITH ORDINALITY AS lane
                LEFT JOIN removed_sessions AS removed USING (tenant, session_id)
            ORDER BY ordinality
        ), written AS (
            INSERT INTO sessions (
                created_no, version, accept_seq, turn, waiting_runs, waiting_since, input_tokens,
                output_tokens, cache_read_tokens, cache_write_tokens, requests, stored_bytes,
                created_at, updated_at, tenant, session_id, active_run_id, title, metadata
            )
            OVERRIDING SYSTEM VALUE
            SELECT
                created_no, version + after, accept_seq, turn, waiting_runs, waiting_since,
                input_tokens, output_tokens, cache_read_tokens, cache_write_tokens, requests,
                stored_bytes, at, at, tenant, session_id, active_run_id, title, metadata
            FROM made ORDER BY tenant, session_id
        )
        SELECT array_agg(ROW(n, after)::raised) INTO raised FROM made WHERE after > 0;
    END IF;
    RETURN coalesce(raised, '{}');
END $$;
