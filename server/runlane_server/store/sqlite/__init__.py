"""The store in a SQLite file: the default, for one server.

One connection writes, another one reads, each in a thread of its own. Only `store.open` and the
maintenance commands import from here. A second writing connection is never opened.
"""
