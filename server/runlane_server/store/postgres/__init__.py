"""The store in a PostgreSQL database, shared by any number of nodes.

Only `store.stores` and the maintenance commands import from here, and only where asyncpg is
installed. Nothing here relies on the order of a sequence, or on a notification that arrives.
"""
