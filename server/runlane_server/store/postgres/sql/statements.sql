-- All statements of a serving store, by name, besides the functions in the migrations. Each is one
-- round trip.

-- Opening

-- name: settings
SELECT
    current_setting('server_encoding') AS encoding,
    current_setting('fsync') AS fsync,
    current_setting('synchronous_commit') AS durability;

-- name: lock_schema
-- If this node hangs meanwhile, the timeouts let the others continue.
SET statement_timeout = 0;
SET idle_session_timeout = '60s';
SET idle_in_transaction_session_timeout = '60s';
SELECT pg_advisory_lock(hashtextextended('runlane ' || current_setting('search_path'), 0));

-- name: unlock_schema
SELECT pg_advisory_unlock_all();

-- name: has_schema
SELECT to_regnamespace(quote_ident($1::text)) IS NOT NULL;

-- name: has_versions
SELECT to_regclass('schema_versions') IS NOT NULL;

-- name: create_versions
CREATE TABLE schema_versions (
    version    integer     PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT now()
);

-- name: version
SELECT max(version) FROM schema_versions;

-- name: add_version
INSERT INTO schema_versions (version) VALUES ($1);

-- name: foreign_table
SELECT relname FROM pg_class
WHERE relnamespace = to_regnamespace(quote_ident($1::text)) AND relkind IN ('r', 'p', 'v', 'm', 'f')
LIMIT 1;

-- name: state
SELECT
    store_id, greatest(compacted, (SELECT max(position) FROM events)) AS position,
    peer_key
FROM store;

-- Renewing

-- name: nodes_at_work
SELECT address FROM nodes WHERE NOT lost AND heartbeat > clock_timestamp() - $1::interval;

-- name: renew
UPDATE store SET
    store_id = substring(uuid_send(gen_random_uuid()) FROM 9 FOR 8),
    peer_key = replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', '');

-- name: rotate_node_key
-- The column holds one key, or the new one and the one before it.
UPDATE store SET peer_key =
    replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', '')
    || ' ' || split_part(peer_key, ' ', 1);

-- name: node_keys
SELECT peer_key FROM store;

-- Writing

-- name: commit_units
SELECT refused, raised, first_position
FROM commit_fenced(
    $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19
);

-- name: notify
SELECT pg_notify($1, $2);

-- name: compact
SELECT events, compacted, more FROM compact($1, $2, $3, $4, $5);

-- name: remove_next
SELECT remove_next() AS removed;

-- name: forget_removed
SELECT forget_removed($1, $2);

-- name: forget_deleted
WITH forgotten AS (
    DELETE FROM deleted_runs
    WHERE (tenant, run_id) IN (
        SELECT tenant, run_id FROM deleted_runs
        WHERE deleted_at < to_timestamp($1::bigint / 1000000.0)
        ORDER BY deleted_at LIMIT $2 FOR UPDATE SKIP LOCKED
    )
    RETURNING 1
)
SELECT count(*) AS forgotten FROM forgotten;

-- Writing: parts of long messages

-- name: keep_part
-- Only for the active attempt, from its host. Its first part removes those of earlier attempts, which no message
-- refers to.
WITH active AS (
    SELECT tenant, run_id, attempt FROM runs
    WHERE tenant = $1 AND run_id = $2 AND attempt = $3 AND host = $6 AND run_no > 0
        AND state IN ('active', 'cancelling') AND folded_into = ''
), dropped AS (
    DELETE FROM kept_parts WHERE tenant = $1 AND run_id = $2 AND attempt < $3 AND $4::bigint = 0
), kept AS (
    INSERT INTO kept_parts (tenant, run_id, attempt, n, part)
    SELECT tenant, run_id, attempt, $4::bigint, $5 FROM active
    ON CONFLICT (tenant, run_id, attempt, n) DO UPDATE SET part = excluded.part
    RETURNING n
)
SELECT count(*) AS kept FROM kept;

-- Reading: lanes

-- name: lane
-- One row per open run; a single row with a NULL run_id if there is none, and with a NULL version if
-- there is no session. It counts the events,
-- because an append does not change the row of the run.
SELECT
    sessions.version, sessions.accept_seq AS lane_accept_seq, sessions.turn AS lane_turn,
    sessions.agent AS lane_agent,
    runs.run_id, runs.accept_seq, runs.state, runs.when_busy, runs.accepted_at, runs.rank,
    runs.timeout, runs.max_attempts, runs.attempt, runs.turn, runs.started_at, runs.folded_into,
    runs.cancel_reason, runs.host, runs.trace, runs.agent, runs.asking, runs.retry,
    runs.revision, runs.last_update,
    (
        SELECT coalesce(max(idx), 0) FROM run_events
        WHERE run_events.tenant = runs.tenant AND run_events.run_id = runs.run_id
    ) AS events,
    EXISTS (SELECT FROM removals WHERE tenant = $1 AND session_id = $2) AS is_removed
FROM (VALUES (1)) AS one
    LEFT JOIN sessions ON sessions.tenant = $1 AND sessions.session_id = $2
    LEFT JOIN runs
        ON runs.tenant = sessions.tenant AND runs.session_id = sessions.session_id
            AND runs.ended_at IS NULL AND runs.run_no > 0
ORDER BY runs.accept_seq;

-- name: busy_sessions
-- agent: that of all open runs; NULL if they differ.
SELECT
    tenant, session_id,
    bool_or(state IN ('active', 'input_required', 'cancelling')) AS active,
    count(*) FILTER (WHERE state IN ('accepted', 'queued')) AS waiting_runs,
    CASE WHEN min(agent) = max(agent) THEN min(agent) END AS agent
FROM runs
WHERE ended_at IS NULL AND run_no > 0
GROUP BY tenant, session_id
ORDER BY min(accepted_at), min(run_no);

