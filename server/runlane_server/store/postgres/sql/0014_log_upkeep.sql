-- The upkeep of a log whose first events are removed all the time: nothing walks the rows that were
-- removed and not vacuumed yet, however long another transaction keeps them.

-- No event has a position up to emptied.
ALTER TABLE store ADD COLUMN emptied bigint NOT NULL DEFAULT 0;

-- See 0007_tenant_logs.sql. It finds each tenant by its last event: the first ones may have been
-- removed.
CREATE OR REPLACE FUNCTION log_sizes(
    OUT tenant text, OUT compacted bigint, OUT head_bytes bigint, OUT bytes bigint
) RETURNS SETOF record LANGUAGE sql STABLE AS $$
    WITH RECURSIVE names (name) AS (
        (SELECT events.tenant FROM events ORDER BY events.tenant DESC, events.position DESC LIMIT 1)
        UNION ALL
        SELECT (
            SELECT events.tenant FROM events
            WHERE events.tenant < names.name
            ORDER BY events.tenant DESC, events.position DESC LIMIT 1
        )
        FROM names WHERE names.name IS NOT NULL
    )
    SELECT
        name, coalesce(tenant_logs.compacted, 0), last.log_bytes,
        last.log_bytes - coalesce(tenant_logs.compacted_bytes, 0)
    FROM names LEFT JOIN tenant_logs ON tenant_logs.tenant = names.name CROSS JOIN LATERAL (
        SELECT events.log_bytes FROM events WHERE events.tenant = names.name
        ORDER BY events.tenant DESC, events.position DESC LIMIT 1
    ) AS last
    WHERE name IS NOT NULL
$$;

-- See 0007_tenant_logs.sql.
CREATE OR REPLACE FUNCTION append_to_log(new_events new_event[]) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    sizes bigint[];
    head bigint;
BEGIN
    sizes := ARRAY(
        SELECT ended.bytes + coalesce(own.bytes, 0)
        FROM unnest(new_events) WITH ORDINALITY AS ended
            CROSS JOIN LATERAL (
                SELECT sum(100 + coalesce(octet_length(run_events.body), 0))::bigint AS bytes
                FROM run_events
                WHERE run_events.tenant = ended.tenant AND run_events.run_id = ended.run_id
            ) AS own
        ORDER BY ordinality
    );
    PERFORM pg_advisory_xact_lock('events'::regclass::oid::bigint);
    -- A statement of its own, to see what was committed by whoever had the lock.
    SELECT greatest(store.compacted, last.position) INTO head
    FROM store LEFT JOIN LATERAL (
        SELECT events.position FROM events WHERE events.position > store.compacted
        ORDER BY events.position DESC LIMIT 1
    ) AS last ON true;
    INSERT INTO events (position, ended_at, log_bytes, tenant, session_id, run_id, body)
    SELECT
        head + ordinality, ended_at,
        before.bytes + sum(size) OVER (PARTITION BY tenant ORDER BY ordinality), tenant, session_id,
        run_id, body
    FROM ROWS FROM (unnest(new_events), unnest(sizes)) WITH ORDINALITY
        AS ended (ended_at, bytes, tenant, session_id, run_id, body, size, ordinality)
        CROSS JOIN LATERAL (
            SELECT coalesce(
                (
                    SELECT events.log_bytes FROM events WHERE events.tenant = ended.tenant
                    ORDER BY events.tenant DESC, events.position DESC LIMIT 1
                ),
                (SELECT compacted_bytes FROM tenant_logs WHERE tenant_logs.tenant = ended.tenant),
                0
            ) AS bytes
        ) AS before;
    RETURN head + 1;
END $$;

-- See 0007_tenant_logs.sql.
CREATE OR REPLACE FUNCTION compact(
    before bigint, most_events bigint, largest_log bigint, most_rows bigint, most_bytes bigint
) RETURNS compaction LANGUAGE plpgsql AS $$
DECLARE
    state store;
    event record;
    trimmed record;
    removed bigint[] := '{}';
    rows bigint := 0;
    bytes bigint := 0;
    done compaction := ROW(0, NULL, false);
