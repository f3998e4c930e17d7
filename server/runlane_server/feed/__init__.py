"""Subscriptions over the event log: of the ends of runs, and of the events of one run.

Import `Feed` from here. It reads from the store and from a shared in-memory tail. It never holds a
queue per subscriber, and it never shows an event that is not committed.
"""
