"""The shell around the core: carries out what the rules in `core.lane` decide.

It loads lanes, applies commands and commits the transitions; then it acts on them: it starts and
stops agents and answers callers. Other rooms may import `coordinator` (the in-process API),
`executor` (the settings of a node) and `retention`; the other modules are private parts. This room
never answers or publishes anything before the commit, and never decides a race.
"""
