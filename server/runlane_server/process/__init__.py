"""A server process: assembles a node from the settings, serves, and shuts down.

Signals, systemd, several processes on one port. This is the only room that knows all parts of a
node. It decides nothing about runs.
"""
