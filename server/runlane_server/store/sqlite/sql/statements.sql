-- All statements of a serving store, by name. Statements that are executed for each run have `?` in
-- place of names, because the lookup of names costs more than the binding; sqlite/rows.py makes the
-- rows in this order.

-- Writing: sessions

-- name: create_session
INSERT INTO sessions (
    tenant, session_id, version, accept_seq, turn, active_run_id, waiting_runs,
    title, metadata, agent, stored_bytes, created_at, updated_at
) VALUES (?, ?, 1, 0, 0, '', 0, ?, ?, ?, ?, ?, ?);

-- name: insert_session
INSERT INTO sessions (
    version, accept_seq, turn, active_run_id, waiting_runs,
    input_tokens, output_tokens, cache_read_tokens, cache_write_tokens, requests,
    stored_bytes, updated_at, created_at, tenant, session_id, title
) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, '');

-- name: update_session
-- A count stays at the largest number that fits, as in core/model.py.
UPDATE sessions SET
    version = ?,
    accept_seq = ?,
    turn = ?,
    active_run_id = ?,
    waiting_runs = ?,
    input_tokens = input_tokens + min(?, 9223372036854775807 - input_tokens),
    output_tokens = output_tokens + min(?, 9223372036854775807 - output_tokens),
    cache_read_tokens = cache_read_tokens + min(?, 9223372036854775807 - cache_read_tokens),
    cache_write_tokens = cache_write_tokens + min(?, 9223372036854775807 - cache_write_tokens),
    requests = requests + min(?, 9223372036854775807 - requests),
    stored_bytes = stored_bytes + ?,
    updated_at = max(updated_at, ?)
WHERE tenant = ? AND session_id = ? AND version = ?;

-- name: edit_session
UPDATE sessions SET
    version = ?,
    title = ?,
    metadata = ?,
    agent = ?,
    stored_bytes = stored_bytes + ?,
    updated_at = max(updated_at, ?)
WHERE tenant = ? AND session_id = ? AND version = ?
    AND title = ? AND metadata IS ? AND agent = ?;

-- name: start_copy
INSERT INTO unfinished_copies (copy_id) VALUES (?);

-- name: copy_messages
-- A piece of the session's own messages.
INSERT INTO copied_messages (
    copy_id, turn, ordinal, message_id, run_id, role, finish_reason, model, created_at, parts,
    prompt, attachments
)
WITH piece (copy_id, tenant, session_id, turn, ordinal, last_turn, last_ordinal) AS (
    VALUES (?, ?, ?, ?, ?, ?, ?)
)
SELECT
    piece.copy_id, messages.turn, messages.ordinal, messages.message_id, messages.run_id, role,
    messages.finish_reason, model, created_at, parts, prompt_head || coalesce(rest, ''), attachments
FROM piece CROSS JOIN messages
    ON messages.tenant = piece.tenant AND messages.session_id = piece.session_id
        AND (messages.turn, messages.ordinal) > (piece.turn, piece.ordinal)
        AND (messages.turn, messages.ordinal) <= (last_turn, last_ordinal)
        AND typeof(messages.turn) = 'integer' AND typeof(messages.ordinal) = 'integer'
    LEFT JOIN runs
        ON role = 'user' AND runs.tenant = piece.tenant AND runs.run_id = messages.run_id
    LEFT JOIN prompts
        ON role = 'user' AND prompts.tenant = piece.tenant AND prompts.run_id = messages.run_id;

-- name: copy_attachments
INSERT INTO copied_attachments (copy_id, turn, ordinal, n, name, mime_type, content)
WITH piece (copy_id, tenant, session_id, turn, ordinal, last_turn, last_ordinal) AS (
    VALUES (?, ?, ?, ?, ?, ?, ?)
)
SELECT piece.copy_id, messages.turn, messages.ordinal, n, name, mime_type, content
FROM piece CROSS JOIN messages
    ON messages.tenant = piece.tenant AND messages.session_id = piece.session_id
        AND (messages.turn, messages.ordinal) > (piece.turn, piece.ordinal)
        AND (messages.turn, messages.ordinal) <= (last_turn, last_ordinal)
        AND role = 'user'
    CROSS JOIN attachments
        ON attachments.tenant = piece.tenant AND attachments.run_id = messages.run_id;

-- name: copy_parts
INSERT INTO copied_parts (copy_id, run_id, attempt, n, part)
SELECT ?, run_id, attempt, n, part FROM kept_parts
WHERE tenant = ? AND run_id = ? AND attempt = ? AND n BETWEEN ? AND ?;

-- name: copy_copied_messages
-- The same of messages that are a copy.
INSERT INTO copied_messages (
    copy_id, turn, ordinal, message_id, run_id, role, finish_reason, model, created_at, parts,
    prompt, attachments
)
WITH piece (copy_id, source_id, turn, ordinal, last_turn, last_ordinal) AS (
    VALUES (?, ?, ?, ?, ?, ?)
)
SELECT
    piece.copy_id, source.turn, source.ordinal, message_id, run_id, role, finish_reason, model,
    created_at, parts, prompt, attachments
FROM piece CROSS JOIN copied_messages AS source
    ON source.copy_id = piece.source_id
        AND (source.turn, source.ordinal) > (piece.turn, piece.ordinal)
        AND (source.turn, source.ordinal) <= (last_turn, last_ordinal);

