-- The event log is compacted by tenant, so that the events of one never remove those of another.

-- compacted: the position up to which the events of the tenant were removed. compacted_bytes is the
-- log_bytes of the last of them. The row of the tenant '' holds for all tenants: up to there the log
-- was removed before each tenant had a row. The row 'compacted' of meta is the greatest of all.
CREATE TABLE tenant_logs (
    tenant          TEXT PRIMARY KEY,
    compacted       INTEGER NOT NULL,
    compacted_bytes INTEGER NOT NULL
) WITHOUT ROWID;

INSERT INTO tenant_logs (tenant, compacted, compacted_bytes)
SELECT '', value, 0 FROM meta WHERE name = 'compacted' AND value > 0;

-- log_bytes counts the events of one tenant now.
UPDATE events SET log_bytes = own.bytes
FROM (
    SELECT position, sum(size) OVER (PARTITION BY tenant ORDER BY position) AS bytes
    FROM (
        SELECT
            position, tenant,
            log_bytes - lag(
                log_bytes, 1, (SELECT value FROM meta WHERE name = 'compacted_bytes')
            ) OVER (ORDER BY position) AS size
        FROM events
    )
) AS own
WHERE own.position = events.position;

DELETE FROM meta WHERE name = 'compacted_bytes';
