-- Where in a trace the caller of a run was; NULL without one.

ALTER TABLE runs ADD COLUMN trace text;

ALTER TYPE new_run ADD ATTRIBUTE trace text;

-- Writes runs and what belongs to them. An error of it refuses the whole flush.
CREATE OR REPLACE FUNCTION write_runs(
    new_runs new_run[], changed_runs changed_run[], new_prompts new_prompt[],
    new_attachments new_attachment[], new_messages new_message[], new_run_events new_run_event[]
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    written bigint;
BEGIN
    IF cardinality(new_runs) > 0 THEN
        INSERT INTO runs (
            run_no, accept_seq, rank, turn, timeout, accepted_at, started_at, ended_at,
            max_attempts, attempt, attachments, tenant, run_id, session_id, state, host, when_busy,
            folded_into, cancel_reason, finish_reason, error_reason, error_message, message_id,
            usage, metadata, prompt_fingerprint, prompt_head, trace
        )
        OVERRIDING SYSTEM VALUE
        SELECT
            run_no, accept_seq, rank, turn, timeout, accepted_at, started_at, ended_at,
            max_attempts, attempt, attachments, tenant, run_id, session_id, state, host, when_busy,
            folded_into, cancel_reason, finish_reason, error_reason, error_message, message_id,
            usage, metadata, prompt_fingerprint, prompt_head, trace
        FROM (
            SELECT nextval(pg_get_serial_sequence('runs', 'run_no')) AS run_no, run.*
            FROM unnest(new_runs) WITH ORDINALITY AS run ORDER BY ordinality
        ) AS made
        ORDER BY tenant, run_id;
    END IF;
    IF cardinality(changed_runs) > 0 THEN
        UPDATE runs SET
            rank = changed.rank,
            turn = changed.turn,
            started_at = changed.started_at,
            ended_at = changed.ended_at,
            attempt = changed.attempt,
            state = changed.state,
            host = changed.host,
            folded_into = changed.folded_into,
            cancel_reason = changed.cancel_reason,
            finish_reason = changed.finish_reason,
            error_reason = changed.error_reason,
            error_message = changed.error_message,
            message_id = changed.message_id,
            usage = changed.usage
        FROM unnest(changed_runs) AS changed
        WHERE runs.tenant = changed.tenant AND runs.run_id = changed.run_id
            AND runs.session_id = changed.session_id AND runs.ended_at IS NULL;
        GET DIAGNOSTICS written = ROW_COUNT;
        IF written <> cardinality(changed_runs) THEN
            RAISE integrity_constraint_violation
            USING MESSAGE = 'a run is not what the transition was made from';
        END IF;
    END IF;
    IF cardinality(new_prompts) > 0 THEN
        INSERT INTO prompts (tenant, run_id, rest)
        SELECT tenant, run_id, rest FROM unnest(new_prompts);
    END IF;
    IF cardinality(new_attachments) > 0 THEN
        INSERT INTO attachments (tenant, run_id, n, is_text, name, mime_type, content)
        SELECT tenant, run_id, n, is_text, name, mime_type, content FROM unnest(new_attachments);
    END IF;
    IF cardinality(new_messages) > 0 THEN
        INSERT INTO messages (
            turn, ordinal, created_at, tenant, session_id, message_id, run_id, role, finish_reason,
            model, parts
        )
        SELECT
            turn, ordinal, created_at, tenant, session_id, message_id, run_id, role, finish_reason,
            model, parts
        FROM unnest(new_messages);
    END IF;
    IF cardinality(new_run_events) > 0 THEN
        INSERT INTO run_events (idx, at, tenant, run_id, kind, body)
        SELECT idx, at, tenant, run_id, kind, body FROM unnest(new_run_events);
    END IF;
END $$;
