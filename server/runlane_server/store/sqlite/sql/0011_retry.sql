-- The retry policy of a run, and where its retries stand, as JSON (see codec.encode_retry). NULL for most.

ALTER TABLE runs ADD COLUMN retry TEXT;
