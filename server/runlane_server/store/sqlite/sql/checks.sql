-- The invariants of a database, by name. Each statement returns one sentence per violation.
--
-- They read whole tables, in the order of an index where that avoids a sort. A run id may
-- be used again some time after its session was deleted, while the terminal event of the first run
-- stays in the log: the event of a run is one that ended no earlier than the run was accepted.
--
-- The rows of a session that is being removed are gone in part: no check reads them.

-- name: meta
SELECT 'the file has no ' || wanted.name
FROM (
    SELECT 'store_id' AS name UNION ALL SELECT 'compacted'
) AS wanted LEFT JOIN meta USING (name)
WHERE meta.value IS NULL OR (name = 'store_id' AND length(meta.value) NOT IN (0, 8));

-- name: lanes
WITH held AS MATERIALIZED (
    SELECT
        tenant, session_id,
        count(*) FILTER (
            WHERE state IN ('active', 'input_required', 'cancelling') AND folded_into = ''
        ) AS active,
        max(run_id) FILTER (
            WHERE state IN ('active', 'input_required', 'cancelling') AND folded_into = ''
        ) AS run_id,
        count(*) FILTER (WHERE state IN ('accepted', 'queued')) AS waiting
    FROM runs INDEXED BY runs_open
    WHERE ended_at IS NULL
    GROUP BY tenant, session_id
)
SELECT 'session ' || tenant || '/' || session_id || problem FROM (
    SELECT
        sessions.tenant, sessions.session_id,
        CASE
            WHEN active > 1 THEN ' has ' || active || ' active runs'
            WHEN active_run_id <> '' AND NOT EXISTS (
                SELECT 1 FROM runs
                WHERE runs.tenant = sessions.tenant AND runs.run_id = active_run_id
            ) THEN ' names the active run ' || active_run_id || ', which does not exist'
            WHEN active_run_id <> coalesce(run_id, '')
                THEN ' names the active run ''' || active_run_id || ''' instead of ''' ||
                    coalesce(run_id, '') || ''''
            WHEN waiting_runs <> coalesce(waiting, 0)
                THEN ' counts ' || waiting_runs || ' waiting runs instead of ' ||
                    coalesce(waiting, 0)
        END AS problem
    FROM sessions LEFT JOIN held USING (tenant, session_id)
) WHERE problem IS NOT NULL;

-- name: waiting
SELECT 'run ' || tenant || '/' || run_id || problem FROM (
    SELECT
        tenant, run_id,
        CASE
            WHEN rank = before THEN ' has the rank of another waiting run'
            WHEN (state = 'accepted') <> (place = 1 AND active_run_id = '')
                THEN ' is ' || state || ' at place ' || place || ' of its lane, with ' ||
                    iif(active_run_id = '', 'no active run', 'the active run ' || active_run_id)
        END AS problem
    FROM (
        SELECT
            tenant, session_id, run_id, state, rank, lag(rank) OVER line AS before,
            row_number() OVER line AS place
        FROM runs INDEXED BY runs_open
        WHERE ended_at IS NULL AND state IN ('accepted', 'queued')
        WINDOW line AS (PARTITION BY tenant, session_id ORDER BY rank)
    ) JOIN sessions USING (tenant, session_id)
) WHERE problem IS NOT NULL;

-- name: runs
SELECT 'run ' || tenant || '/' || run_id || problem FROM (
    SELECT
        runs.tenant, run_id,
        CASE
            WHEN sessions.session_id IS NULL
                THEN ' belongs to session ' || runs.session_id || ', which does not exist'
            WHEN (state IN ('completed', 'cancelled', 'failed')) <> (ended_at IS NOT NULL)
                THEN ' is ' || state || ', but has ' || iif(ended_at IS NULL, 'no', 'an') || ' end'
            WHEN ended_at IS NOT NULL AND (finish_reason IS NULL OR message_id IS NULL)
                THEN ' has ended without a finish reason or a message id'
            WHEN runs.accept_seq > sessions.accept_seq
                THEN ' has accept_seq ' || runs.accept_seq || '; that of its session is ' ||
                    sessions.accept_seq
            WHEN runs.turn > sessions.turn
                THEN ' has turn ' || runs.turn || '; that of its session is ' || sessions.turn
        END AS problem
    FROM runs LEFT JOIN sessions USING (tenant, session_id)
    WHERE (runs.tenant, runs.session_id)
        NOT IN (SELECT tenant, session_id FROM removals)
) WHERE problem IS NOT NULL;

-- name: deleted_runs
SELECT 'run ' || tenant || '/' || run_id || ' exists, but is remembered as deleted'
FROM deleted_runs JOIN runs USING (tenant, run_id);

-- name: inputs
-- An open request belongs to a run that has not ended.
SELECT 'input request ' || tenant || '/' || input_request_id || problem FROM (
    SELECT
        input_requests.tenant, input_request_id,
        CASE
            WHEN runs.run_no IS NULL
                THEN ' belongs to run ' || input_requests.run_id || ', which does not exist'
            WHEN input_requests.state = 'open' AND ended_at IS NOT NULL
                THEN ' is open, but its run has ended'
            WHEN (input_requests.state = 'open') <> (closed_at IS NULL)
                THEN ' is ' || input_requests.state || ', but has ' ||
                    iif(closed_at IS NULL, 'no', 'an') || ' end'
            WHEN input_requests.state = 'answered' AND answer IS NULL
                THEN ' is answered, but has no answer'
        END AS problem
    FROM input_requests LEFT JOIN runs USING (tenant, run_id)
) WHERE problem IS NOT NULL
UNION ALL
SELECT 'run ' || tenant || '/' || run_id || ' waits for ' || waiting || ' input requests, but ' ||
    pending || ' are open'
FROM (
    SELECT
        tenant, run_id, json_array_length(asking, '$[0]') AS waiting,
        (
            SELECT count(*) FROM input_requests
            WHERE input_requests.tenant = runs.tenant AND input_requests.run_id = runs.run_id
                AND state = 'open'
        ) AS pending
    FROM runs WHERE asking IS NOT NULL
) WHERE waiting <> pending;

-- name: accept_order
SELECT
    'run ' || tenant || '/' || run_id || ' has accept_seq ' || accept_seq || ' after ' || before
FROM (
    SELECT tenant, run_id, accept_seq, lag(accept_seq, 1, 0) OVER accepts AS before
    FROM runs INDEXED BY runs_by_session
    WINDOW accepts AS (PARTITION BY tenant, session_id ORDER BY run_no)
) WHERE accept_seq <= before;

-- name: folds
SELECT 'run ' || tenant || '/' || run_id || ' is folded into ' || folded_into || problem FROM (
    SELECT
        run.tenant, run.run_id, run.folded_into,
        CASE
            WHEN host.run_id IS NULL THEN ', which does not exist'
            WHEN host.session_id <> run.session_id THEN ', which belongs to another session'
            WHEN host.folded_into <> '' THEN ', which is folded itself'
            WHEN host.turn <> run.turn
                THEN ', but has turn ' || run.turn || ' instead of ' || host.turn
            WHEN run.ended_at IS NULL AND host.state NOT IN ('active', 'input_required', 'cancelling')
                THEN ', which is ' || host.state || ', but is ' || run.state
            WHEN run.message_id <> '' AND run.message_id IS NOT host.message_id
                THEN ', but has another last message'
        END AS problem
    FROM runs AS run LEFT JOIN runs AS host
        ON host.tenant = run.tenant AND host.run_id = run.folded_into
    WHERE run.folded_into <> ''
        AND (run.tenant, run.session_id) NOT IN (SELECT tenant, session_id FROM removals)
) WHERE problem IS NOT NULL;

-- name: turns
-- A folded run that was cancelled by itself ends before its turn does, and has no last message.
SELECT 'run ' || tenant || '/' || run_id || problem FROM (
    SELECT
        tenant, run_id,
        CASE
            WHEN asked <> 1 AND (folded_into = '' OR message_id <> '')
                THEN ' has its prompt ' || asked || ' times in turn ' || turn
            WHEN ended_at IS NOT NULL AND message_id = ''
                AND NOT (folded_into <> '' AND state = 'cancelled')
                THEN ' has ended without a last message'
            WHEN message_id <> '' AND last IS NOT message_id || ' ' || finish_reason
                THEN ' ended with message ' || message_id || ' (' || finish_reason ||
                    '); its turn ends with ' || coalesce(last, 'none')
        END AS problem
    FROM (
        SELECT
            tenant, run_id, turn, state, folded_into, ended_at, message_id, finish_reason,
            (
                SELECT count(*) FROM messages
                WHERE messages.tenant = runs.tenant AND messages.session_id = runs.session_id
                    AND messages.turn = runs.turn AND messages.run_id = runs.run_id
                    AND role = 'user' AND (ordinal = 0) = (folded_into = '')
            ) AS asked,
            (
                SELECT messages.message_id || ' ' || coalesce(messages.finish_reason, '')
                FROM messages
                WHERE messages.tenant = runs.tenant AND messages.session_id = runs.session_id
                    AND messages.turn = runs.turn AND role = 'assistant'
                ORDER BY ordinal DESC LIMIT 1
            ) AS last
        FROM runs
        WHERE (turn > 0 OR ended_at IS NOT NULL)
            AND (tenant, session_id) NOT IN (SELECT tenant, session_id FROM removals)
    )
) WHERE problem IS NOT NULL;

-- name: messages
SELECT 'message ' || tenant || '/' || message_id || problem FROM (
    SELECT
        messages.tenant, messages.message_id,
        CASE
            WHEN runs.run_id IS NULL
                THEN ' belongs to run ' || messages.run_id || ', which does not exist'
            WHEN runs.session_id <> messages.session_id
                THEN ' is in session ' || messages.session_id || '; its run is in ' || runs.session_id
            WHEN runs.turn <> messages.turn
                THEN ' is in turn ' || messages.turn || '; its run is in ' || runs.turn
            WHEN role = 'user' AND (ordinal = 0) <> (folded_into = '')
                THEN ' is a prompt at the wrong place of its turn'
        END AS problem
    FROM messages LEFT JOIN runs
        ON runs.tenant = messages.tenant AND runs.run_id = messages.run_id
) WHERE problem IS NOT NULL;

-- name: message_order
SELECT
    'turn ' || turn || ' of session ' || tenant || '/' || session_id || ' has ' || count(*) ||
    ' messages, numbered from ' || min(ordinal) || ' to ' || max(ordinal)
FROM messages AS counted
WHERE (tenant, session_id) NOT IN (SELECT tenant, session_id FROM removals)
GROUP BY tenant, session_id, turn
HAVING min(ordinal) <> 0
    OR (
        max(ordinal) <> count(*) - 1
        -- Each attempt begins at a place of its own, 2^20 behind that of the one before it.
        AND EXISTS (
            SELECT 1 FROM messages AS later
            WHERE later.tenant = counted.tenant AND later.session_id = counted.session_id
                AND later.turn = counted.turn
                AND (later.ordinal - 1) % 1048576 > 0
                AND NOT EXISTS (
                    SELECT 1 FROM messages AS earlier
                    WHERE earlier.tenant = later.tenant AND earlier.session_id = later.session_id
                        AND earlier.turn = later.turn AND earlier.ordinal = later.ordinal - 1
                )
        )
    );

-- name: copies
-- The copies that forks begin with.
SELECT 'session ' || tenant || '/' || session_id || ' began with ' || origin_turn ||
    ' turns of its origin, but has ' || found
FROM (
    SELECT
        tenant, session_id, origin_turn,
        (
            SELECT count(DISTINCT copied_messages.turn) FROM copied_messages
            WHERE copied_messages.copy_id = sessions.copy_id
        ) AS found
    FROM sessions WHERE copy_id IS NOT NULL
) AS fork WHERE found <> origin_turn
UNION ALL
SELECT DISTINCT 'copy ' || copy_id || ' of a transcript belongs to no session'
FROM copied_messages
WHERE copy_id NOT IN (
    SELECT copy_id FROM sessions WHERE copy_id IS NOT NULL
    UNION ALL
    SELECT copy_id FROM unfinished_copies
    UNION ALL
    SELECT copy_id FROM dropped_copies
);

-- name: prompts
SELECT 'the prompt of run ' || tenant || '/' || run_id || ' has no run'
FROM prompts LEFT JOIN runs USING (tenant, run_id) WHERE runs.run_no IS NULL;

-- name: attachments
SELECT 'attachment ' || n || ' of run ' || tenant || '/' || run_id || ' has no run'
FROM attachments LEFT JOIN runs USING (tenant, run_id) WHERE runs.run_no IS NULL
UNION ALL
SELECT 'run ' || tenant || '/' || run_id || ' has ' || found || ' attachments instead of ' || attachments
FROM (
    SELECT
        tenant, run_id, attachments,
        (
            SELECT count(*) FROM attachments AS kept
            WHERE kept.tenant = runs.tenant AND kept.run_id = runs.run_id
        ) AS found
    FROM runs
) WHERE found <> attachments;

-- name: kept_parts
SELECT 'part ' || n || ' of attempt ' || kept_parts.attempt || ' of run ' || tenant || '/' ||
    run_id || ' has no run'
FROM kept_parts LEFT JOIN runs USING (tenant, run_id) WHERE runs.run_no IS NULL;

-- name: run_events
-- Compaction removes all events of a run but the last together with its terminal event in the log. A
-- part of them may be missing earlier, while that terminal event is the oldest one of its tenant.
SELECT 'run ' || tenant || '/' || run_id || problem FROM (
    SELECT
        tenant, run_id,
        CASE
            WHEN run_no IS NULL THEN ' has events, but does not exist'
            WHEN n <> last - first + 1
                THEN ' has ' || n || ' events, numbered from ' || first || ' to ' || last
            WHEN ended_at IS NULL AND ends > 0 THEN ' has not ended, but has a run_complete'
            WHEN ended_at IS NOT NULL AND (ends <> 1 OR ended <> last)
                THEN ' has ended, but its last event is not its only run_complete'
            WHEN first > 1 AND ended_at IS NULL THEN ' has lost its first events'
            WHEN first > 1 AND position > (
                SELECT min(position) FROM events WHERE events.tenant = ended.tenant
            ) THEN ' has lost its first events, but not its terminal event'
            WHEN n > 1 AND ended_at IS NOT NULL AND position IS NULL
                THEN ' has all its events, but no terminal event in the log'
        END AS problem
    FROM (
        SELECT
            numbered.*, run_no, ended_at,
            (
                SELECT max(position) FROM events
                WHERE events.tenant = numbered.tenant AND events.run_id = numbered.run_id
            ) AS position
        FROM (
            SELECT
                tenant, run_id, min(idx) AS first, max(idx) AS last, count(*) AS n,
                count(*) FILTER (WHERE kind = 'run_complete') AS ends,
                max(idx) FILTER (WHERE kind = 'run_complete') AS ended
            FROM run_events GROUP BY tenant, run_id
        ) AS numbered LEFT JOIN runs USING (tenant, run_id)
        WHERE run_no IS NULL OR (tenant, session_id) NOT IN (SELECT tenant, session_id FROM removals)
    ) AS ended
) WHERE problem IS NOT NULL
UNION ALL
SELECT 'run ' || tenant || '/' || run_id || ' has no events' FROM runs WHERE NOT EXISTS (
    SELECT 1 FROM run_events
    WHERE run_events.tenant = runs.tenant AND run_events.run_id = runs.run_id
);

-- name: events
-- Positions are missing only up to the last one that compaction removed.
SELECT 'position ' || position || ' of the event log' || problem FROM (
    SELECT
        position,
        CASE
            WHEN position > before + 1 AND position > compacted + 1 THEN ' follows ' || before
            WHEN position <= tenant_compacted THEN ' should have been removed'
            WHEN log_bytes <= bytes_before THEN ' does not increase log_bytes'
        END AS problem
    FROM (
        SELECT
            position, log_bytes,
            lag(position, 1, 0) OVER (ORDER BY position) AS before,
            (SELECT value FROM meta WHERE name = 'compacted') AS compacted,
            (
                SELECT max(compacted) FROM tenant_logs WHERE tenant IN ('', events.tenant)
            ) AS tenant_compacted,
            lag(
                log_bytes, 1, coalesce(
                    (SELECT compacted_bytes FROM tenant_logs WHERE tenant = events.tenant), 0
                )
            ) OVER (PARTITION BY tenant ORDER BY position) AS bytes_before
        FROM events
    )
) WHERE problem IS NOT NULL
UNION ALL
SELECT 'the row compacted of meta is ' || value || ', but the last event removed is ' || last
FROM (
    SELECT value, coalesce((SELECT max(compacted) FROM tenant_logs), 0) AS last
    FROM meta WHERE name = 'compacted'
) WHERE value <> last;

-- name: terminal_events
-- An event may have no run: it remains in the log after its session was deleted.
SELECT 'the terminal event at position ' || position || ' belongs to run ' || tenant || '/' || run_id || problem
FROM (
    SELECT
        events.position, events.tenant, events.run_id,
        CASE
            WHEN runs.run_no IS NULL AND EXISTS (
                SELECT 1 FROM sessions
                WHERE sessions.tenant = events.tenant AND sessions.session_id = events.session_id
                    AND sessions.created_at < events.ended_at
            ) THEN ', which does not exist'
            WHEN runs.run_no IS NULL OR events.ended_at < runs.accepted_at THEN NULL
            WHEN runs.ended_at IS NULL THEN ', which has not ended'
            WHEN runs.session_id <> events.session_id THEN ', which belongs to another session'
            WHEN EXISTS (
                SELECT 1 FROM events AS other
                WHERE other.tenant = events.tenant AND other.run_id = events.run_id
                    AND other.position < events.position AND other.ended_at >= runs.accepted_at
            ) THEN ', which has an earlier one'
            WHEN events.ended_at <> runs.ended_at
                OR json_extract(events.body, '$.state') <> runs.state
                OR json_extract(events.body, '$.finish_reason') <> runs.finish_reason
                OR json_extract(events.body, '$.message_id') <> runs.message_id
                THEN ', and describes another end'
        END AS problem
    FROM events LEFT JOIN runs ON runs.tenant = events.tenant AND runs.run_id = events.run_id
) WHERE problem IS NOT NULL;

-- name: usage
-- The sum of a session that has reached the largest number is not checked: it would overflow.
WITH summed AS MATERIALIZED (
    SELECT * FROM sessions
    WHERE 9223372036854775807 NOT IN (
        input_tokens, output_tokens, cache_read_tokens, cache_write_tokens, requests
    )
), spent AS MATERIALIZED (
    SELECT
        tenant, session_id,
        sum(json_extract(usage, '$[0]')) AS input, sum(json_extract(usage, '$[1]')) AS output,
        sum(json_extract(usage, '$[2]')) AS reads, sum(json_extract(usage, '$[3]')) AS writes,
        sum(json_extract(usage, '$[4]')) AS asked
    FROM runs INDEXED BY runs_by_session
    WHERE usage IS NOT NULL AND (tenant, session_id) IN (SELECT tenant, session_id FROM summed)
    GROUP BY tenant, session_id
)
SELECT 'the usage of session ' || tenant || '/' || session_id || ' is not the sum of its runs'
FROM summed LEFT JOIN spent USING (tenant, session_id)
WHERE
    (input_tokens, output_tokens, cache_read_tokens, cache_write_tokens, requests) <>
    (
        coalesce(input, 0), coalesce(output, 0), coalesce(reads, 0), coalesce(writes, 0),
        coalesce(asked, 0)
    );

-- name: stored_bytes
-- The numbers are those of store/weight.py. Titles and labels count since they are limited; what an
-- earlier version wrote does not have them. As JSON, labels are longer than what is counted of them.
WITH prompted AS MATERIALIZED (
    SELECT
        tenant, session_id,
        sum(500 + length(CAST(prompt_head AS BLOB)) + coalesce((
            SELECT length(CAST(rest AS BLOB)) FROM prompts
            WHERE prompts.tenant = runs.tenant AND prompts.run_id = runs.run_id
        ), 0) + coalesce(CASE WHEN attachments > 0 THEN (
            SELECT sum(length(CAST(content AS BLOB))) FROM attachments
            WHERE attachments.tenant = runs.tenant AND attachments.run_id = runs.run_id
        ) END, 0)) AS bytes,
        sum(coalesce(length(CAST(metadata AS BLOB)), 0)) AS labels
    FROM runs INDEXED BY runs_by_session
    GROUP BY tenant, session_id
), said AS MATERIALIZED (
    SELECT
        tenant, session_id,
        sum(200 + coalesce(length(CAST(parts AS BLOB)), 0) + iif(
            length(parts) > 1 << 20 AND json_valid(parts), (
                SELECT coalesce(sum(json_extract(value, '$[3]')), 0) FROM json_each(parts)
                WHERE json_extract(value, '$[0]') = 'kept'
            ), 0
        )) AS bytes
    FROM messages
    GROUP BY tenant, session_id
), questioned AS MATERIALIZED (
    SELECT
        tenant, session_id,
        sum(
            500 + length(CAST(question AS BLOB)) + coalesce(length(CAST(answer AS BLOB)), 0)
        ) AS bytes
    FROM input_requests
    GROUP BY tenant, session_id
), copied AS MATERIALIZED (
    SELECT copy_id, sum(bytes) AS bytes FROM (
        SELECT
            copy_id, 200 + coalesce(length(CAST(parts AS BLOB)), 0)
            + coalesce(length(CAST(prompt AS BLOB)), 0) AS bytes
        FROM copied_messages
        UNION ALL
        SELECT copy_id, length(CAST(content AS BLOB)) FROM copied_attachments
        UNION ALL
        SELECT copy_id, length(CAST(part AS BLOB)) FROM copied_parts
    ) GROUP BY copy_id
), counted AS MATERIALIZED (
    SELECT
        sessions.*, prompted.labels,
        coalesce(prompted.bytes, 0) + coalesce(said.bytes, 0) + coalesce(questioned.bytes, 0)
            + coalesce(copied.bytes, 0) AS bytes
    FROM sessions
        LEFT JOIN copied USING (copy_id)
        LEFT JOIN prompted USING (tenant, session_id)
        LEFT JOIN said USING (tenant, session_id)
        LEFT JOIN questioned USING (tenant, session_id)
)
SELECT 'session ' || tenant || '/' || session_id || ' counts ' || stored_bytes ||
    ' stored bytes instead of ' || bytes
FROM counted
WHERE stored_bytes - bytes NOT BETWEEN 0
    AND coalesce(labels, 0) + length(CAST(title AS BLOB)) +
        coalesce(length(CAST(metadata AS BLOB)), 0);