-- name: unended_runs
-- The version of the lane, with a row for each run that no terminal event was written for.
SELECT sessions.version, runs.run_id, runs.accept_seq
FROM sessions LEFT JOIN runs
    ON runs.tenant = sessions.tenant AND runs.session_id = sessions.session_id
        AND runs.ended_at IS NULL AND runs.run_no > 0 AND NOT EXISTS (
            SELECT FROM events WHERE events.tenant = runs.tenant AND events.run_id = runs.run_id
                AND events.session_id = runs.session_id
        )
WHERE sessions.tenant = $1 AND sessions.session_id = $2;

-- Reading: runs

-- name: run
-- parts: of the message that the run ended with.
SELECT
    run_no, run_id, session_id, accept_seq, state, when_busy, turn, timeout, max_attempts, attempt,
    accepted_at, started_at, ended_at, folded_into, cancel_reason, finish_reason, error_reason,
    error_message, message_id, usage, metadata, prompt_fingerprint, prompt_head, agent, retry,
    revision, last_update,
    EXISTS (
        SELECT FROM removals
        WHERE removals.tenant = runs.tenant AND removals.session_id = runs.session_id
    ) AS is_removed,
    (
        SELECT parts FROM messages
        WHERE messages.tenant = runs.tenant AND messages.session_id = runs.session_id
            AND messages.turn = runs.turn AND messages.message_id = runs.message_id
    ) AS parts,
    (
        SELECT coalesce(max(idx), 0) FROM run_events
        WHERE run_events.tenant = runs.tenant AND run_events.run_id = runs.run_id
    ) AS last_event_index
FROM runs WHERE tenant = $1 AND run_id = $2;

-- name: deleted_run
-- Also one whose row is still to be removed.
SELECT session_id, prompt_fingerprint, events FROM deleted_runs WHERE tenant = $1 AND run_id = $2
UNION ALL
SELECT runs.session_id, prompt_fingerprint, (
    SELECT coalesce(max(idx), 0) FROM run_events
    WHERE run_events.tenant = runs.tenant AND run_events.run_id = runs.run_id
)
FROM runs JOIN removals USING (tenant, session_id)
WHERE runs.tenant = $1 AND run_id = $2;

-- name: prompt
SELECT
    prompt_head, rest,
    ARRAY(
        SELECT ROW(is_text, name, mime_type, content)::kept_attachment FROM attachments
        WHERE attachments.tenant = runs.tenant AND attachments.run_id = runs.run_id ORDER BY n
    ) AS attachments
FROM runs LEFT JOIN prompts USING (tenant, run_id)
WHERE tenant = $1 AND run_id = $2;

-- name: run_events
-- found: the number of matching events; those that begin within the limit of bytes are returned.
-- None of a deleted run: those that are still to be removed have gaps.
SELECT idx, at, kind, body, found FROM (
    SELECT
        idx, at, kind, body, count(*) OVER () AS found,
        sum(size) OVER (ORDER BY idx) - size AS before
    FROM (
        SELECT idx, at, kind, body, coalesce(octet_length(body), 0) AS size FROM run_events
        WHERE tenant = $1 AND run_id = $2 AND idx > $3 AND (
            SELECT count(*) FROM runs JOIN removals USING (tenant, session_id)
            WHERE runs.tenant = $1 AND run_id = $2
        ) = 0
        ORDER BY idx LIMIT $4
    ) AS first
) AS sized
WHERE before <= $5 ORDER BY idx;

-- name: lane_events
-- One row without a place if there are no such events. found, before: as with run_events.
SELECT
    sessions.created_at,
    coalesce((
        SELECT CASE WHEN first.idx = 0 THEN first.place ELSE 0 END FROM lane_events AS first
        WHERE first.tenant = $1 AND first.session_id = $2
        ORDER BY first.tenant, first.session_id, first.place LIMIT 1
    ), 0) AS start,
    place, run_id, idx, at, kind, body
FROM sessions LEFT JOIN LATERAL (
    SELECT *, sum(coalesce(octet_length(body), 0)) OVER (ORDER BY place)
        - coalesce(octet_length(body), 0) AS before
    FROM (
        SELECT place, own.run_id, own.idx, run_events.at, run_events.kind, run_events.body
        FROM lane_events AS own LEFT JOIN run_events
            ON run_events.tenant = own.tenant AND run_events.run_id = own.run_id
                AND run_events.idx = own.idx
        WHERE own.tenant = $1 AND own.session_id = $2 AND own.place > $3 AND own.idx > 0
        ORDER BY own.tenant, own.session_id, own.place LIMIT $4
    ) AS page
) AS sized ON before <= $5
WHERE sessions.tenant = $1 AND sessions.session_id = $2
ORDER BY place;

-- Reading: input requests

-- name: input
SELECT * FROM input_requests WHERE tenant = $1 AND input_request_id = $2 AND (
    SELECT count(*) FROM removals WHERE removals.tenant = input_requests.tenant
        AND removals.session_id = input_requests.session_id
) = 0;

-- name: input_of_run
-- The last one: an open one, or one that was answered.
SELECT * FROM input_requests
WHERE tenant = $1 AND run_id = $2 AND key = $3 AND request_no > 0
ORDER BY request_no DESC LIMIT 1;

-- name: inputs
SELECT * FROM input_requests
WHERE tenant = $1 AND request_no > 0 AND request_no < $2 AND state = ANY ($3::text[])
    AND (
        SELECT count(*) FROM removals WHERE removals.tenant = input_requests.tenant
            AND removals.session_id = input_requests.session_id
    ) = 0
ORDER BY request_no DESC LIMIT $4;

-- name: open_inputs
SELECT * FROM input_requests
WHERE tenant = $1 AND state = 'open' AND request_no > 0 AND request_no < $2
    AND (
        SELECT count(*) FROM removals WHERE removals.tenant = input_requests.tenant
            AND removals.session_id = input_requests.session_id
    ) = 0
ORDER BY request_no DESC LIMIT $3;

