"""Stores for lanes, transcripts and events: memory, SQLite and PostgreSQL.

`base` has the interface, `open` gives a store by its URL. A store commits each transition in one
transaction if the lane is still at the version that the transition started from. It holds no rule
and never changes what it is given.
"""
