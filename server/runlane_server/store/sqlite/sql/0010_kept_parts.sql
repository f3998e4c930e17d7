-- Parts of long messages that were stored before the message, while its run was active.
CREATE TABLE kept_parts (
    tenant   TEXT NOT NULL,
    run_id   TEXT NOT NULL,
    attempt  INTEGER NOT NULL,
    n        INTEGER NOT NULL,
    part     TEXT NOT NULL,
    PRIMARY KEY (tenant, run_id, attempt, n)
);
