"""The A2A facade: tasks and messages of the Agent2Agent protocol 1.0 for the runs of a server.

A context is a session and a task is a run. The facade is a client of the server: it imports
`runlane` and `runlane_web`, nothing of the server, and holds no state that a restart may not lose.
"""
