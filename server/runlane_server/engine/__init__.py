"""The shell around the core: carries out what the lanes decide.

Loads lanes, applies commands, commits the result, and then acts on what was committed: starts and
stops agents, and wakes subscribers. Import `Coordinator` from `coordinator`; the other modules are
its parts. It never answers or publishes anything before the commit, and it never decides a race:
that is the job of `core.lane`.
"""
