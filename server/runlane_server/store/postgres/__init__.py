"""The store in a PostgreSQL database, shared by any number of nodes.

Only `store.open` and the maintenance commands import from here, and only where asyncpg is
installed. Nothing here relies on the order of a sequence, or on a notification that arrives.
"""