-- name: inputs_of_session
SELECT * FROM input_requests
WHERE tenant = $1 AND session_id = $5 AND request_no > 0 AND request_no < $2
    AND state = ANY ($3::text[])
    AND (
        SELECT count(*) FROM removals WHERE removals.tenant = input_requests.tenant
            AND removals.session_id = input_requests.session_id
    ) = 0
ORDER BY request_no DESC LIMIT $4;

-- name: inputs_of_run
SELECT * FROM input_requests
WHERE tenant = $1 AND run_id = $5 AND request_no > 0 AND request_no < $2
    AND state = ANY ($3::text[]) AND ($6::text IS NULL OR session_id = $6)
    AND (
        SELECT count(*) FROM removals WHERE removals.tenant = input_requests.tenant
            AND removals.session_id = input_requests.session_id
    ) = 0
ORDER BY request_no DESC LIMIT $4;

-- name: inputs_in_log
SELECT * FROM input_requests
WHERE tenant = $1 AND log_position IS NOT NULL AND (log_position, log_number) > ($2, $3)
    AND log_position <= $4
ORDER BY log_position, log_number LIMIT $5;

-- name: inputs_of_session_in_log
SELECT * FROM input_requests
WHERE tenant = $1 AND session_id = $6 AND request_no > 0 AND log_position IS NOT NULL
    AND (log_position, log_number) > ($2, $3) AND log_position <= $4
ORDER BY log_position, log_number LIMIT $5;

-- name: last_input
SELECT log_position, log_number FROM input_requests
WHERE log_position IS NOT NULL ORDER BY log_position DESC, log_number DESC LIMIT 1;

-- Webhooks

-- name: insert_webhook
SELECT insert_webhook($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13) AS created;

-- name: webhook
SELECT * FROM webhooks WHERE tenant = $1 AND webhook_id = $2;

-- name: webhooks
SELECT * FROM webhooks WHERE tenant = $1 AND webhook_no < $2 ORDER BY webhook_no DESC LIMIT $3;

-- name: webhooks_of_run
SELECT * FROM webhooks WHERE tenant = $1 AND run_id = $4 AND webhook_no < $2
ORDER BY webhook_no DESC LIMIT $3;

-- name: update_webhook
-- It may be repeated: the second time it finds its own change.
UPDATE webhooks SET
    enabled = $4,
    updated_at = $5,
    settings = $6,
    secrets = $7,
    fence = fence + CASE WHEN $8::text IS NULL THEN 0 ELSE 1 END,
    progress = coalesce($8, progress),
    revision = $3 + 1
WHERE tenant = $1 AND webhook_id = $2
    AND (revision = $3 OR (revision = $3 + 1 AND updated_at = $5 AND settings = $6))
RETURNING 1;

-- name: save_webhook
UPDATE webhooks SET progress = $4 WHERE tenant = $1 AND webhook_id = $2 AND fence = $3
RETURNING 1;

-- name: delete_webhook
DELETE FROM webhooks WHERE tenant = $1 AND webhook_id = $2 RETURNING 1;

-- name: lease_webhooks
-- It renews the node's leases and takes over those that have expired. Of the webhooks without a lease
-- it takes no more than its share among the nodes, so that others get theirs. It returns the share
-- too. A node that was silent for the time of a lease has no share: it renews none, and need not be
-- declared dead yet. Another node's rows are skipped while it writes them, so that no two nodes wait
-- for each other.
WITH counted AS MATERIALIZED (
    SELECT
        count(*) FILTER (WHERE leased_by = $1) AS own,
        ceil(
            count(*)::numeric / greatest(1, (
                SELECT count(*) FROM nodes
                WHERE NOT lost AND heartbeat > clock_timestamp() - $2::interval
            ))
        )::bigint AS share
    FROM webhooks
), held AS MATERIALIZED (
    SELECT tenant, webhook_id FROM webhooks
    WHERE leased_by = $1 OR leased_until < clock_timestamp()
    ORDER BY (leased_by = $1) DESC NULLS LAST, webhook_no LIMIT $3
    FOR UPDATE SKIP LOCKED
), free AS MATERIALIZED (
    SELECT tenant, webhook_id FROM webhooks
    WHERE leased_until IS NULL
    ORDER BY webhook_no
    LIMIT (SELECT greatest(0, least(share, $3) - own) FROM counted)
    FOR UPDATE SKIP LOCKED
), wanted AS (
    SELECT * FROM held UNION ALL SELECT * FROM free
)
UPDATE webhooks SET
    fence = fence + CASE WHEN leased_by = $1 AND leased_until >= clock_timestamp() THEN 0 ELSE 1 END,
    leased_by = $1,
    leased_until = clock_timestamp() + $2::interval
FROM wanted
WHERE webhooks.tenant = wanted.tenant AND webhooks.webhook_id = wanted.webhook_id
RETURNING webhooks.tenant, webhooks.webhook_id, webhook_no, revision, fence,
    (SELECT share FROM counted) AS share;

-- name: release_webhooks
UPDATE webhooks SET leased_by = NULL, leased_until = NULL
WHERE leased_by = $1 AND ($2::text[] IS NULL OR webhook_id = ANY ($2));

-- name: vitals
SELECT
    (
        SELECT sum(pg_total_relation_size(oid))::bigint FROM pg_class
        WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r'
    ) AS size,
    (SELECT min(waiting_since) FROM sessions WHERE waiting_runs > 0) AS waiting_since,
    (
        SELECT min(requested_at) FROM input_requests
        WHERE state = 'open' AND request_no > 0 AND (
            SELECT count(*) FROM removals WHERE removals.tenant = input_requests.tenant
                AND removals.session_id = input_requests.session_id
        ) = 0
    ) AS asking_since;