-- name: copy_copied_attachments
INSERT INTO copied_attachments (copy_id, turn, ordinal, n, name, mime_type, content)
WITH piece (copy_id, source_id, turn, ordinal, last_turn, last_ordinal) AS (
    VALUES (?, ?, ?, ?, ?, ?)
)
SELECT piece.copy_id, source.turn, source.ordinal, n, name, mime_type, content
FROM piece CROSS JOIN copied_attachments AS source
    ON source.copy_id = piece.source_id
        AND (source.turn, source.ordinal) > (piece.turn, piece.ordinal)
        AND (source.turn, source.ordinal) <= (last_turn, last_ordinal);

-- name: copy_copied_parts
INSERT INTO copied_parts (copy_id, run_id, attempt, n, part)
SELECT ?, run_id, attempt, n, part FROM copied_parts
WHERE copy_id = ? AND run_id = ? AND attempt = ? AND n BETWEEN ? AND ?;

-- name: hold_source
-- Changes no row unless the source of the copy is still there.
UPDATE sessions SET version = version
WHERE tenant = ? AND session_id = ? AND created_no = ? AND created_at = ?;

-- name: create_fork
INSERT INTO sessions (
    tenant, session_id, version, accept_seq, turn, active_run_id, waiting_runs,
    title, metadata, agent, stored_bytes, created_at, updated_at, origin_id, origin_turn, copy_id
) VALUES (?, ?, 1, 0, ?, '', 0, ?, ?, ?, ?, ?, ?, ?, ?, ?);

-- name: drop_copy
-- It drops the copy too, unless a session has it.
DELETE FROM unfinished_copies WHERE copy_id = ?;

-- name: drop_copies
DELETE FROM unfinished_copies;

-- name: delete_session
DELETE FROM sessions WHERE tenant = ? AND session_id = ? AND version = ?;

-- name: discard_session
DELETE FROM sessions WHERE tenant = ? AND session_id = ?;

-- name: begin_removal
INSERT OR IGNORE INTO removals (tenant, session_id) VALUES (?, ?);

-- name: forget_deleted
DELETE FROM deleted_runs WHERE (tenant, run_id) IN (
    SELECT tenant, run_id FROM deleted_runs WHERE deleted_at < ? ORDER BY deleted_at LIMIT ?
);

-- Writing: the removal of deleted sessions, piece by piece (removal.py). Runs are named by their
-- numbers, as JSON: a damaged id cannot be passed on.

-- name: oldest_removal
SELECT removal_no FROM removals ORDER BY removal_no LIMIT 1;

-- name: removal_of
SELECT removal_no FROM removals WHERE tenant = ? AND session_id = ?;

-- name: end_removal
DELETE FROM removals WHERE removal_no = ?;

-- name: runs_of_removal
SELECT run_no, attachments, (
    SELECT length(rest) FROM prompts
    WHERE prompts.tenant = runs.tenant AND prompts.run_id = runs.run_id
) AS size FROM removals CROSS JOIN runs INDEXED BY runs_by_session
    ON runs.tenant = removals.tenant AND runs.session_id = removals.session_id
WHERE removal_no = ? ORDER BY run_no LIMIT ?;

-- name: open_runs_of_removal
SELECT run_no, attachments FROM removals CROSS JOIN runs INDEXED BY runs_open
    ON runs.tenant = removals.tenant AND runs.session_id = removals.session_id
        AND ended_at IS NULL
WHERE removal_no = ?;

-- name: messages_of_removal
SELECT messages.rowid, length(parts) AS size FROM removals CROSS JOIN messages
    ON messages.tenant = removals.tenant AND messages.session_id = removals.session_id
WHERE removal_no = ? LIMIT ?;

-- name: remove_messages
DELETE FROM messages WHERE rowid IN (SELECT value FROM json_each(?));

-- name: remove_lane_events
DELETE FROM lane_events WHERE (tenant, session_id, place) IN (
    SELECT lane_events.tenant, lane_events.session_id, place FROM removals CROSS JOIN lane_events
        ON lane_events.tenant = removals.tenant AND lane_events.session_id = removals.session_id
    WHERE removal_no = ? LIMIT ?
);

-- name: remove_inputs
DELETE FROM input_requests WHERE request_no IN (
    SELECT request_no FROM removals CROSS JOIN input_requests INDEXED BY input_requests_by_session
        ON input_requests.tenant = removals.tenant
            AND input_requests.session_id = removals.session_id
    WHERE removal_no = ? LIMIT ?
);

-- name: remove_run_events
-- All but the last one of each run.
DELETE FROM run_events WHERE (tenant, run_id, idx) IN (
    SELECT run_events.tenant, run_events.run_id, idx
    FROM json_each(?) CROSS JOIN runs ON run_no = json_each.value
        CROSS JOIN run_events
            ON run_events.tenant = runs.tenant AND run_events.run_id = runs.run_id
    WHERE kind <> 'run_complete' LIMIT ?
);

-- name: remove_kept_parts
DELETE FROM kept_parts WHERE rowid IN (
    SELECT kept_parts.rowid FROM json_each(?) CROSS JOIN runs ON run_no = json_each.value
        CROSS JOIN kept_parts
            ON kept_parts.tenant = runs.tenant AND kept_parts.run_id = runs.run_id
    LIMIT ?
);

-- name: remove_attachments
DELETE FROM attachments WHERE (tenant, run_id) IN (
    SELECT tenant, run_id FROM json_each(?) CROSS JOIN runs ON run_no = json_each.value
);

-- name: remember_runs
INSERT OR REPLACE INTO deleted_runs (
    tenant, run_id, session_id, prompt_fingerprint, events, deleted_at
)
SELECT
    tenant, run_id, session_id, prompt_fingerprint,
    (
        SELECT coalesce(max(idx), 0) FROM run_events
        WHERE run_events.tenant = runs.tenant AND run_events.run_id = runs.run_id
    ),
    ?
