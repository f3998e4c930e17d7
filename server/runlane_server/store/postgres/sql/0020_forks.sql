-- Forks: sessions that begin with a copy of the transcript of another one, their origin. A copy belongs
-- to its fork alone, so that either session can be deleted.

ALTER TABLE sessions ADD COLUMN origin_turn bigint;

ALTER TABLE sessions ADD COLUMN copy_id bigint;

ALTER TABLE sessions ADD COLUMN origin_id text COLLATE "C";

CREATE UNIQUE INDEX sessions_by_copy ON sessions (copy_id) WHERE copy_id IS NOT NULL;

-- prompt: the text of a user message, as the run that it was the prompt of belongs to another session;
-- attachments: how many it has.
CREATE TABLE copied_messages (
    copy_id       bigint NOT NULL,
    turn          bigint NOT NULL,
    ordinal       bigint NOT NULL,
    created_at    bigint NOT NULL,
    attachments   bigint,
    message_id    text   NOT NULL,
    run_id        text COLLATE "C" NOT NULL,
    role          text   NOT NULL,
    finish_reason text,
    model         text   NOT NULL,
    parts         text,
    prompt        text,
    CONSTRAINT copied_messages_key PRIMARY KEY (copy_id, turn, ordinal)
);

CREATE INDEX copied_messages_by_run ON copied_messages (copy_id, run_id, turn, ordinal);

CREATE TABLE copied_attachments (
    copy_id   bigint  NOT NULL,
    turn      bigint  NOT NULL,
    ordinal   bigint  NOT NULL,
    n         bigint  NOT NULL,
    is_text   boolean NOT NULL,
    name      text    NOT NULL,
    mime_type text    NOT NULL,
    content   bytea   NOT NULL,
    CONSTRAINT copied_attachments_key PRIMARY KEY (copy_id, turn, ordinal, n)
);

CREATE TABLE copied_parts (
    copy_id bigint NOT NULL,
    attempt bigint NOT NULL,
    n       bigint NOT NULL,
    run_id  text COLLATE "C" NOT NULL,
    part    text   NOT NULL,
    CONSTRAINT copied_parts_key PRIMARY KEY (copy_id, run_id, attempt, n)
);

-- Copies that no session has yet. touched_at is when the last piece was added: a copy that a stopped
-- node left is removed some time after.
CREATE TABLE unfinished_copies (
    copy_id    bigint      PRIMARY KEY,
    touched_at timestamptz NOT NULL DEFAULT now()
);

CREATE FUNCTION remove_copy() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM sessions WHERE copy_id = OLD.copy_id AND copy_id IS NOT NULL) THEN
        RETURN NULL;  -- the copy is finished, and a session has it
    END IF;
    DELETE FROM copied_messages WHERE copy_id = OLD.copy_id;
    DELETE FROM copied_attachments WHERE copy_id = OLD.copy_id;
    DELETE FROM copied_parts WHERE copy_id = OLD.copy_id;
    RETURN NULL;
END $$;

CREATE TRIGGER remove_copy AFTER DELETE ON sessions
FOR EACH ROW WHEN (OLD.copy_id IS NOT NULL) EXECUTE FUNCTION remove_copy();

CREATE TRIGGER remove_unfinished_copy AFTER DELETE ON unfinished_copies
FOR EACH ROW EXECUTE FUNCTION remove_copy();

-- Creates a fork whose copy is whole. Returns the version of its lane, which continues those of a removed
-- session with the same id; 0 if there is a session with this id, -1 if the source or the copy is gone.
CREATE FUNCTION create_fork(
    of_tenant text, source_id text, source_no bigint, copy bigint, last_turn bigint,
    new_id text, new_title text, new_metadata text, new_agent text, bytes bigint, at bigint
) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    made bigint;
BEGIN
    PERFORM FROM sessions
    WHERE tenant = of_tenant AND session_id = source_id AND created_no = source_no FOR KEY SHARE;
    IF FOUND THEN
        PERFORM FROM unfinished_copies WHERE copy_id = copy FOR UPDATE;
    END IF;
    IF NOT FOUND THEN
        -- It is repeated if the connection was lost after the commit: then the fork has the copy.
        SELECT version INTO made FROM sessions
        WHERE tenant = of_tenant AND session_id = new_id AND copy_id = copy;
        RETURN coalesce(made, -1);
    END IF;
    INSERT INTO sessions (
        version, accept_seq, turn, waiting_runs, stored_bytes, created_at, updated_at, origin_turn,
        copy_id, tenant, session_id, active_run_id, title, metadata, agent, origin_id
    ) VALUES (
        1 + coalesce((
            SELECT version FROM removed_sessions WHERE tenant = of_tenant AND session_id = new_id
        ), 0),
        0, last_turn, 0, bytes, at, at, last_turn,
        copy, of_tenant, new_id, '', new_title, new_metadata, new_agent, source_id
    )
    ON CONFLICT ON CONSTRAINT sessions_key DO NOTHING
    RETURNING version INTO made;
    IF made IS NULL THEN
        RETURN 0;
    END IF;
    DELETE FROM unfinished_copies WHERE copy_id = copy;
    RETURN made;
END $$;