-- name: due_inputs
-- The clock of the database decides.
SELECT tenant, session_id, run_id, input_request_id FROM input_requests
WHERE state = 'open' AND expires_at IS NOT NULL
    AND expires_at <= (extract(epoch FROM clock_timestamp()) * 1000000)::bigint
    AND (
        SELECT count(*) FROM removals WHERE removals.tenant = input_requests.tenant
            AND removals.session_id = input_requests.session_id
    ) = 0
ORDER BY expires_at LIMIT $1;

-- Reading: sessions and transcripts

-- name: session
SELECT
    created_no, session_id, title, metadata, active_run_id, waiting_runs, input_tokens,
    output_tokens, cache_read_tokens, cache_write_tokens, requests, created_at, updated_at, agent,
    origin_id, origin_turn
FROM sessions WHERE tenant = $1 AND session_id = $2;

-- name: stored_bytes
-- A damaged number counts as 0, so that the sum does not overflow. 200 is the SESSION_BYTES of
-- store/weight.py.
SELECT coalesce(
    sum(200 + CASE WHEN stored_bytes BETWEEN 0 AND 1::bigint << 50 THEN stored_bytes ELSE 0 END), 0
)::bigint AS bytes FROM sessions
WHERE tenant = $1 AND created_no > 0;

-- name: stale_sessions
SELECT tenant, session_id, version, accept_seq FROM sessions
WHERE active_run_id = '' AND waiting_runs = 0 AND updated_at < $1
ORDER BY updated_at LIMIT $2;

-- name: messages
-- A user message comes with the prompt of its run, a long one with the parts that were stored before
-- it: those follow its first MiB. found, before: as with run_events. The messages of one run ($8) are
-- in one turn. Each row has the copy that a fork begins with; without messages there is one row.
SELECT origin.copy_id, origin.last_copied, page.*
FROM (
    SELECT max(copy_id) AS copy_id, max(origin_turn) AS last_copied FROM sessions
    WHERE tenant = $1 AND session_id = $2
) AS origin LEFT JOIN (
    SELECT
        message_id, run_id, turn, ordinal, role, finish_reason, model, created_at, parts, found,
        prompt_head, rest,
        ARRAY(
            SELECT ROW(is_text, name, mime_type, content)::kept_attachment FROM attachments
            WHERE sized.attachments > 0 AND tenant = $1 AND attachments.run_id = sized.run_id
            ORDER BY n
        ) AS attachments,
        ARRAY(
            SELECT ROW(attempt, n, part)::kept_part FROM kept_parts
            WHERE sized.is_long AND tenant = $1 AND kept_parts.run_id = sized.run_id
        ) AS kept_parts
    FROM (
        SELECT
            first.*, count(*) OVER () AS found,
            sum(size) OVER (ORDER BY turn, ordinal) - size AS before
        FROM (
            SELECT
                messages.*, prompt_head, rest, coalesce(attachments, 0) AS attachments,
                coalesce(octet_length(parts), 0) + coalesce(octet_length(rest), 0) + CASE
                    WHEN attachments > 0 THEN (
                        SELECT sum(octet_length(content)) FROM attachments
                        WHERE attachments.tenant = $1 AND attachments.run_id = messages.run_id
                    )
                    ELSE 0
                END + CASE
                    WHEN octet_length(parts) > 1 << 20 THEN (
                        SELECT coalesce(sum(octet_length(part)), 0) FROM kept_parts
                        WHERE kept_parts.tenant = $1 AND kept_parts.run_id = messages.run_id
                    )
                    ELSE 0
                END AS size,
                coalesce(octet_length(parts), 0) > 1 << 20 AS is_long
            FROM messages
                LEFT JOIN runs ON messages.role = 'user'
                    AND runs.tenant = $1 AND runs.run_id = messages.run_id
                LEFT JOIN prompts ON messages.role = 'user'
                    AND prompts.tenant = $1 AND prompts.run_id = messages.run_id
            WHERE messages.tenant = $1 AND messages.session_id = $2
                AND (messages.turn, messages.ordinal) > ($3, $4)
                AND messages.turn <= $7 AND ($8::text IS NULL OR messages.run_id = $8)
            ORDER BY messages.turn, messages.ordinal LIMIT $5
        ) AS first
    ) AS sized
    WHERE before <= $6
) AS page ON true
ORDER BY page.turn, page.ordinal;

-- name: copied_messages
-- The messages of a copy, with the columns of `messages`.
SELECT
    message_id, run_id, turn, ordinal, role, finish_reason, model, created_at, parts, found,
    prompt AS prompt_head, NULL AS rest,
    ARRAY(
        SELECT ROW(is_text, name, mime_type, content)::kept_attachment FROM copied_attachments AS one
        WHERE sized.attachments > 0 AND one.copy_id = $1 AND one.turn = sized.turn
            AND one.ordinal = sized.ordinal
        ORDER BY n
    ) AS attachments,
    ARRAY(
        SELECT ROW(attempt, n, part)::kept_part FROM copied_parts AS one
        WHERE octet_length(sized.parts) > 1 << 20 AND one.copy_id = $1
            AND one.run_id = sized.run_id
    ) AS kept_parts
FROM (
    SELECT
        first.*, count(*) OVER () AS found,
        sum(size) OVER (ORDER BY turn, ordinal) - size AS before
    FROM (
        SELECT
            copied.*,
            coalesce(octet_length(parts), 0) + coalesce(octet_length(prompt), 0) + CASE
                WHEN attachments > 0 THEN (
                    SELECT sum(octet_length(content)) FROM copied_attachments AS one
                    WHERE one.copy_id = $1 AND one.turn = copied.turn
                        AND one.ordinal = copied.ordinal
                )
                ELSE 0
            END + CASE
                WHEN octet_length(parts) > 1 << 20 THEN (
                    SELECT coalesce(sum(octet_length(part)), 0) FROM copied_parts AS one
                    WHERE one.copy_id = $1 AND one.run_id = copied.run_id
                )
                ELSE 0
            END AS size
        FROM copied_messages AS copied
        WHERE copied.copy_id = $1 AND (copied.turn, copied.ordinal) > ($2, $3)
            AND ($6::text IS NULL OR copied.run_id = $6)
        ORDER BY copied.turn, copied.ordinal LIMIT $4
    ) AS first
) AS sized
WHERE before <= $5 ORDER BY turn, ordinal;