FROM json_each(?) CROSS JOIN runs ON run_no = json_each.value;

-- name: remove_last_events
DELETE FROM run_events WHERE (tenant, run_id) IN (
    SELECT tenant, run_id FROM json_each(?) CROSS JOIN runs ON run_no = json_each.value
);

-- name: remove_prompts
DELETE FROM prompts WHERE (tenant, run_id) IN (
    SELECT tenant, run_id FROM json_each(?) CROSS JOIN runs ON run_no = json_each.value
);

-- name: remove_runs
DELETE FROM runs WHERE run_no IN (SELECT value FROM json_each(?));

-- name: oldest_dropped_copy
SELECT copy_id FROM dropped_copies ORDER BY copy_id LIMIT 1;

-- name: is_dropped
SELECT 1 FROM dropped_copies WHERE copy_id = ?;

-- name: end_dropped_copy
DELETE FROM dropped_copies WHERE copy_id = ?;

-- name: remove_copied_messages
DELETE FROM copied_messages WHERE rowid IN (
    SELECT rowid FROM copied_messages WHERE copy_id = ? LIMIT ?
);

-- name: remove_copied_attachments
DELETE FROM copied_attachments WHERE rowid IN (
    SELECT rowid FROM copied_attachments WHERE copy_id = ? LIMIT ?
);

-- name: remove_copied_parts
DELETE FROM copied_parts WHERE rowid IN (
    SELECT rowid FROM copied_parts WHERE copy_id = ? LIMIT ?
);

-- name: has_removals
SELECT EXISTS (SELECT 1 FROM removals) OR EXISTS (SELECT 1 FROM dropped_copies);

-- name: is_being_removed
SELECT EXISTS (SELECT 1 FROM removals WHERE tenant = ? AND session_id = ?);

-- Writing: runs, with their prompts, messages and events

-- name: insert_run
-- Inserts an open run; if it ends in the same transaction, `end_run` follows. Refuses the id of a
-- deleted run.
INSERT INTO runs (
    state, rank, turn, attempt, started_at, folded_into, cancel_reason, asking,
    tenant, run_id, session_id,
    accept_seq, when_busy, timeout, max_attempts, accepted_at, metadata, attachments,
    prompt_fingerprint, prompt_head, trace, agent
)
SELECT ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?
WHERE NOT EXISTS (SELECT 1 FROM deleted_runs WHERE tenant = ? AND run_id = ?);

-- name: update_run
-- Leaves out the columns of its end: two indexes depend on them.
UPDATE runs SET
    state = ?,
    rank = ?,
    turn = ?,
    attempt = ?,
    started_at = ?,
    folded_into = ?,
    cancel_reason = ?,
    asking = ?
WHERE tenant = ? AND run_id = ? AND session_id = ? AND ended_at IS NULL;

-- name: end_run
UPDATE runs SET
    ended_at = ?,
    finish_reason = ?,
    error_reason = ?,
    error_message = ?,
    message_id = ?,
    usage = ?,
    state = ?,
    rank = ?,
    turn = ?,
    attempt = ?,
    started_at = ?,
    folded_into = ?,
    cancel_reason = ?,
    asking = ?
WHERE tenant = ? AND run_id = ? AND session_id = ? AND ended_at IS NULL;

-- name: set_retry
UPDATE runs SET retry = ? WHERE tenant = ? AND run_id = ?;

-- name: set_revision
UPDATE runs SET when_busy = ?, revision = ?, last_update = ? WHERE tenant = ? AND run_id = ?;

-- name: edit_run
-- `delete_prompt` and `delete_attachments_of` go first, and the new ones follow.
UPDATE runs SET prompt_head = ?, attachments = ?, metadata = ? WHERE tenant = ? AND run_id = ?;

-- name: delete_prompt
DELETE FROM prompts WHERE tenant = ? AND run_id = ?;

-- name: delete_attachments_of
DELETE FROM attachments WHERE tenant = ? AND run_id = ?;

-- name: insert_prompt
INSERT INTO prompts (tenant, run_id, rest) VALUES (?, ?, ?);

-- name: insert_attachment
INSERT INTO attachments (tenant, run_id, n, name, mime_type, content)
VALUES (?, ?, ?, ?, ?, ?);

-- name: insert_message
INSERT INTO messages (
    tenant, session_id, turn, ordinal, message_id, run_id, role, finish_reason, model, created_at,
    parts
) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?);

-- name: insert_input
INSERT INTO input_requests (
    log_position, tenant, input_request_id, session_id, run_id, key, state, requested_at,
    expires_at, closed_at, answer, question, log_number
)
WITH one (position) AS (SELECT ?)
SELECT
    one.position, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 1 + coalesce(
        (SELECT max(log_number) FROM input_requests WHERE log_position = one.position), 0
    )
FROM one;

-- name: close_input
UPDATE input_requests SET state = ?, closed_at = ?, answer = ?
WHERE tenant = ? AND input_request_id = ? AND state = 'open';

-- name: delete_inputs
DELETE FROM input_requests WHERE tenant = ? AND session_id = ?;

-- name: insert_run_event
INSERT INTO run_events (idx, at, kind, body, tenant, run_id) VALUES (?, ?, ?, ?, ?, ?);

-- name: insert_lane_event
INSERT INTO lane_events (tenant, session_id, place, run_id, idx) VALUES (?, ?, ?, ?, ?);

