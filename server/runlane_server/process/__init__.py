"""A server process: builds a node from the settings, serves, and shuts down.

Signals, systemd, and several processes on one port belong here. Only this room knows all parts of a
node. It makes no decision about runs.
"""