-- Copies: see store/copies.py

-- name: copy_source
SELECT created_no, created_at, copy_id FROM sessions WHERE tenant = $1 AND session_id = $2;

-- name: message_sizes
SELECT
    messages.turn, messages.ordinal,
    CASE WHEN octet_length(parts) > 1 << 20 THEN messages.run_id END AS long_run,
    (
        coalesce(octet_length(parts), 0) + coalesce(octet_length(prompt_head), 0)
        + coalesce(octet_length(rest), 0) + CASE WHEN attachments > 0 THEN (
            SELECT coalesce(sum(octet_length(content)), 0) FROM attachments AS kept
            WHERE kept.tenant = $1 AND kept.run_id = messages.run_id
        ) ELSE 0 END
    )::bigint AS bytes
FROM messages
    LEFT JOIN runs ON messages.role = 'user'
        AND runs.tenant = $1 AND runs.run_id = messages.run_id
    LEFT JOIN prompts ON messages.role = 'user'
        AND prompts.tenant = $1 AND prompts.run_id = messages.run_id
WHERE messages.tenant = $1 AND messages.session_id = $2
    AND (messages.turn, messages.ordinal) > ($3, $4) AND messages.turn <= $5
ORDER BY messages.turn, messages.ordinal LIMIT $6;

-- name: copied_message_sizes
SELECT
    turn, ordinal, CASE WHEN octet_length(parts) > 1 << 20 THEN run_id END AS long_run,
    (
        coalesce(octet_length(parts), 0) + coalesce(octet_length(prompt), 0)
        + CASE WHEN attachments > 0 THEN (
            SELECT coalesce(sum(octet_length(content)), 0) FROM copied_attachments AS kept
            WHERE kept.copy_id = $1 AND kept.turn = copied.turn AND kept.ordinal = copied.ordinal
        ) ELSE 0 END
    )::bigint AS bytes
FROM copied_messages AS copied
WHERE copy_id = $1 AND (turn, ordinal) > ($2, $3) AND turn <= $4
ORDER BY turn, ordinal LIMIT $5;

-- name: part_sizes
SELECT attempt, n, octet_length(part) AS bytes FROM kept_parts
WHERE tenant = $1 AND run_id = $2 ORDER BY attempt, n;

-- name: copied_part_sizes
SELECT attempt, n, octet_length(part) AS bytes FROM copied_parts
WHERE copy_id = $1 AND run_id = $2 ORDER BY attempt, n;

-- name: start_copy
INSERT INTO unfinished_copies (copy_id) VALUES ($1) ON CONFLICT DO NOTHING;

-- name: drop_copy
DELETE FROM unfinished_copies WHERE copy_id = $1;

-- name: drop_stale_copies
DELETE FROM unfinished_copies WHERE touched_at < now() - interval '1 hour';

-- name: copy_messages
-- It may be repeated, as each of these: a connection may be lost after the commit.
WITH held AS (
    UPDATE unfinished_copies SET touched_at = now() WHERE copy_id = $1 RETURNING copy_id
), made AS (
    INSERT INTO copied_messages (
        copy_id, turn, ordinal, created_at, attachments, message_id, run_id, role, finish_reason,
        model, parts, prompt
    )
    SELECT
        copy_id, messages.turn, ordinal, messages.created_at, attachments, messages.message_id,
        messages.run_id, role, messages.finish_reason, model, parts,
        prompt_head || coalesce(rest, '')
    FROM held CROSS JOIN messages
        LEFT JOIN runs ON messages.role = 'user'
            AND runs.tenant = $2 AND runs.run_id = messages.run_id
        LEFT JOIN prompts ON messages.role = 'user'
            AND prompts.tenant = $2 AND prompts.run_id = messages.run_id
    WHERE messages.tenant = $2 AND messages.session_id = $3
        AND (messages.turn, ordinal) > ($4, $5) AND (messages.turn, ordinal) <= ($6, $7)
    ON CONFLICT DO NOTHING
), attached AS (
    INSERT INTO copied_attachments (copy_id, turn, ordinal, n, is_text, name, mime_type, content)
    SELECT copy_id, turn, ordinal, n, is_text, name, mime_type, content
    FROM held CROSS JOIN messages
        JOIN attachments ON attachments.tenant = $2 AND attachments.run_id = messages.run_id
    WHERE messages.tenant = $2 AND messages.session_id = $3 AND role = 'user'
        AND (turn, ordinal) > ($4, $5) AND (turn, ordinal) <= ($6, $7)
    ON CONFLICT DO NOTHING
)
SELECT EXISTS (SELECT FROM held) AS held;

-- name: copy_copied_messages
WITH held AS (
    UPDATE unfinished_copies SET touched_at = now() WHERE copy_id = $1 RETURNING copy_id
), made AS (
    INSERT INTO copied_messages (
        copy_id, turn, ordinal, created_at, attachments, message_id, run_id, role, finish_reason,
        model, parts, prompt
    )
    SELECT
        held.copy_id, turn, ordinal, created_at, attachments, message_id, run_id, role,
        finish_reason, model, parts, prompt
    FROM held CROSS JOIN copied_messages AS source
    WHERE source.copy_id = $2 AND (turn, ordinal) > ($3, $4) AND (turn, ordinal) <= ($5, $6)
    ON CONFLICT DO NOTHING
), attached AS (
    INSERT INTO copied_attachments (copy_id, turn, ordinal, n, is_text, name, mime_type, content)
    SELECT held.copy_id, turn, ordinal, n, is_text, name, mime_type, content
    FROM held CROSS JOIN copied_attachments AS source
    WHERE source.copy_id = $2 AND (turn, ordinal) > ($3, $4) AND (turn, ordinal) <= ($5, $6)
    ON CONFLICT DO NOTHING
)
SELECT EXISTS (SELECT FROM held) AS held;

