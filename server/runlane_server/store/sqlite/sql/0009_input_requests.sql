-- Questions of agents to people, and their answers.

-- asking is JSON: what the lane knows of the requests of a run. NULL without any.
ALTER TABLE runs ADD COLUMN asking TEXT;

-- The row is written twice: with the question, and at the end of the request with its answer.
CREATE TABLE input_requests (
    request_no       INTEGER PRIMARY KEY,
    tenant           TEXT NOT NULL,
    input_request_id TEXT NOT NULL,
    session_id       TEXT NOT NULL,
    run_id           TEXT NOT NULL,
    key              TEXT NOT NULL,
    state            TEXT NOT NULL,
    requested_at     INTEGER NOT NULL,
    expires_at       INTEGER,
    closed_at        INTEGER,
    question         TEXT NOT NULL,
    answer           TEXT,
    UNIQUE (tenant, input_request_id)
);

CREATE INDEX input_requests_by_tenant ON input_requests (tenant, request_no);

CREATE INDEX input_requests_by_session ON input_requests (tenant, session_id, request_no);

CREATE INDEX input_requests_by_run ON input_requests (tenant, run_id, request_no);

CREATE INDEX input_requests_open ON input_requests (tenant, request_no) WHERE state = 'open';

CREATE INDEX input_requests_due ON input_requests (expires_at)
WHERE state = 'open' AND expires_at IS NOT NULL;
