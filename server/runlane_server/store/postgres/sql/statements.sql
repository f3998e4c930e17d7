-- Statements by name. What the store says to PostgreSQL while it serves is here, and in the functions
-- of the migrations. Each is one round trip.

-- Opening

-- name: settings
SELECT
    current_setting('server_encoding') AS encoding,
    current_setting('fsync') AS fsync,
    current_setting('synchronous_commit') AS durability;

-- name: lock_schema
-- Should this node stand still meanwhile, the others go on.
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
    store_id, compacted, coalesce((SELECT max(position) FROM events), compacted) AS position,
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
FROM commit_units($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11);

-- name: notify
SELECT pg_notify($1, $2);

-- name: compact
SELECT events, compacted, more FROM compact($1, $2, $3, $4, $5);

-- name: forget_removed
SELECT forget_removed($1, $2);

-- Reading: lanes

-- name: lane
-- A row for each open run; one with a NULL run_id for a session without any. The events are counted
-- here, as an append leaves the run's row alone.
SELECT
    sessions.version, sessions.accept_seq AS lane_accept_seq, sessions.turn AS lane_turn,
    runs.run_id, runs.accept_seq, runs.state, runs.when_busy, runs.accepted_at, runs.rank,
    runs.timeout, runs.max_attempts, runs.attempt, runs.turn, runs.started_at, runs.folded_into,
    runs.cancel_reason, runs.host, runs.trace,
    (
        SELECT coalesce(max(idx), 0) FROM run_events
        WHERE run_events.tenant = runs.tenant AND run_events.run_id = runs.run_id
    ) AS events
FROM sessions LEFT JOIN runs
    ON runs.tenant = sessions.tenant AND runs.session_id = sessions.session_id
        AND runs.ended_at IS NULL AND runs.run_no > 0
WHERE sessions.tenant = $1 AND sessions.session_id = $2
ORDER BY runs.accept_seq;

-- name: busy_sessions
SELECT
    tenant, session_id,
    bool_or(state IN ('active', 'cancelling')) AS active,
    count(*) FILTER (WHERE state IN ('accepted', 'queued')) AS waiting_runs
FROM runs
WHERE ended_at IS NULL AND run_no > 0
GROUP BY tenant, session_id
ORDER BY min(accepted_at), min(run_no);

-- Reading: runs

-- name: run
-- parts: of the message that the run ended with.
SELECT
    run_no, run_id, session_id, accept_seq, state, when_busy, turn, timeout, max_attempts, attempt,
    accepted_at, started_at, ended_at, folded_into, cancel_reason, finish_reason, error_reason,
    error_message, message_id, usage, metadata, prompt_fingerprint, prompt_head,
    (
        SELECT parts FROM messages
        WHERE messages.tenant = runs.tenant AND messages.session_id = runs.session_id
            AND messages.turn = runs.turn AND messages.message_id = runs.message_id
    ) AS parts
FROM runs WHERE tenant = $1 AND run_id = $2;

-- name: runs_of_session
SELECT
    run_no, run_id, session_id, accept_seq, state, when_busy, turn, timeout, max_attempts, attempt,
    accepted_at, started_at, ended_at, folded_into, cancel_reason, finish_reason, error_reason,
    error_message, message_id, usage, metadata, prompt_fingerprint, prompt_head
FROM runs
WHERE tenant = $1 AND session_id = $2 AND run_no > 0 AND run_no < $3
    AND state = ANY ($4::text[])
ORDER BY run_no DESC LIMIT $5;

-- name: runs_of_tenant
-- A page of each index that has some of them; merged, the page of all.
SELECT * FROM (
    (
        SELECT
            run_no, run_id, session_id, accept_seq, state, when_busy, turn, timeout, max_attempts,
            attempt, accepted_at, started_at, ended_at, folded_into, cancel_reason, finish_reason,
            error_reason, error_message, message_id, usage, metadata, prompt_fingerprint,
            prompt_head
        FROM runs
        WHERE tenant = $1 AND run_no > 0 AND run_no < $2 AND ended_at IS NULL
            AND state = ANY ($3::text[])
        ORDER BY run_no DESC LIMIT $5
    )
    UNION ALL
    SELECT ended.* FROM unnest($4::text[]) AS wanted (state) CROSS JOIN LATERAL (
        SELECT
            run_no, run_id, session_id, accept_seq, runs.state, when_busy, turn, timeout,
            max_attempts, attempt, accepted_at, started_at, ended_at, folded_into, cancel_reason,
            finish_reason, error_reason, error_message, message_id, usage, metadata,
            prompt_fingerprint, prompt_head
        FROM runs
        WHERE tenant = $1 AND runs.state = wanted.state AND run_no > 0 AND run_no < $2
            AND ended_at IS NOT NULL
        ORDER BY run_no DESC LIMIT $5
    ) AS ended
) AS found
ORDER BY run_no DESC LIMIT $5;

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
-- found: how many there are, of which those are returned that begin within so many bytes.
SELECT idx, at, kind, body, found FROM (
    SELECT
        idx, at, kind, body, count(*) OVER () AS found,
        sum(size) OVER (ORDER BY idx) - size AS before
    FROM (
        SELECT idx, at, kind, body, coalesce(octet_length(body), 0) AS size FROM run_events
        WHERE tenant = $1 AND run_id = $2 AND idx > $3 ORDER BY idx LIMIT $4
    ) AS first
) AS sized
WHERE before <= $5 ORDER BY idx;