-- name: copy_parts
WITH held AS (
    UPDATE unfinished_copies SET touched_at = now() WHERE copy_id = $1 RETURNING copy_id
), made AS (
    INSERT INTO copied_parts (copy_id, attempt, n, run_id, part)
    SELECT copy_id, attempt, n, run_id, part FROM held CROSS JOIN kept_parts
    WHERE tenant = $2 AND run_id = $3 AND attempt = $4 AND n BETWEEN $5 AND $6
    ON CONFLICT DO NOTHING
)
SELECT EXISTS (SELECT FROM held) AS held;

-- name: copy_copied_parts
WITH held AS (
    UPDATE unfinished_copies SET touched_at = now() WHERE copy_id = $1 RETURNING copy_id
), made AS (
    INSERT INTO copied_parts (copy_id, attempt, n, run_id, part)
    SELECT held.copy_id, attempt, n, run_id, part FROM held CROSS JOIN copied_parts AS source
    WHERE source.copy_id = $2 AND run_id = $3 AND attempt = $4 AND n BETWEEN $5 AND $6
    ON CONFLICT DO NOTHING
)
SELECT EXISTS (SELECT FROM held) AS held;

-- name: create_fork
SELECT create_fork($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) AS version;

-- name: recount_stored_bytes
-- After a message was replaced; the numbers are those of store/weight.py. Labels count as JSON.
UPDATE sessions SET stored_bytes =
    octet_length(title) + coalesce(octet_length(metadata), 0) + (
        SELECT coalesce(sum(200 + coalesce(octet_length(parts), 0)), 0) FROM messages
        WHERE tenant = $1 AND session_id = $2
    ) + (
        SELECT coalesce(sum(octet_length(part)), 0) FROM kept_parts JOIN runs USING (tenant, run_id)
        WHERE tenant = $1 AND session_id = $2 AND ended_at IS NOT NULL
    ) + (
        SELECT coalesce(sum(
            500 + octet_length(prompt_head) + coalesce(octet_length(metadata), 0)
            + coalesce((
                SELECT octet_length(rest) FROM prompts
                WHERE prompts.tenant = $1 AND prompts.run_id = runs.run_id
            ), 0) + coalesce((
                SELECT sum(octet_length(content)) FROM attachments AS kept
                WHERE kept.tenant = $1 AND kept.run_id = runs.run_id
            ), 0)
        ), 0) FROM runs WHERE tenant = $1 AND session_id = $2
    ) + (
        SELECT coalesce(sum(500 + octet_length(question) + coalesce(octet_length(answer), 0)), 0)
        FROM input_requests WHERE tenant = $1 AND session_id = $2
    ) + (
        SELECT coalesce(sum(
            200 + coalesce(octet_length(parts), 0) + coalesce(octet_length(prompt), 0)
        ), 0) FROM copied_messages AS copied WHERE copied.copy_id = sessions.copy_id
    ) + (
        SELECT coalesce(sum(octet_length(content)), 0) FROM copied_attachments AS copied
        WHERE copied.copy_id = sessions.copy_id
    ) + (
        SELECT coalesce(sum(octet_length(part)), 0) FROM copied_parts AS copied
        WHERE copied.copy_id = sessions.copy_id
    )
WHERE tenant = $1 AND session_id = $2;

-- name: edit_session
UPDATE sessions SET
    version = version + 1,
    title = $4,
    metadata = $5,
    agent = $3,
    stored_bytes = stored_bytes + $6,
    updated_at = greatest(updated_at, $7)
WHERE tenant = $1 AND session_id = $2 AND title = $8 AND metadata IS NOT DISTINCT FROM $9
    AND agent = $10
RETURNING version;

-- name: turn_of_run
SELECT turn FROM runs WHERE tenant = $1 AND run_id = $2 AND session_id = $3;

-- name: kept_parts
SELECT attempt, n, part FROM kept_parts WHERE tenant = $1 AND run_id = $2;

-- Reading: the event log. compacted is of the same snapshot; an empty page has one row.

-- name: log_sizes
SELECT bytes FROM log_sizes();

-- name: tenant_logs
SELECT tenant, compacted FROM tenant_logs;

-- name: log_after
-- Events of all tenants, for the follower of the log.
SELECT compacted, position, tenant, session_id, run_id, ended_at, body, found FROM store LEFT JOIN (
    SELECT
        position, tenant, session_id, run_id, ended_at, body, count(*) OVER () AS found,
        sum(size) OVER (ORDER BY position) - size AS before
    FROM (
        SELECT position, tenant, session_id, run_id, ended_at, body, octet_length(body) AS size
        FROM events
        WHERE position > $1 AND position <= $2 ORDER BY position LIMIT $3
    ) AS first
) AS sized ON before <= $4
ORDER BY position;

-- name: events
-- In rows of (tenant, position), so that the planner cannot walk the events of other tenants.
SELECT compacted, position, tenant, session_id, run_id, ended_at, body, found FROM (
    SELECT coalesce(max(compacted), 0) AS compacted FROM tenant_logs WHERE tenant IN ('', $1)
) AS log LEFT JOIN (
    SELECT
        position, tenant, session_id, run_id, ended_at, body, count(*) OVER () AS found,
        sum(size) OVER (ORDER BY position) - size AS before
    FROM (
        SELECT position, tenant, session_id, run_id, ended_at, body, octet_length(body) AS size
        FROM events
        WHERE (tenant, position) > ($1, $2) AND (tenant, position) <= ($1, $3)
        ORDER BY tenant, position LIMIT $4
    ) AS first
) AS sized ON before <= $5
ORDER BY position;

