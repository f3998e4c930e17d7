-- The updates of a run while it waited: their number, and the digest of the last one. NULL for most.

ALTER TABLE runs ADD COLUMN revision INTEGER NOT NULL DEFAULT 0;

ALTER TABLE runs ADD COLUMN last_update TEXT;
