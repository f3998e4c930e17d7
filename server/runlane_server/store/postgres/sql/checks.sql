-- The invariants of a store, by name. Each statement returns one sentence per violation. They are those
-- of SQLite, of one snapshot: nodes may work meanwhile.
--
-- The rows of a session that is being removed are gone in part: no check reads them.

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
    FROM runs
    WHERE ended_at IS NULL AND run_no > 0
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
) AS found WHERE problem IS NOT NULL;

-- name: waiting
SELECT 'run ' || tenant || '/' || run_id || problem FROM (
    SELECT
        tenant, run_id,
        CASE
            WHEN rank = before THEN ' has the rank of another waiting run'
            WHEN (state = 'accepted') <> (place = 1 AND active_run_id = '')
                THEN ' is ' || state || ' at place ' || place || ' of its lane, with ' ||
                    CASE active_run_id
                        WHEN '' THEN 'no active run' ELSE 'the active run ' || active_run_id
                    END
        END AS problem
    FROM (
        SELECT
            tenant, session_id, run_id, state, rank, lag(rank) OVER line AS before,
            row_number() OVER line AS place
        FROM runs
        WHERE ended_at IS NULL AND run_no > 0 AND state IN ('accepted', 'queued')
        WINDOW line AS (PARTITION BY tenant, session_id ORDER BY rank)
    ) AS lined JOIN sessions USING (tenant, session_id)
) AS found WHERE problem IS NOT NULL;

-- name: runs
SELECT 'run ' || tenant || '/' || run_id || problem FROM (
    SELECT
        runs.tenant, run_id,
        CASE
            WHEN sessions.session_id IS NULL
                THEN ' belongs to session ' || runs.session_id || ', which does not exist'
            WHEN (state IN ('completed', 'cancelled', 'failed')) <> (ended_at IS NOT NULL)
                THEN ' is ' || state || ', but has ' ||
                    CASE WHEN ended_at IS NULL THEN 'no' ELSE 'an' END || ' end'
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
) AS found WHERE problem IS NOT NULL;

-- name: accept_order
SELECT
    'run ' || tenant || '/' || run_id || ' has accept_seq ' || accept_seq || ' after ' || before
FROM (
    SELECT tenant, run_id, accept_seq, lag(accept_seq, 1, 0::bigint) OVER accepts AS before
    FROM runs WHERE run_no > 0
    WINDOW accepts AS (PARTITION BY tenant, session_id ORDER BY run_no)
) AS ordered WHERE accept_seq <= before;

-- name: inputs
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
                    CASE WHEN closed_at IS NULL THEN 'no' ELSE 'an' END || ' end'
            WHEN input_requests.state = 'answered' AND answer IS NULL
                THEN ' is answered, but has no answer'
        END AS problem
    FROM input_requests LEFT JOIN runs USING (tenant, run_id)
) AS found WHERE problem IS NOT NULL;

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
            WHEN run.message_id <> '' AND run.message_id IS DISTINCT FROM host.message_id
                THEN ', but has another last message'
        END AS problem
    FROM runs AS run LEFT JOIN runs AS host
        ON host.tenant = run.tenant AND host.run_id = run.folded_into
    WHERE run.folded_into <> ''
        AND (run.tenant, run.session_id) NOT IN (SELECT tenant, session_id FROM removals)
) AS found WHERE problem IS NOT NULL;

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
) AS found WHERE problem IS NOT NULL;

-- name: run_ends
-- A run has its run_complete as its last event, and nothing else does.
SELECT 'run ' || tenant || '/' || run_id || problem FROM (
    SELECT
        runs.tenant, runs.run_id,
        CASE
            WHEN n IS NULL THEN ' has no events'
            WHEN n <> last - first + 1
                THEN ' has ' || n || ' events, numbered from ' || first || ' to ' || last
            WHEN ended_at IS NULL AND ends > 0 THEN ' has not ended, but has a run_complete'
            WHEN ended_at IS NOT NULL AND (ends <> 1 OR ended <> last)
                THEN ' has ended, but its last event is not its only run_complete'
        END AS problem
    FROM runs LEFT JOIN (
        SELECT
            tenant, run_id, min(idx) AS first, max(idx) AS last, count(*) AS n,
            count(*) FILTER (WHERE kind = 'run_complete') AS ends,
            max(idx) FILTER (WHERE kind = 'run_complete') AS ended
        FROM run_events GROUP BY tenant, run_id
    ) AS numbered ON numbered.tenant = runs.tenant AND numbered.run_id = runs.run_id
    WHERE (runs.tenant, runs.session_id)
        NOT IN (SELECT tenant, session_id FROM removals)
) AS found WHERE problem IS NOT NULL;

-- name: terminal_events
-- An event may have no run: it remains in the log after its session was deleted.
SELECT
    'the terminal event at position ' || events.position || ' belongs to run ' || events.tenant ||
    '/' || events.run_id || ', which has not ended'
FROM events JOIN runs ON runs.tenant = events.tenant AND runs.run_id = events.run_id
WHERE runs.ended_at IS NULL AND events.ended_at >= runs.accepted_at;

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