-- Reading: sessions and transcripts

-- name: session
SELECT
    created_no, session_id, title, metadata, active_run_id, waiting_runs, input_tokens,
    output_tokens, cache_read_tokens, cache_write_tokens, requests, created_at, updated_at
FROM sessions WHERE tenant = $1 AND session_id = $2;

-- name: sessions
SELECT
    created_no, session_id, title, metadata, active_run_id, waiting_runs, input_tokens,
    output_tokens, cache_read_tokens, cache_write_tokens, requests, created_at, updated_at
FROM sessions
WHERE tenant = $1 AND created_no > 0 AND created_no < $2 ORDER BY created_no DESC LIMIT $3;

-- name: stored_bytes
SELECT coalesce(sum(stored_bytes), 0)::bigint AS bytes FROM sessions
WHERE tenant = $1 AND created_no > 0;

-- name: stale_sessions
SELECT tenant, session_id, version, accept_seq FROM sessions
WHERE active_run_id = '' AND waiting_runs = 0 AND updated_at < $1
ORDER BY updated_at LIMIT $2;

-- name: messages
-- A user message comes with the prompt of its run. found, before: as with run_events.
SELECT
    message_id, run_id, turn, ordinal, role, finish_reason, model, created_at, parts, found,
    prompt_head, rest,
    ARRAY(
        SELECT ROW(is_text, name, mime_type, content)::kept_attachment FROM attachments
        WHERE sized.attachments > 0 AND tenant = $1 AND attachments.run_id = sized.run_id
        ORDER BY n
    ) AS attachments
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
            END AS size
        FROM messages
            LEFT JOIN runs ON messages.role = 'user'
                AND runs.tenant = $1 AND runs.run_id = messages.run_id
            LEFT JOIN prompts ON messages.role = 'user'
                AND prompts.tenant = $1 AND prompts.run_id = messages.run_id
        WHERE messages.tenant = $1 AND messages.session_id = $2
            AND (messages.turn, messages.ordinal) > ($3, $4)
        ORDER BY messages.turn, messages.ordinal LIMIT $5
    ) AS first
) AS sized
WHERE before <= $6 ORDER BY turn, ordinal;

-- Reading: the event log. compacted is as of the same snapshot; a page without an event has one row.

-- name: log_bytes
SELECT coalesce(
    (SELECT log_bytes FROM events ORDER BY position DESC LIMIT 1) - compacted_bytes, 0
) FROM store;

-- name: log_after
-- All tenants, for those who follow the log.
SELECT compacted, position, tenant, body, found FROM store LEFT JOIN (
    SELECT
        position, tenant, body, count(*) OVER () AS found,
        sum(size) OVER (ORDER BY position) - size AS before
    FROM (
        SELECT position, tenant, body, octet_length(body) AS size FROM events
        WHERE position > $1 AND position <= $2 ORDER BY position LIMIT $3
    ) AS first
) AS sized ON before <= $4
ORDER BY position;

-- name: events
-- In rows of (tenant, position), so that the planner cannot walk the events of other tenants.
SELECT compacted, position, body, found FROM store LEFT JOIN (
    SELECT
        position, body, count(*) OVER () AS found,
        sum(size) OVER (ORDER BY position) - size AS before
    FROM (
        SELECT position, body, octet_length(body) AS size FROM events
        WHERE (tenant, position) > ($1, $2) AND (tenant, position) <= ($1, $3)
        ORDER BY tenant, position LIMIT $4
    ) AS first
) AS sized ON before <= $5
ORDER BY position;

