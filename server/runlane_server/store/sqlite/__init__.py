"""The store in a SQLite file: the default, for one server.

One connection writes and another one reads, each in a thread of its own. A second connection that
writes is never opened. Only `store.open` and the maintenance commands import from here.
"""
