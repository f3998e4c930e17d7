-- The event log is compacted by tenant, so that the events of one never remove those of another.

-- compacted: the position up to which the events of the tenant were removed. compacted_bytes is the
-- log_bytes of the last of them. The row of the tenant '' holds for all tenants: up to there the log
-- was removed before each tenant had a row. The column compacted of store is the greatest of all.
CREATE TABLE tenant_logs (
    tenant          text COLLATE "C" PRIMARY KEY,
    compacted       bigint NOT NULL,
    compacted_bytes bigint NOT NULL
);

INSERT INTO tenant_logs (tenant, compacted, compacted_bytes)
SELECT '', compacted, 0 FROM store WHERE compacted > 0;

-- log_bytes counts the events of one tenant now.
UPDATE events SET log_bytes = own.bytes
FROM (
    SELECT position, sum(size) OVER (PARTITION BY tenant ORDER BY position) AS bytes
    FROM (
        SELECT
            position, tenant,
            log_bytes - lag(log_bytes, 1, (SELECT compacted_bytes FROM store))
                OVER (ORDER BY position) AS size
        FROM events
    ) AS sized
) AS own
WHERE own.position = events.position;

ALTER TABLE store DROP COLUMN compacted_bytes;

-- The size of each tenant's log. One seek for each tenant and one for its last event.
CREATE FUNCTION log_sizes(
    OUT tenant text, OUT compacted bigint, OUT head_bytes bigint, OUT bytes bigint
) RETURNS SETOF record LANGUAGE sql STABLE AS $$
    WITH RECURSIVE names (name) AS (
        (SELECT events.tenant FROM events ORDER BY events.tenant LIMIT 1)
        UNION ALL
        SELECT (
            SELECT events.tenant FROM events
            WHERE events.tenant > names.name ORDER BY events.tenant LIMIT 1
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

-- See 0002_commit.sql. The last event may have been removed while an earlier one of another tenant
-- remains, so that the next position follows both.
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
    SELECT greatest(store.compacted, (SELECT max(events.position) FROM events))
    INTO head FROM store;
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

DROP FUNCTION compact(bigint, bigint, bigint, bigint, bigint);

-- Removes terminal events, up to most_events: the oldest ones of all as long as they ended before,
-- and the oldest ones of each tenant whose log has more than largest_log bytes (NULL: whatever it
-- has). more: it stopped as it had most_rows or most_bytes, which is enough for one transaction.
CREATE FUNCTION compact(
    before bigint, most_events bigint, largest_log bigint, most_rows bigint, most_bytes bigint
) RETURNS compaction LANGUAGE plpgsql AS $$
DECLARE
    state store;
    event record;
    trimmed record;
    rows bigint := 0;
    bytes bigint := 0;
    done compaction := ROW(0, NULL, false);
BEGIN
    -- Two nodes that compact take turns.
    SELECT * INTO state FROM store FOR UPDATE;
    FOR event IN
        SELECT position, tenant, run_id, log_bytes FROM (
            SELECT
                position, tenant, run_id, log_bytes,
                bool_and(ended_at < before) OVER (ORDER BY position) AS old
            FROM (
                SELECT position, tenant, run_id, log_bytes, ended_at FROM events
                ORDER BY position LIMIT most_events
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
        WHERE large.bytes > largest_log AND own.rest > largest_log
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
        bytes := bytes + event.log_bytes - coalesce(
            (SELECT compacted_bytes FROM tenant_logs WHERE tenant_logs.tenant = event.tenant), 0
        );
        INSERT INTO tenant_logs VALUES (event.tenant, event.position, event.log_bytes)
        ON CONFLICT (tenant) DO UPDATE SET
            compacted = excluded.compacted, compacted_bytes = excluded.compacted_bytes;
        DELETE FROM events WHERE position = event.position;
        state.compacted := greatest(state.compacted, event.position);
        done.events := done.events + 1;
    END LOOP;
    IF done.events > 0 THEN
        UPDATE store SET compacted = state.compacted;
    END IF;
    done.compacted := state.compacted;
    RETURN done;
END $$;
