"""Agents: what executes a run. One folder per kind of agent.

`base` has the interface that every agent implements, `loader` turns the value of `--agent` into an
agent. An agent yields the events of its turn. It never sees lanes, stores or the wire.
"""