-- name: append_run_event
-- The fence: it inserts nothing unless the attempt is the active one. A run that was folded into
-- another is never the active one, though a cancel puts it into the same state.
INSERT INTO run_events (idx, at, kind, body, tenant, run_id)
SELECT ?, ?, ?, ?, tenant, run_id FROM runs
WHERE tenant = ? AND run_id = ? AND attempt = ?
    AND state IN ('active', 'cancelling') AND folded_into = '';

-- name: drop_kept_parts
-- What a lost attempt has kept, which no message refers to.
DELETE FROM kept_parts WHERE tenant = ? AND run_id = ? AND attempt < ?;

-- name: keep_part
-- With the fence of `append_run_event`.
INSERT INTO kept_parts (n, part, tenant, run_id, attempt)
SELECT ?, ?, tenant, run_id, attempt FROM runs
WHERE tenant = ? AND run_id = ? AND attempt = ?
    AND state IN ('active', 'cancelling') AND folded_into = ''
ON CONFLICT DO UPDATE SET part = excluded.part;

-- name: insert_event
-- Without an earlier event the tenant's log begins here, or after the removed events.
INSERT INTO events (position, tenant, session_id, run_id, ended_at, body, log_bytes)
WITH ended (position, tenant, session_id, run_id, at, body, bytes) AS (VALUES (?, ?, ?, ?, ?, ?, ?))
SELECT
    position, tenant, session_id, run_id, at, body, bytes + coalesce(
        (SELECT log_bytes FROM events WHERE tenant = ended.tenant ORDER BY position DESC LIMIT 1),
        (SELECT compacted_bytes FROM tenant_logs WHERE tenant = ended.tenant),
        0
    ) + (
        SELECT coalesce(sum(100 + coalesce(length(CAST(body AS BLOB)), 0)), 0)
        FROM run_events WHERE tenant = ended.tenant AND run_id = ended.run_id
    )
FROM ended;

-- Writing: webhooks

-- name: insert_webhook
-- Unless the tenant, or the run, has as many as it may. Webhooks of runs count among themselves.
INSERT OR IGNORE INTO webhooks (
    tenant, webhook_id, enabled, revision, fence, created_at, updated_at, settings, secrets,
    progress, run_id
) SELECT ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?
WHERE
    (SELECT count(*) FROM webhooks WHERE tenant = ? AND (run_id = '') = (? = '')) < ?
    AND (SELECT count(*) FROM webhooks WHERE tenant = ? AND run_id = ?) < ?;

-- name: update_webhook
UPDATE webhooks SET
    enabled = ?, updated_at = ?, settings = ?, secrets = ?, revision = revision + 1
WHERE tenant = ? AND webhook_id = ? AND revision = ?;

-- name: reset_webhook
UPDATE webhooks SET progress = ?, fence = fence + 1
WHERE tenant = ? AND webhook_id = ? AND revision = ?;

-- name: save_webhook
UPDATE webhooks SET progress = ? WHERE tenant = ? AND webhook_id = ? AND fence = ?;

-- name: delete_webhook
DELETE FROM webhooks WHERE tenant = ? AND webhook_id = ?;

-- Writing: compaction

-- name: oldest_event
SELECT
    position, tenant, run_id, ended_at, log_bytes,
    (SELECT compacted_bytes FROM tenant_logs WHERE tenant = events.tenant) AS compacted_bytes
FROM events ORDER BY position LIMIT 1;

-- name: oldest_event_of
-- The oldest event of the tenant that has the event at a position.
SELECT
    position, tenant, run_id, ended_at, log_bytes,
    (SELECT compacted_bytes FROM tenant_logs WHERE tenant = events.tenant) AS compacted_bytes
FROM events
WHERE tenant = (SELECT tenant FROM events WHERE position = :last)
ORDER BY position LIMIT 1;

-- name: removable_run_events
-- All events of a run but the last. There is none as long as the log has a later terminal event of
-- the same run id, which a run of a deleted session may have had.
SELECT idx, coalesce(length(CAST(body AS BLOB)), 0) AS bytes FROM run_events
WHERE tenant = :tenant AND run_id = :run_id
    AND idx < (
        SELECT max(idx) FROM run_events WHERE tenant = :tenant AND run_id = :run_id
    )
    AND EXISTS (
        SELECT 1 FROM runs
        WHERE tenant = :tenant AND run_id = :run_id AND ended_at IS NOT NULL
    )
    AND NOT EXISTS (
        SELECT 1 FROM events
        WHERE tenant = :tenant AND run_id = :run_id AND position > :position
    )
ORDER BY idx LIMIT :limit;

-- name: delete_first_run_events
DELETE FROM run_events WHERE tenant = :tenant AND run_id = :run_id AND idx <= :last;

-- name: set_tenant_compacted
INSERT INTO tenant_logs (tenant, compacted, compacted_bytes)
SELECT tenant, position, :bytes FROM events WHERE position = :position
ON CONFLICT (tenant) DO UPDATE SET
    compacted = excluded.compacted,
    compacted_bytes = max(compacted_bytes, excluded.compacted_bytes);

-- name: end_in_lane
-- Where a run ended whose terminal event is about to be removed.
SELECT lane_events.place FROM events
JOIN lane_events
    ON lane_events.tenant = events.tenant AND lane_events.session_id = events.session_id
WHERE events.position = :position AND lane_events.run_id = events.run_id AND lane_events.idx = (
    SELECT max(idx) FROM run_events
    WHERE run_events.tenant = events.tenant AND run_events.run_id = events.run_id
)
ORDER BY lane_events.place LIMIT 1;

