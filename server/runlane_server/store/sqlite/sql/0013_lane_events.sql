-- The order of the events of a session: the events of all its runs but the output of agents, by their
-- place in the log of the lane (store/lane_log.py). An idx of 0 marks the place up to which events
-- were removed.

CREATE TABLE lane_events (
    tenant     TEXT NOT NULL,
    session_id TEXT NOT NULL,
    place      INTEGER NOT NULL,
    run_id     TEXT NOT NULL,
    idx        INTEGER NOT NULL,
    PRIMARY KEY (tenant, session_id, place)
) WITHOUT ROWID;
