-- Runs whose session was deleted: a repeated request must not execute them again. events is their
-- number; deleted_at is the time of this file's server.

CREATE TABLE deleted_runs (
    tenant             TEXT NOT NULL,
    run_id             TEXT NOT NULL,
    session_id         TEXT NOT NULL,
    prompt_fingerprint TEXT NOT NULL,
    events             INTEGER NOT NULL,
    deleted_at         INTEGER NOT NULL,
    PRIMARY KEY (tenant, run_id)
) WITHOUT ROWID;

CREATE INDEX deleted_runs_by_age ON deleted_runs (deleted_at);