-- name: trim_lane_events
DELETE FROM lane_events
WHERE (tenant, session_id) = (SELECT tenant, session_id FROM events WHERE position = :position)
    AND place < :place;

-- name: mark_lane_start
UPDATE lane_events SET idx = 0
WHERE (tenant, session_id) = (SELECT tenant, session_id FROM events WHERE position = :position)
    AND place = :place;

-- name: delete_event
DELETE FROM events WHERE position = :position;

-- name: set_compacted
UPDATE meta SET value = max(value, :last) WHERE name = 'compacted';

-- Writing: the id of the store, which its cursors carry

-- name: name_store
-- A backup has no id: each store that is restored from it gets its own when it is first opened.
UPDATE meta SET value = randomblob(8) WHERE name = 'store_id' AND length(value) = 0;

-- name: unname_store
UPDATE meta SET value = x'' WHERE name = 'store_id';

-- Reading: the store as a whole

-- name: store_id
SELECT value FROM meta WHERE name = 'store_id';

-- name: compacted
SELECT value FROM meta WHERE name = 'compacted';

-- name: last_position
SELECT coalesce(max(position), 0) FROM events;

-- name: tenant_logs
SELECT tenant, compacted FROM tenant_logs;

-- name: compacted_of
SELECT coalesce(max(compacted), 0) AS value FROM tenant_logs WHERE tenant IN ('', :tenant);

-- name: log_sizes
-- The last position of each tenant's log, and its size. One seek per tenant finds the next one.
WITH RECURSIVE names (name) AS (
    SELECT min(tenant) FROM events
    UNION ALL
    SELECT (SELECT min(tenant) FROM events WHERE tenant > names.name) FROM names
    WHERE names.name IS NOT NULL
)
SELECT
    position,
    log_bytes - coalesce(
        (SELECT compacted_bytes FROM tenant_logs WHERE tenant = names.name), 0
    ) AS size
FROM names JOIN events ON position = (
    SELECT position FROM events WHERE tenant = names.name ORDER BY position DESC LIMIT 1
);

-- Reading: lanes

-- name: lane
-- One row per open run; a single row without a run if there is none. One statement needs no
-- transaction. It counts the events, because an append does not change the row of the run.
SELECT
    version, sessions.accept_seq, sessions.turn, sessions.agent,
    run_id, runs.accept_seq, state, when_busy, accepted_at, rank, timeout, max_attempts, attempt,
    runs.turn,
    (
        SELECT coalesce(max(idx), 0) FROM run_events
        WHERE run_events.tenant = runs.tenant AND run_events.run_id = runs.run_id
    ),
    started_at, folded_into, cancel_reason, coalesce(trace, ''), '' AS host, runs.agent, asking,
    retry, revision, coalesce(last_update, '')
FROM sessions LEFT JOIN runs INDEXED BY runs_open
    ON runs.tenant = sessions.tenant AND runs.session_id = sessions.session_id
        AND ended_at IS NULL
WHERE sessions.tenant = ? AND sessions.session_id = ?;

-- name: busy_sessions
-- agent: that of all open runs; NULL if they differ. asks: a run that is parked and has an open request
-- (core/input.py: RunInput).
SELECT
    tenant, session_id,
    max(state IN ('active', 'input_required', 'cancelling')) AS active,
    sum(state IN ('accepted', 'queued')) AS waiting_runs,
    CASE WHEN min(agent) = max(agent) THEN min(agent) END AS agent,
    max(
        state = 'input_required' AND CASE
            WHEN typeof(asking) = 'text' AND json_valid(asking)
            THEN json_array_length(asking, '$[0]') > 0 AND json_extract(asking, '$[4]')
        END
    ) AS asks
FROM runs INDEXED BY runs_open
WHERE ended_at IS NULL
GROUP BY tenant, session_id
ORDER BY min(accepted_at), min(run_no);

-- name: unended_runs
-- The runs that no terminal event was written for, whatever else their rows hold.
SELECT run_id, accept_seq FROM runs INDEXED BY runs_by_session
WHERE tenant = :tenant AND session_id = :session_id AND ended_at IS NULL AND NOT EXISTS (
    SELECT 1 FROM events WHERE events.tenant = runs.tenant AND events.run_id = runs.run_id
        AND events.session_id = runs.session_id
);

-- Reading: runs

-- name: run_no
SELECT run_no FROM runs WHERE tenant = ? AND run_id = ?;

-- name: run
SELECT
    run_no, run_id, session_id, accept_seq, state, when_busy, turn, timeout, max_attempts, attempt,
    accepted_at, started_at, ended_at, folded_into, cancel_reason, finish_reason, error_reason,
    error_message, message_id, usage, metadata, prompt_fingerprint, prompt_head, agent, retry,
    revision, last_update,
    EXISTS (
        SELECT 1 FROM removals
        WHERE removals.tenant = runs.tenant AND removals.session_id = runs.session_id
    ) AS is_removed,
    (
        SELECT coalesce(max(idx), 0) FROM run_events
        WHERE run_events.tenant = runs.tenant AND run_events.run_id = runs.run_id
    ) AS last_event_index
FROM runs WHERE run_no = :run_no;

-- name: deleted_before
SELECT run_id FROM deleted_runs WHERE deleted_at < ? LIMIT ?;

-- name: deleted_run
-- Also one whose row is still to be removed.
SELECT session_id, prompt_fingerprint, events FROM deleted_runs
WHERE tenant = :tenant AND run_id = :run_id
UNION ALL
SELECT runs.session_id, prompt_fingerprint, (
    SELECT coalesce(max(idx), 0) FROM run_events
    WHERE run_events.tenant = runs.tenant AND run_events.run_id = runs.run_id
)
FROM runs CROSS JOIN removals USING (tenant, session_id)
WHERE runs.tenant = :tenant AND run_id = :run_id;

