-- Parts of long messages that were stored before the message, while its run was active.
CREATE TABLE kept_parts (
    tenant   text COLLATE "C" NOT NULL,
    run_id   text COLLATE "C" NOT NULL,
    attempt  bigint NOT NULL,
    n        bigint NOT NULL,
    part     text NOT NULL,
    PRIMARY KEY (tenant, run_id, attempt, n),
    FOREIGN KEY (tenant, run_id) REFERENCES runs ON DELETE CASCADE
);

-- A row of it as it is read.
CREATE TYPE kept_part AS (attempt bigint, n bigint, part text);