BEGIN
    -- Two nodes that compact take turns.
    SELECT * INTO state FROM store FOR UPDATE;
    FOR event IN
        SELECT
            position, every.tenant, run_id,
            log_bytes - lag(log_bytes, 1, coalesce(tenant_logs.compacted_bytes, 0))
                OVER (PARTITION BY every.tenant ORDER BY position) AS size
        FROM (
            SELECT position, tenant, run_id, log_bytes FROM (
                SELECT
                    position, tenant, run_id, log_bytes,
                    bool_and(ended_at < before) OVER (ORDER BY position) AS old
                FROM (
                    SELECT position, tenant, run_id, log_bytes, ended_at FROM events
                    WHERE position > state.emptied ORDER BY position LIMIT most_events
                ) AS first
            ) AS oldest
            WHERE old
            UNION
            SELECT own.position, large.tenant, own.run_id, own.log_bytes
            FROM log_sizes() AS large CROSS JOIN LATERAL (
                SELECT
                    events.position, events.run_id, events.log_bytes,
                    large.head_bytes - lag(events.log_bytes, 1, large.head_bytes - large.bytes)
                        OVER (ORDER BY events.tenant, events.position) AS rest
                FROM events
                WHERE events.tenant = large.tenant AND events.position > large.compacted
                ORDER BY events.tenant, events.position LIMIT most_events
            ) AS own
            WHERE largest_log IS NOT NULL AND large.bytes > largest_log AND own.rest > largest_log
        ) AS every LEFT JOIN tenant_logs ON tenant_logs.tenant = every.tenant
        ORDER BY position LIMIT most_events
    LOOP
        done.more := rows >= most_rows OR bytes >= most_bytes;
        EXIT WHEN done.more;
        trimmed := trim_run(
            event.tenant, event.run_id, event.position, most_rows - rows, most_bytes - bytes
        );
        rows := rows + trimmed.removed + 1;
        done.more := NOT trimmed.complete;
        EXIT WHEN done.more;
        bytes := bytes + event.size;
        removed := removed || event.position;
        state.compacted := greatest(state.compacted, event.position);
        done.events := done.events + 1;
    END LOOP;
    IF done.events > 0 THEN
        -- Once for each tenant, as the old versions of its row remain for a while.
        INSERT INTO tenant_logs
        SELECT tenant, max(position), max(log_bytes) FROM events
        WHERE position = ANY (removed) GROUP BY tenant ORDER BY tenant
        ON CONFLICT (tenant) DO UPDATE SET
            compacted = excluded.compacted, compacted_bytes = excluded.compacted_bytes;
        DELETE FROM events WHERE position = ANY (removed);
        -- No event that is not visible yet comes before one that is.
        UPDATE store SET
            compacted = state.compacted,
            emptied = coalesce(
                (
                    SELECT events.position - 1 FROM events WHERE events.position > state.emptied
                    ORDER BY events.position LIMIT 1
                ),
                state.compacted
            );
    END IF;
    done.compacted := state.compacted;
    RETURN done;
END $$;

-- Rows that are updated several times in their life have room for it on their page. Tables from which
-- much is removed are vacuumed after a hundredth of their rows has changed, not a fifth.
ALTER TABLE nodes SET (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 100);

ALTER TABLE store SET (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 100);

ALTER TABLE tenant_logs SET (fillfactor = 50);

ALTER TABLE sessions SET (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05);

ALTER TABLE runs SET (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05);

ALTER TABLE webhooks SET (fillfactor = 80);

ALTER TABLE events SET (
    autovacuum_vacuum_scale_factor = 0.01, autovacuum_analyze_scale_factor = 0.02,
    autovacuum_vacuum_insert_scale_factor = 0.05
);

ALTER TABLE run_events SET (
    autovacuum_vacuum_scale_factor = 0.01, autovacuum_analyze_scale_factor = 0.02,
    autovacuum_vacuum_insert_scale_factor = 0.05
);