-- name: prompt
SELECT prompt_head, attachments, rest
FROM runs LEFT JOIN prompts USING (tenant, run_id)
WHERE tenant = ? AND run_id = ?;

-- name: attachments
SELECT name, mime_type, content FROM attachments WHERE tenant = ? AND run_id = ? ORDER BY n;

-- name: run_events
-- None of a deleted run: those that are still to be removed have gaps.
SELECT idx, at, kind, body FROM run_events
WHERE tenant = :tenant AND run_id = :run_id AND idx > :after AND typeof(idx) = 'integer'
    AND (
        SELECT count(*) FROM runs CROSS JOIN removals USING (tenant, session_id)
        WHERE runs.tenant = :tenant AND run_id = :run_id
    ) = 0
ORDER BY idx LIMIT :limit;

-- name: lane_version
SELECT version FROM sessions WHERE tenant = ? AND session_id = ?;

-- name: lane_start
SELECT created_at, (
    SELECT iif(idx = 0, place, 0) FROM lane_events
    WHERE lane_events.tenant = sessions.tenant AND lane_events.session_id = sessions.session_id
    ORDER BY place LIMIT 1
) AS start
FROM sessions WHERE tenant = :tenant AND session_id = :session_id;

-- name: lane_events
SELECT
    place, lane_events.run_id AS run_id, lane_events.idx AS idx, at, kind, body
FROM lane_events LEFT JOIN run_events
    ON run_events.tenant = lane_events.tenant AND run_events.run_id = lane_events.run_id
        AND run_events.idx = lane_events.idx
WHERE lane_events.tenant = :tenant AND session_id = :session_id AND place > :after
    AND lane_events.idx > 0
ORDER BY place LIMIT :limit;

-- Reading: input requests

-- name: input
SELECT * FROM input_requests WHERE tenant = ? AND input_request_id = ? AND (
    SELECT count(*) FROM removals WHERE removals.tenant = input_requests.tenant
        AND removals.session_id = input_requests.session_id
) = 0;

-- name: input_of_run
-- The last one: an open one, or one that was answered.
SELECT * FROM input_requests INDEXED BY input_requests_by_run
WHERE tenant = ? AND run_id = ? AND key = ? ORDER BY request_no DESC LIMIT 1;

-- name: inputs
SELECT * FROM input_requests INDEXED BY input_requests_by_tenant
WHERE tenant = :tenant AND request_no < :before
    AND state IN (SELECT value FROM json_each(:states))
    AND (
        SELECT count(*) FROM removals WHERE removals.tenant = input_requests.tenant
            AND removals.session_id = input_requests.session_id
    ) = 0
ORDER BY request_no DESC LIMIT :limit;

-- name: open_inputs
SELECT * FROM input_requests INDEXED BY input_requests_open
WHERE tenant = :tenant AND state = 'open' AND request_no < :before
    AND (
        SELECT count(*) FROM removals WHERE removals.tenant = input_requests.tenant
            AND removals.session_id = input_requests.session_id
    ) = 0
ORDER BY request_no DESC LIMIT :limit;

-- name: inputs_of_session
SELECT * FROM input_requests INDEXED BY input_requests_by_session
WHERE tenant = :tenant AND session_id = :session_id AND request_no < :before
    AND state IN (SELECT value FROM json_each(:states))
    AND (
        SELECT count(*) FROM removals WHERE removals.tenant = input_requests.tenant
            AND removals.session_id = input_requests.session_id
    ) = 0
ORDER BY request_no DESC LIMIT :limit;

-- name: inputs_of_run
SELECT * FROM input_requests INDEXED BY input_requests_by_run
WHERE tenant = :tenant AND run_id = :run_id AND request_no < :before
    AND state IN (SELECT value FROM json_each(:states))
    AND (:session_id IS NULL OR session_id = :session_id)
    AND (
        SELECT count(*) FROM removals WHERE removals.tenant = input_requests.tenant
            AND removals.session_id = input_requests.session_id
    ) = 0
ORDER BY request_no DESC LIMIT :limit;

-- name: vitals
SELECT
    (
        SELECT min(accepted_at) FROM runs INDEXED BY runs_open
        WHERE ended_at IS NULL AND state IN ('accepted', 'queued')
    ) AS waiting_since,
    (
        SELECT min(requested_at) FROM input_requests INDEXED BY input_requests_open
        WHERE state = 'open' AND (
            SELECT count(*) FROM removals WHERE removals.tenant = input_requests.tenant
                AND removals.session_id = input_requests.session_id
        ) = 0
    ) AS asking_since;

-- name: inputs_in_log
SELECT * FROM input_requests INDEXED BY input_requests_of_tenant_in_log
WHERE tenant = :tenant AND (log_position, log_number) > (:position, :number)
    AND log_position <= :upto
    AND typeof(log_number) = 'integer'
ORDER BY log_position, log_number LIMIT :limit;

-- name: inputs_of_session_in_log
SELECT * FROM input_requests INDEXED BY input_requests_of_session_in_log
WHERE tenant = :tenant AND session_id = :session_id
    AND (log_position, log_number) > (:position, :number) AND log_position <= :upto
    AND typeof(log_number) = 'integer'
ORDER BY log_position, log_number LIMIT :limit;

