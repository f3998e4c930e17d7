"""The HTTP door: JSON and server-sent events for the services of a Runlane server.

A gateway is a client: it imports `runlane` and nothing of the server, and holds no state that a
restart may not lose.
"""
