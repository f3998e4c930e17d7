"""The MCP server of `runlane mcp`; requires the extra `mcp`.

It is a client of the Runlane server and keeps no state: a task of MCP is a run, by its id.
"""
