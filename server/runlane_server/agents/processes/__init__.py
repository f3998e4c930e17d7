"""Agents in processes of their own: `--agent-processes`.

A `ProcessAgent` starts the processes of one agent, and gives its turns to them as to workers.
`supervisor` starts one process, watches it and starts it again; `protocol` is what the two say to
each other besides the turns. The program of the process is `process/agent_child`. Nothing here
imports the code of an agent.
"""
