"""The store in a PostgreSQL database, shared by any number of nodes.

Nothing here relies on the order of a sequence, or on the arrival of a notification. Only
`store.open` and the maintenance commands import from here; all but `database` need asyncpg.
"""
