-- What retention has to know without looking at everything.

-- log_bytes is about how large the log was with this event: its own size and all before it, with the
-- events of their runs, counted from the first one ever. The difference of two is the size of what
-- lies between; compacted_bytes is that of the last event which was removed. It stands before body,
-- so that it is read without walking through that.
CREATE TABLE sized_events (
    position   INTEGER PRIMARY KEY,
    tenant     TEXT NOT NULL,
    session_id TEXT NOT NULL,
    run_id     TEXT NOT NULL,
    ended_at   INTEGER NOT NULL,
    log_bytes  INTEGER NOT NULL,
    body       TEXT NOT NULL
);

INSERT INTO sized_events (position, tenant, session_id, run_id, ended_at, log_bytes, body)
SELECT
    position, tenant, session_id, run_id, ended_at,
    sum(500 + length(CAST(body AS BLOB)) + (
        SELECT coalesce(sum(100 + coalesce(length(CAST(run_events.body AS BLOB)), 0)), 0)
        FROM run_events
        WHERE run_events.tenant = events.tenant AND run_events.run_id = events.run_id
    )) OVER (ORDER BY position),
    body
FROM events;

DROP TABLE events;

ALTER TABLE sized_events RENAME TO events;

CREATE INDEX events_by_session ON events (tenant, session_id, position);

CREATE INDEX events_by_run ON events (tenant, run_id, position);

INSERT INTO meta (name, value) VALUES ('compacted_bytes', 0);

-- With its terminal event a run loses its own events but the last.
DELETE FROM run_events
WHERE kind <> 'run_complete'
    AND EXISTS (
        SELECT 1 FROM runs
        WHERE runs.tenant = run_events.tenant AND runs.run_id = run_events.run_id
            AND ended_at IS NOT NULL
    )
    AND NOT EXISTS (
        SELECT 1 FROM events
        WHERE events.tenant = run_events.tenant AND events.run_id = run_events.run_id
    );

-- Sessions without work, the longest untouched first.
CREATE INDEX sessions_idle ON sessions (updated_at) WHERE active_run_id = '' AND waiting_runs = 0;
