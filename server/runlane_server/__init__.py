"""Runlane's server: accepts prompts, runs them one at a time per session, publishes how they end.

The folders are rooms, and imports between them point downwards only. From the ground up: `core`,
`net`, `harness`, `store`, `agents`, `access`, `config`, `feed`, `cluster`, `engine`, `rpc`,
`telemetry`, `process`, `cli` and `testing`.
"""
