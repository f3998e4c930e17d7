"""Executes runs of a server in this process."""
