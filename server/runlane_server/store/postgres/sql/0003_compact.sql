-- How the event log is compacted, by any number of nodes at once.

CREATE TYPE compaction AS (events bigint, compacted bigint, more boolean);

-- Removes the first events of an ended run but the last, as soon as its terminal event is the last of
-- that run id: a run whose session was deleted may have had the same. Returns how many, and whether
-- rows and bytes were enough for all.
CREATE FUNCTION trim_run(
    of_tenant text, of_run_id text, of_position bigint, most_rows bigint, most_bytes bigint,
    OUT removed bigint, OUT complete boolean
) LANGUAGE plpgsql AS $$
DECLARE
    last bigint;
    upto bigint;
BEGIN
    removed := 0;
    complete := true;
    SELECT max(idx) INTO last FROM run_events WHERE tenant = of_tenant AND run_id = of_run_id;
    IF last IS NULL
        OR NOT EXISTS (
            SELECT FROM runs
            WHERE tenant = of_tenant AND run_id = of_run_id AND ended_at IS NOT NULL
        )
        OR EXISTS (
            SELECT FROM events
            WHERE tenant = of_tenant AND run_id = of_run_id AND position > of_position
        )
    THEN
        RETURN;
    END IF;
    -- The sizes of so many are looked at, and not of all that a run may have.
    SELECT max(idx), count(*) INTO upto, removed FROM (
        SELECT idx, sum(size) OVER (ORDER BY idx) - size AS before FROM (
            SELECT idx, coalesce(octet_length(body), 0) AS size FROM run_events
            WHERE tenant = of_tenant AND run_id = of_run_id AND idx < last
            ORDER BY idx LIMIT most_rows
        ) AS first
    ) AS sized
    WHERE before < most_bytes;
    IF upto IS NOT NULL THEN
        DELETE FROM run_events WHERE tenant = of_tenant AND run_id = of_run_id AND idx <= upto;
    END IF;
    complete := NOT EXISTS (
        SELECT FROM run_events
        WHERE tenant = of_tenant AND run_id = of_run_id AND idx > coalesce(upto, 0) AND idx < last
    );
END $$;

-- Removes the oldest terminal events, up to most_events of those that ended before, and of the oldest
-- as long as the log has more than keep_bytes (NULL: whatever it has). more: it stopped as it had
-- most_rows or most_bytes, which is enough for one transaction.
CREATE FUNCTION compact(
    before bigint, most_events bigint, keep_bytes bigint, most_rows bigint, most_bytes bigint
) RETURNS compaction LANGUAGE plpgsql AS $$
DECLARE
    state store;
    event record;
    trimmed record;
    head_bytes bigint;
    rows bigint := 0;
    bytes bigint := 0;
    done compaction := ROW(0, NULL, false);
BEGIN
    -- Two nodes that compact take turns.
    SELECT * INTO state FROM store FOR UPDATE;
    SELECT log_bytes INTO head_bytes FROM events ORDER BY position DESC LIMIT 1;
    FOR event IN
        SELECT position, tenant, run_id, ended_at, log_bytes FROM events
        ORDER BY position LIMIT most_events
    LOOP
        EXIT WHEN event.ended_at >= before
            AND (keep_bytes IS NULL OR head_bytes - state.compacted_bytes <= keep_bytes);
        done.more := rows >= most_rows OR bytes >= most_bytes;
        EXIT WHEN done.more;
        trimmed := trim_run(
            event.tenant, event.run_id, event.position, most_rows - rows, most_bytes - bytes
        );
        rows := rows + trimmed.removed + 1;
        done.more := NOT trimmed.complete;
        EXIT WHEN done.more;
        bytes := bytes + event.log_bytes - state.compacted_bytes;
        state.compacted := event.position;
        state.compacted_bytes := event.log_bytes;
        done.events := done.events + 1;
    END LOOP;
    IF done.events > 0 THEN
        DELETE FROM events WHERE position <= state.compacted;
        UPDATE store
        SET compacted = state.compacted, compacted_bytes = state.compacted_bytes;
    END IF;
    done.compacted := state.compacted;
    RETURN done;
END $$;

-- Forgets which versions sessions had that were removed long ago. Returns how many it forgot.
CREATE FUNCTION forget_removed(age interval, most bigint) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    forgotten bigint;
BEGIN
    DELETE FROM removed_sessions
    WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM removed_sessions
        WHERE removed_at < now() - age ORDER BY removed_at LIMIT most FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS forgotten = ROW_COUNT;
    RETURN forgotten;
END $$;
