-- Sessions that were deleted, and whose rows are removed piece by piece (sqlite/removal.py). For callers
-- they do not exist; their ids are free when the last row is gone.
CREATE TABLE removals (
    removal_no INTEGER PRIMARY KEY,
    tenant     TEXT NOT NULL,
    session_id TEXT NOT NULL,
    UNIQUE (tenant, session_id)
);

CREATE TRIGGER hold_removed_id BEFORE INSERT ON sessions WHEN EXISTS (
    SELECT 1 FROM removals WHERE tenant = NEW.tenant AND session_id = NEW.session_id
)
BEGIN
    SELECT RAISE(ABORT, 'the last session with this id is being removed');
END;

-- Copies of transcripts that no session has any more, removed in the same way.
CREATE TABLE dropped_copies (copy_id INTEGER PRIMARY KEY);

DROP TRIGGER delete_copy;

DROP TRIGGER delete_unfinished_copy;

CREATE TRIGGER delete_copy AFTER DELETE ON sessions WHEN OLD.copy_id IS NOT NULL
BEGIN
    INSERT OR IGNORE INTO dropped_copies (copy_id) VALUES (OLD.copy_id);
END;

CREATE TRIGGER delete_unfinished_copy AFTER DELETE ON unfinished_copies
WHEN NOT EXISTS (SELECT 1 FROM sessions WHERE copy_id = OLD.copy_id)
BEGIN
    INSERT OR IGNORE INTO dropped_copies (copy_id) VALUES (OLD.copy_id);
END;