-- name: events_of
-- One seek per id reads at most a page of its events, however long the log is.
SELECT compacted, position, tenant, session_id, run_id, ended_at, body, found FROM (
    SELECT coalesce(max(compacted), 0) AS compacted FROM tenant_logs WHERE tenant IN ('', $1)
) AS log LEFT JOIN (
    SELECT
        position, tenant, session_id, run_id, ended_at, body, count(*) OVER () AS found,
        sum(size) OVER (ORDER BY position) - size AS before
    FROM (
        SELECT
            position, events.tenant, events.session_id, events.run_id, ended_at, body,
            octet_length(body) AS size
        FROM (
            SELECT own.position FROM unnest($6::text[]) AS wanted (id) CROSS JOIN LATERAL (
                SELECT events.position FROM events
                WHERE tenant = $1 AND session_id = wanted.id
                    AND events.position > $2 AND events.position <= $3
                ORDER BY events.position LIMIT $4
            ) AS own
            UNION
            SELECT own.position FROM unnest($7::text[]) AS wanted (id) CROSS JOIN LATERAL (
                SELECT events.position FROM events
                WHERE tenant = $1 AND run_id = wanted.id
                    AND events.position > $2 AND events.position <= $3
                ORDER BY events.position LIMIT $4
            ) AS own
            ORDER BY position LIMIT $4
        ) AS places JOIN events USING (position)
    ) AS first
) AS sized ON before <= $5
ORDER BY position;

-- name: position_of_run
-- The last one: a run of a deleted session may have had the same id.
SELECT position FROM events
WHERE tenant = $1 AND run_id = $2 ORDER BY position DESC LIMIT 1;

-- Nodes. All times are those of the database.

-- name: join
-- A node that was declared dead cannot join again.
INSERT INTO nodes (node_id, address) VALUES ($1, $2)
ON CONFLICT (node_id) DO UPDATE SET address = excluded.address, heartbeat = clock_timestamp()
WHERE NOT nodes.lost;

-- name: beat
-- It updates its own row first and skips other rows that are locked, so that no deadlock can occur. A
-- node that was silent for a lease, as after an outage of the database, declares no node dead for a
-- lease; nor does any node within a lease after the start of the database.
WITH own AS MATERIALIZED (
    UPDATE nodes SET
        heartbeat = clock_timestamp(),
        steady_since = CASE WHEN heartbeat < now() - $2::interval THEN now() ELSE steady_since END
    WHERE node_id = $1 AND NOT lost
    RETURNING steady_since
), silent AS MATERIALIZED (
    SELECT node_id, heartbeat < now() - greatest($3::interval, $2::interval) AS forgotten
    FROM nodes
    WHERE node_id <> $1 AND heartbeat < now() - $2::interval
        AND (SELECT steady_since FROM own) <= now() - $2::interval
        AND pg_postmaster_start_time() <= now() - $2::interval
    FOR UPDATE SKIP LOCKED
), lost AS (
    UPDATE nodes SET lost = true
    WHERE node_id IN (SELECT node_id FROM silent WHERE NOT forgotten) AND NOT lost
), forgotten AS (
    DELETE FROM nodes WHERE node_id IN (SELECT node_id FROM silent WHERE forgotten)
)
SELECT EXISTS (SELECT FROM own) AS alive;

-- name: leave
DELETE FROM nodes WHERE node_id = $1;

-- name: lost_runs
-- One seek per host; it reads only the runs of lost hosts. Of the runs that wait for input only those
-- whose agent waits on a node have one. A cancelled run without a host was waiting without a node.
-- Only the share of the node $2 among those that are alive; of all runs if it is ''.
WITH RECURSIVE share AS MATERIALIZED (
    SELECT count(*) AS nodes, count(*) FILTER (WHERE node_id < $2) AS place
    FROM nodes WHERE NOT lost
), hosts (host) AS (
    (
        SELECT host FROM runs
        WHERE state IN ('active', 'cancelling') AND folded_into = '' AND run_no > 0
        ORDER BY host LIMIT 1
    )
    UNION ALL
    SELECT (
        SELECT runs.host FROM runs
        WHERE state IN ('active', 'cancelling') AND folded_into = '' AND run_no > 0
            AND runs.host > hosts.host
        ORDER BY runs.host LIMIT 1
    )
    FROM hosts WHERE hosts.host IS NOT NULL
), asking_hosts (host) AS (
    (
        SELECT host FROM runs
        WHERE state = 'input_required' AND host <> '' AND run_no > 0
        ORDER BY host LIMIT 1
    )
    UNION ALL
    SELECT (
        SELECT runs.host FROM runs
        WHERE state = 'input_required' AND runs.host <> '' AND run_no > 0
            AND runs.host > asking_hosts.host
        ORDER BY runs.host LIMIT 1
    )
    FROM asking_hosts WHERE asking_hosts.host IS NOT NULL
), gone AS MATERIALIZED (
    SELECT host FROM (
        SELECT host FROM hosts UNION SELECT host FROM asking_hosts
    ) AS every
    WHERE host IS NOT NULL
        AND NOT EXISTS (SELECT FROM nodes WHERE nodes.node_id = every.host AND NOT nodes.lost)
)
SELECT tenant, session_id, run_id, attempt, host FROM (
    SELECT lost.*, gone.host
    FROM gone CROSS JOIN share
        CROSS JOIN (VALUES ('active'), ('cancelling')) AS wanted (state)
        CROSS JOIN LATERAL (
            SELECT tenant, session_id, run_id, attempt, started_at FROM runs
            WHERE runs.host = gone.host AND runs.state = wanted.state
                AND runs.state IN ('active', 'cancelling') AND folded_into = '' AND run_no > 0
                AND ($2 = '' OR (hashtext(run_id) & 1048575) % share.nodes = share.place)
            ORDER BY started_at LIMIT $1
        ) AS lost
    UNION ALL
    SELECT lost.*, gone.host
    FROM gone CROSS JOIN share CROSS JOIN LATERAL (
        SELECT tenant, session_id, run_id, attempt, started_at FROM runs
        WHERE runs.host = gone.host AND runs.state = 'input_required' AND runs.host <> ''
            AND run_no > 0
            AND ($2 = '' OR (hashtext(run_id) & 1048575) % share.nodes = share.place)
        ORDER BY started_at LIMIT $1
    ) AS lost
) AS every
ORDER BY started_at LIMIT $1;