-- name: events_of
-- A seek for each id reads no more than the page could need of it, however long the log is.
SELECT compacted, position, body, found FROM store LEFT JOIN (
    SELECT
        position, body, count(*) OVER () AS found,
        sum(size) OVER (ORDER BY position) - size AS before
    FROM (
        SELECT position, body, octet_length(body) AS size
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
-- The last one, should a run of that id have been there before its session was deleted.
SELECT position FROM events
WHERE tenant = $1 AND run_id = $2 ORDER BY position DESC LIMIT 1;

-- Nodes. All times are the database's.

-- name: join
-- One that was lost is not taken back.
INSERT INTO nodes (node_id, address) VALUES ($1, $2)
ON CONFLICT (node_id) DO UPDATE SET address = excluded.address, heartbeat = clock_timestamp()
WHERE NOT nodes.lost;

-- name: beat
-- Its own row comes first, and others are passed over where they are locked: nobody waits who has a
-- lock that somebody else could wait for. Who has been silent for so long itself, as when the
-- database was away, lets the others speak first.
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
-- A seek for each host that there is, and only the runs of those that are lost.
WITH RECURSIVE hosts (host) AS (
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
), gone AS MATERIALIZED (
    SELECT host FROM hosts
    WHERE host IS NOT NULL
        AND NOT EXISTS (SELECT FROM nodes WHERE nodes.node_id = hosts.host AND NOT nodes.lost)
)
SELECT lost.tenant, lost.session_id, lost.run_id, lost.attempt
FROM gone
    CROSS JOIN (VALUES ('active'), ('cancelling')) AS wanted (state)
    CROSS JOIN LATERAL (
        SELECT tenant, session_id, run_id, attempt, started_at FROM runs
        WHERE runs.host = gone.host AND runs.state = wanted.state
            AND runs.state IN ('active', 'cancelling') AND folded_into = '' AND run_no > 0
        ORDER BY started_at LIMIT $1
    ) AS lost
ORDER BY lost.started_at LIMIT $1;

-- name: cancelled_runs
SELECT tenant, session_id, run_id, attempt FROM runs
WHERE host = $1 AND state = 'cancelling' AND folded_into = '' AND run_no > 0
ORDER BY started_at;

-- name: claim
-- A seek for each tenant that has lanes to claim, and only as many of its lanes as are its share: one
-- that has thousands is in nobody's way. $4 and $5 are the tenants that had their turn, the one to come
-- next first, and how many lanes more the node could serve of each; $6 is that for all others, which
-- come before them.
--
-- Waits for nobody. What is being written, or claimed by another node, is passed over; so is what was
-- written a moment ago, as its ctid is another one by now.
WITH RECURSIVE heads (tenant, waiting_since) AS (
    (
        SELECT tenant, waiting_since FROM sessions
        WHERE active_run_id = '' AND waiting_runs > 0
            AND (claimed_until IS NULL OR claimed_until <= now() OR claimed_by = $1)
        ORDER BY tenant, waiting_since LIMIT 1
    )
    UNION ALL
    SELECT head.tenant, head.waiting_since FROM heads CROSS JOIN LATERAL (
        SELECT sessions.tenant, sessions.waiting_since FROM sessions
        WHERE active_run_id = '' AND waiting_runs > 0 AND sessions.tenant > heads.tenant
            AND (claimed_until IS NULL OR claimed_until <= now() OR claimed_by = $1)
        ORDER BY sessions.tenant, sessions.waiting_since LIMIT 1
    ) AS head
), turns AS MATERIALIZED (
    SELECT heads.tenant, coalesce(served.room, $6) AS room
    FROM heads
        LEFT JOIN ROWS FROM (unnest($4::text[]), unnest($5::bigint[])) WITH ORDINALITY
            AS served (tenant, room, n) ON served.tenant = heads.tenant
    WHERE coalesce(served.room, $6::bigint) > 0
    ORDER BY served.n NULLS FIRST, heads.waiting_since LIMIT $2
), share AS MATERIALIZED (
    SELECT $2 / greatest(count(*), 1) AS lanes FROM turns
), next AS MATERIALIZED (
    SELECT own.ctid FROM turns CROSS JOIN LATERAL (
        SELECT sessions.ctid FROM sessions
        WHERE active_run_id = '' AND waiting_runs > 0 AND sessions.tenant = turns.tenant
            AND (claimed_until IS NULL OR claimed_until <= now() OR claimed_by = $1)
        ORDER BY waiting_since LIMIT least(turns.room, (SELECT lanes FROM share))
        FOR UPDATE SKIP LOCKED
    ) AS own
), claimed AS (
    UPDATE sessions SET claimed_by = $1, claimed_until = clock_timestamp() + $3::interval
    WHERE ctid = ANY (ARRAY(SELECT ctid FROM next))
    RETURNING tenant, session_id, waiting_since
)
SELECT tenant, session_id FROM claimed ORDER BY waiting_since;

-- name: waiting_runs
SELECT tenant, sum(waiting_runs)::bigint AS runs FROM sessions
WHERE waiting_runs > 0 GROUP BY tenant;

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
