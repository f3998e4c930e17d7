"""Webhooks: delivers what the event log has to the endpoints of tenants (R55).

It reads the log behind a durable cursor and writes nothing but that cursor. It never decides
anything about a run, and never shows a tenant what an endpoint answered.
"""
