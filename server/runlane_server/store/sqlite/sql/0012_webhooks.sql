-- Webhooks, and the places of input requests in the event log.

-- settings, secrets and progress are JSON (store/webhooks.py).
CREATE TABLE webhooks (
    webhook_no INTEGER PRIMARY KEY,
    tenant     TEXT NOT NULL,
    webhook_id TEXT NOT NULL,
    enabled    INTEGER NOT NULL,
    revision   INTEGER NOT NULL,
    fence      INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    settings   TEXT NOT NULL,
    secrets    TEXT NOT NULL,
    progress   TEXT NOT NULL,
    UNIQUE (tenant, webhook_id)
);

CREATE INDEX webhooks_by_tenant ON webhooks (tenant, webhook_no);

-- The terminal event before the request, and its number among the requests after that event. NULL
-- for requests from before there were webhooks, which none delivers. The pair never repeats: a
-- request is deleted with its session, and its run ends before that, with a terminal event.
ALTER TABLE input_requests ADD COLUMN log_position INTEGER;
ALTER TABLE input_requests ADD COLUMN log_number INTEGER;

CREATE UNIQUE INDEX input_requests_in_log ON input_requests (log_position, log_number);

CREATE INDEX input_requests_of_tenant_in_log
ON input_requests (tenant, log_position, log_number);

CREATE INDEX input_requests_of_session_in_log
ON input_requests (tenant, session_id, log_position, log_number);
