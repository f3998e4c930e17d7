"""Subscriptions to the event log: terminal events of runs, and the events of one run.

Import `Feed` from here. It reads from the store and from a shared in-memory tail. It never holds a
queue per subscriber, and it never publishes an event that is not committed.
"""
