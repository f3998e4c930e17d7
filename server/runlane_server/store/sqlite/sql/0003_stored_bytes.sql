-- How much of a session is stored until it is deleted: so many bytes for each run and each message,
-- and what they say (store/weight.py has the same numbers). It is kept with the lane, which each
-- commit writes anyway.

ALTER TABLE sessions ADD COLUMN stored_bytes INTEGER NOT NULL DEFAULT 0;

UPDATE sessions SET stored_bytes = (
    SELECT coalesce(sum(
        500 + length(CAST(prompt_head AS BLOB)) + coalesce((
            SELECT length(CAST(rest AS BLOB)) FROM prompts
            WHERE prompts.tenant = runs.tenant AND prompts.run_id = runs.run_id
        ), 0) + CASE WHEN attachments = 0 THEN 0 ELSE (
            SELECT sum(length(CAST(content AS BLOB))) FROM attachments
            WHERE attachments.tenant = runs.tenant AND attachments.run_id = runs.run_id
        ) END
    ), 0)
    FROM runs
    WHERE runs.tenant = sessions.tenant AND runs.session_id = sessions.session_id
) + (
    SELECT coalesce(sum(200 + coalesce(length(CAST(parts AS BLOB)), 0)), 0)
    FROM messages
    WHERE messages.tenant = sessions.tenant AND messages.session_id = sessions.session_id
);