-- name: last_input
SELECT log_position, log_number FROM input_requests
WHERE log_position BETWEEN 0 AND 9223372036854775807 AND typeof(log_number) = 'integer'
ORDER BY log_position DESC, log_number DESC LIMIT 1;

-- Reading: webhooks

-- name: webhook
SELECT * FROM webhooks WHERE tenant = ? AND webhook_id = ?;

-- name: webhooks
SELECT * FROM webhooks WHERE tenant = :tenant AND webhook_no < :before
ORDER BY webhook_no DESC LIMIT :limit;

-- name: webhooks_of_run
SELECT * FROM webhooks WHERE tenant = :tenant AND run_id = :run_id AND webhook_no < :before
ORDER BY webhook_no DESC LIMIT :limit;

-- name: every_webhook
SELECT tenant, webhook_id, revision, fence FROM webhooks ORDER BY webhook_no LIMIT ?;

-- name: due_inputs
SELECT tenant, session_id, run_id, input_request_id
FROM input_requests INDEXED BY input_requests_due
WHERE state = 'open' AND expires_at IS NOT NULL AND expires_at <= ?
    AND (
        SELECT count(*) FROM removals WHERE removals.tenant = input_requests.tenant
            AND removals.session_id = input_requests.session_id
    ) = 0
ORDER BY expires_at LIMIT ?;

-- Reading: sessions and transcripts

-- name: session
SELECT
    created_no, session_id, title, metadata, active_run_id, waiting_runs, input_tokens,
    output_tokens, cache_read_tokens, cache_write_tokens, requests, created_at, updated_at, agent,
    origin_id, origin_turn
FROM sessions WHERE tenant = :tenant AND session_id = :session_id;

-- name: stored_bytes
-- The next sessions of a tenant, in the order of the file. A damaged number counts as 0, so that the
-- sum does not overflow.
SELECT
    coalesce(
        sum(stored_bytes) FILTER (
            WHERE typeof(stored_bytes) = 'integer' AND stored_bytes BETWEEN 0 AND 1 << 50
        ),
        0
    ) AS bytes, count(*) AS found, max(created_no) AS last FROM (
    SELECT stored_bytes, created_no FROM sessions INDEXED BY sessions_by_tenant
    WHERE tenant = ? AND created_no > ? ORDER BY created_no LIMIT ?
);

-- name: stale_sessions
SELECT tenant, session_id, version, accept_seq FROM sessions INDEXED BY sessions_idle
WHERE active_run_id = '' AND waiting_runs = 0 AND updated_at < :before
ORDER BY updated_at LIMIT :limit;

-- name: messages
SELECT message_id, run_id, turn, ordinal, role, finish_reason, model, created_at, parts
FROM messages
WHERE tenant = :tenant AND session_id = :session_id AND (turn, ordinal) > (:turn, :ordinal)
    AND typeof(turn) = 'integer' AND typeof(ordinal) = 'integer'
ORDER BY turn, ordinal LIMIT :limit;

-- name: messages_of_run
-- They are in one turn.
SELECT message_id, run_id, turn, ordinal, role, finish_reason, model, created_at, parts
FROM messages
WHERE tenant = :tenant AND session_id = :session_id AND turn = (
    SELECT turn FROM runs
    WHERE tenant = :tenant AND run_id = :run_id AND session_id = :session_id
) AND run_id = :run_id AND (turn > :turn OR ordinal > :ordinal)
    AND typeof(turn) = 'integer' AND typeof(ordinal) = 'integer'
ORDER BY ordinal LIMIT :limit;

-- name: copy_of
SELECT copy_id FROM sessions
WHERE tenant = :tenant AND session_id = :session_id AND copy_id IS NOT NULL;

-- name: copied_messages
SELECT
    message_id, run_id, turn, ordinal, role, finish_reason, model, created_at, parts, prompt,
    attachments
FROM copied_messages
WHERE copy_id = :copy_id AND (turn, ordinal) > (:turn, :ordinal) ORDER BY turn, ordinal LIMIT :limit;

-- name: copied_messages_of_run
SELECT
    message_id, run_id, turn, ordinal, role, finish_reason, model, created_at, parts, prompt,
    attachments
FROM copied_messages INDEXED BY copied_messages_by_run
WHERE copy_id = :copy_id AND run_id = :run_id AND (turn, ordinal) > (:turn, :ordinal)
ORDER BY turn, ordinal LIMIT :limit;

-- name: copied_attachments
SELECT name, mime_type, content FROM copied_attachments
WHERE copy_id = ? AND turn = ? AND ordinal = ? ORDER BY n;

-- name: copied_part
SELECT part FROM copied_parts WHERE copy_id = ? AND run_id = ? AND attempt = ? AND n = ?;

-- name: copy_source
SELECT created_no, created_at, copy_id FROM sessions
WHERE tenant = :tenant AND session_id = :session_id;

-- name: message_sizes
SELECT
    turn, ordinal, iif(length(parts) > 1 << 20, run_id, NULL) AS long_run,
    coalesce(length(CAST(parts AS BLOB)), 0) + coalesce(iif(role = 'user', (
        SELECT length(CAST(prompt_head AS BLOB)) + coalesce((
            SELECT length(CAST(rest AS BLOB)) FROM prompts
            WHERE prompts.tenant = runs.tenant AND prompts.run_id = runs.run_id
        ), 0) + coalesce(iif(attachments > 0, (
            SELECT sum(length(CAST(content AS BLOB))) FROM attachments AS kept
            WHERE kept.tenant = runs.tenant AND kept.run_id = runs.run_id
        ), 0), 0)
        FROM runs WHERE runs.tenant = messages.tenant AND runs.run_id = messages.run_id
    ), 0), 0) AS bytes