-- name: answered_runs
SELECT tenant, session_id, run_no FROM runs
WHERE host IN ('', $1) AND state = 'input_required' AND left(asking, 4) = '[[],'
    AND run_no > greatest($2::bigint, 0)
ORDER BY run_no LIMIT $3;

-- name: cancelled_runs
SELECT tenant, session_id, run_id, attempt FROM runs
WHERE host = $1 AND state = 'cancelling' AND folded_into = '' AND run_no > 0
ORDER BY started_at;

-- name: claim
-- One seek per agent and tenant with lanes to claim, for at most its share of them, so that a tenant
-- with thousands delays no other, and lanes that wait for another agent delay none. $4 and $5 are the
-- tenants that were served, the next one first, and the number of further lanes that the node can
-- serve of each; $6 is that number for all other tenants, which come first. $7 and $8 are the agents
-- whose runs the node can execute, and the number of further lanes of each.
--
-- It waits for no lock: it skips lanes that are being written or claimed by another node, and those
-- that were written after its snapshot, because their ctid has changed.
WITH RECURSIVE heads (agent, room, tenant, waiting_since) AS (
    SELECT wanted.agent, wanted.room, head.tenant, head.waiting_since
    FROM ROWS FROM (unnest($7::text[]), unnest($8::bigint[])) AS wanted (agent, room)
        CROSS JOIN LATERAL (
            SELECT tenant, waiting_since FROM sessions
            WHERE active_run_id = '' AND waiting_runs > 0 AND next_agent = wanted.agent
                AND (claimed_until IS NULL OR claimed_until <= now() OR claimed_by = $1)
            ORDER BY tenant, waiting_since LIMIT 1
        ) AS head
    UNION ALL
    SELECT heads.agent, heads.room, head.tenant, head.waiting_since FROM heads CROSS JOIN LATERAL (
        SELECT sessions.tenant, sessions.waiting_since FROM sessions
        WHERE active_run_id = '' AND waiting_runs > 0 AND next_agent = heads.agent
            AND sessions.tenant > heads.tenant
            AND (claimed_until IS NULL OR claimed_until <= now() OR claimed_by = $1)
        ORDER BY sessions.tenant, sessions.waiting_since LIMIT 1
    ) AS head
), turns AS MATERIALIZED (
    SELECT
        heads.tenant, coalesce(served.room, $6) AS room, count(*) AS agents,
        min(heads.waiting_since) AS waiting_since, served.n
    FROM heads
        LEFT JOIN ROWS FROM (unnest($4::text[]), unnest($5::bigint[])) WITH ORDINALITY
            AS served (tenant, room, n) ON served.tenant = heads.tenant
    WHERE coalesce(served.room, $6::bigint) > 0
    GROUP BY heads.tenant, served.room, served.n
    ORDER BY served.n NULLS FIRST, min(heads.waiting_since) LIMIT $2
), share AS MATERIALIZED (
    SELECT $2 / greatest(count(*), 1) AS lanes FROM turns
), next AS MATERIALIZED (
    SELECT own.ctid FROM turns JOIN heads USING (tenant) CROSS JOIN LATERAL (
        SELECT sessions.ctid FROM sessions
        WHERE active_run_id = '' AND waiting_runs > 0 AND sessions.tenant = turns.tenant
            AND next_agent = heads.agent
            AND (claimed_until IS NULL OR claimed_until <= now() OR claimed_by = $1)
        ORDER BY waiting_since
        -- The agents of a tenant divide its share.
        LIMIT least(
            heads.room,
            greatest(least(turns.room, (SELECT lanes FROM share)) / turns.agents, 1)
        )
        FOR UPDATE SKIP LOCKED
    ) AS own
), claimed AS (
    UPDATE sessions SET claimed_by = $1, claimed_until = clock_timestamp() + $3::interval
    WHERE ctid = ANY (ARRAY(SELECT ctid FROM next LIMIT $2))
    RETURNING tenant, session_id, waiting_since
)
SELECT tenant, session_id FROM claimed ORDER BY waiting_since;

-- name: waiting_runs
SELECT tenant, sum(waiting_runs)::bigint AS runs FROM sessions
WHERE waiting_runs > 0 GROUP BY tenant;

-- name: lane_versions
SELECT wanted.tenant, wanted.session_id, session.version
FROM unnest($1::text[], $2::text[]) AS wanted (tenant, session_id)
    CROSS JOIN LATERAL (
        SELECT version FROM sessions
        WHERE sessions.tenant = wanted.tenant AND sessions.session_id = wanted.session_id
        LIMIT 1
    ) AS session;

-- name: hosts
SELECT wanted.tenant, wanted.run_id, nodes.address
FROM unnest($1::text[], $2::text[]) AS wanted (tenant, run_id)
    CROSS JOIN LATERAL (
        SELECT host FROM runs
        WHERE runs.tenant = wanted.tenant AND runs.run_id = wanted.run_id
        LIMIT 1
    ) AS run
    JOIN nodes ON nodes.node_id = run.host
WHERE NOT nodes.lost;

-- Repair

-- name: is_end
-- Whether an event is the last one of a run that has ended.
SELECT EXISTS (
    SELECT FROM runs WHERE tenant = $1 AND run_id = $2 AND ended_at IS NOT NULL AND $3 = (
        SELECT max(idx) FROM run_events WHERE tenant = $1 AND run_id = $2
    )
);
