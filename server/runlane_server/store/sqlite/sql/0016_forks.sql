-- Forks: sessions that begin with a copy of the transcript of another one, their origin. A copy belongs
-- to its fork alone, so that either session can be deleted.

ALTER TABLE sessions ADD COLUMN origin_id TEXT;

ALTER TABLE sessions ADD COLUMN origin_turn INTEGER;

ALTER TABLE sessions ADD COLUMN copy_id INTEGER;

-- prompt: the text of a user message, as the run that it was the prompt of belongs to another session;
-- attachments: how many it has.
CREATE TABLE copied_messages (
    copy_id       INTEGER NOT NULL,
    turn          INTEGER NOT NULL,
    ordinal       INTEGER NOT NULL,
    message_id    TEXT NOT NULL,
    run_id        TEXT NOT NULL,
    role          TEXT NOT NULL,
    finish_reason TEXT,
    model         TEXT NOT NULL,
    created_at    INTEGER NOT NULL,
    parts         TEXT,
    prompt        TEXT,
    attachments   INTEGER,
    PRIMARY KEY (copy_id, turn, ordinal)
);

CREATE INDEX copied_messages_by_run ON copied_messages (copy_id, run_id, turn, ordinal);

CREATE TABLE copied_attachments (
    copy_id   INTEGER NOT NULL,
    turn      INTEGER NOT NULL,
    ordinal   INTEGER NOT NULL,
    n         INTEGER NOT NULL,
    name      TEXT NOT NULL,
    mime_type TEXT NOT NULL,
    content   NOT NULL,
    PRIMARY KEY (copy_id, turn, ordinal, n)
);

CREATE TABLE copied_parts (
    copy_id INTEGER NOT NULL,
    run_id  TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    n       INTEGER NOT NULL,
    part    TEXT NOT NULL,
    PRIMARY KEY (copy_id, run_id, attempt, n)
);

-- Copies that no session has yet. What a stopped server leaves here is removed at the next start.
CREATE TABLE unfinished_copies (copy_id INTEGER PRIMARY KEY);

CREATE TRIGGER delete_copy AFTER DELETE ON sessions WHEN OLD.copy_id IS NOT NULL
BEGIN
    DELETE FROM copied_messages WHERE copy_id = OLD.copy_id;
    DELETE FROM copied_attachments WHERE copy_id = OLD.copy_id;
    DELETE FROM copied_parts WHERE copy_id = OLD.copy_id;
END;

CREATE TRIGGER delete_unfinished_copy AFTER DELETE ON unfinished_copies
WHEN NOT EXISTS (SELECT 1 FROM sessions WHERE copy_id = OLD.copy_id)
BEGIN
    DELETE FROM copied_messages WHERE copy_id = OLD.copy_id;
    DELETE FROM copied_attachments WHERE copy_id = OLD.copy_id;
    DELETE FROM copied_parts WHERE copy_id = OLD.copy_id;
END;

CREATE UNIQUE INDEX sessions_by_copy ON sessions (copy_id) WHERE copy_id IS NOT NULL;