FROM messages
WHERE tenant = :tenant AND session_id = :session_id AND (turn, ordinal) > (:turn, :ordinal)
    AND turn <= :last_turn AND typeof(turn) = 'integer' AND typeof(ordinal) = 'integer'
ORDER BY turn, ordinal LIMIT :limit;

-- name: copied_message_sizes
SELECT
    turn, ordinal, iif(length(parts) > 1 << 20, run_id, NULL) AS long_run,
    coalesce(length(CAST(parts AS BLOB)), 0) + coalesce(length(CAST(prompt AS BLOB)), 0)
    + coalesce(iif(attachments > 0, (
        SELECT sum(length(CAST(content AS BLOB))) FROM copied_attachments AS kept
        WHERE kept.copy_id = copied_messages.copy_id AND kept.turn = copied_messages.turn
            AND kept.ordinal = copied_messages.ordinal
    ), 0), 0) AS bytes
FROM copied_messages
WHERE copy_id = :copy_id AND (turn, ordinal) > (:turn, :ordinal) AND turn <= :last_turn
ORDER BY turn, ordinal LIMIT :limit;

-- name: part_sizes
SELECT attempt, n, length(CAST(part AS BLOB)) AS bytes FROM kept_parts
WHERE tenant = ? AND run_id = ? ORDER BY attempt, n;

-- name: copied_part_sizes
SELECT attempt, n, length(CAST(part AS BLOB)) AS bytes FROM copied_parts
WHERE copy_id = ? AND run_id = ? ORDER BY attempt, n;

-- name: message_parts
SELECT parts FROM messages
WHERE tenant = :tenant AND session_id = :session_id AND turn = :turn AND message_id = :message_id;

-- name: kept_part
SELECT part FROM kept_parts WHERE tenant = ? AND run_id = ? AND attempt = ? AND n = ?;

-- Reading: the event log

-- name: events
SELECT position, tenant, session_id, run_id, ended_at, body FROM events INDEXED BY events_by_tenant
WHERE position > :after AND position <= :known AND tenant = :tenant ORDER BY position LIMIT :limit;

-- name: event
SELECT position, tenant, session_id, run_id, ended_at, body FROM events
WHERE position = :position;

-- name: positions_of_session
SELECT position FROM events
WHERE tenant = :tenant AND session_id = :id AND position > :after AND position <= :known
ORDER BY position LIMIT :limit;

-- name: positions_of_run
SELECT position FROM events
WHERE tenant = :tenant AND run_id = :id AND position > :after AND position <= :known
ORDER BY position LIMIT :limit;

-- name: position_of_run
-- The last one: a run of a deleted session may have had the same id.
SELECT position FROM events
WHERE tenant = :tenant AND run_id = :run_id ORDER BY position DESC LIMIT 1;

-- Repair

-- name: is_end
-- Whether an event is the last one of a run that has ended.
SELECT EXISTS (
    SELECT 1 FROM runs WHERE tenant = :tenant AND run_id = :run_id AND ended_at IS NOT NULL
    AND :idx = (SELECT max(idx) FROM run_events WHERE tenant = :tenant AND run_id = :run_id)
);

-- name: recount_stored_bytes
-- After a message was replaced; the numbers are those of store/weight.py. Labels count as JSON.
UPDATE sessions SET stored_bytes =
    length(CAST(title AS BLOB)) + coalesce(length(CAST(metadata AS BLOB)), 0) + (
        SELECT coalesce(sum(200 + coalesce(length(CAST(parts AS BLOB)), 0) + iif(
            length(parts) > 1 << 20 AND json_valid(parts), (
                SELECT coalesce(sum(json_extract(value, '$[3]')), 0) FROM json_each(parts)
                WHERE json_extract(value, '$[0]') = 'kept'
            ), 0
        )), 0) FROM messages WHERE tenant = :tenant AND session_id = :session_id
    ) + (
        SELECT coalesce(sum(
            500 + length(CAST(prompt_head AS BLOB)) + coalesce(length(CAST(metadata AS BLOB)), 0)
            + coalesce((
                SELECT length(CAST(rest AS BLOB)) FROM prompts
                WHERE prompts.tenant = runs.tenant AND prompts.run_id = runs.run_id
            ), 0) + coalesce((
                SELECT sum(length(CAST(content AS BLOB))) FROM attachments
                WHERE attachments.tenant = runs.tenant AND attachments.run_id = runs.run_id
            ), 0)
        ), 0) FROM runs WHERE tenant = :tenant AND session_id = :session_id
    ) + (
        SELECT coalesce(sum(
            500 + length(CAST(question AS BLOB)) + coalesce(length(CAST(answer AS BLOB)), 0)
        ), 0) FROM input_requests WHERE tenant = :tenant AND session_id = :session_id
    ) + (
        SELECT coalesce(sum(
            200 + coalesce(length(CAST(parts AS BLOB)), 0)
            + coalesce(length(CAST(prompt AS BLOB)), 0)
        ), 0) FROM copied_messages WHERE copied_messages.copy_id = sessions.copy_id
    ) + (
        SELECT coalesce(sum(length(CAST(content AS BLOB))), 0) FROM copied_attachments
        WHERE copied_attachments.copy_id = sessions.copy_id
    ) + (
        SELECT coalesce(sum(length(CAST(part AS BLOB))), 0) FROM copied_parts
        WHERE copied_parts.copy_id = sessions.copy_id
    )
WHERE tenant = :tenant AND session_id = :session_id;
