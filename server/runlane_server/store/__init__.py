"""Where lanes, transcripts and events are kept: memory, SQLite, or PostgreSQL.

Import `Store` and its records from `base`, and `open_store` from `open`
to get one by its URL. A store commits
the transition it is given in one transaction, if the lane still has the version that it started
from. It holds no rule and never changes what it is given.
"""
