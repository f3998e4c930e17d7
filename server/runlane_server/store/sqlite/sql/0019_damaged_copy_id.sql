-- A damaged number of a copy names none, and must not keep its session from being deleted.
DROP TRIGGER delete_copy;

CREATE TRIGGER delete_copy AFTER DELETE ON sessions WHEN typeof(OLD.copy_id) = 'integer'
BEGIN
    INSERT OR IGNORE INTO dropped_copies (copy_id) VALUES (OLD.copy_id);
END;
