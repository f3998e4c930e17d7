"""The chat agent: a language model, through pydantic-ai (extra `chat`).

Only `loader` and `custom` import from here, and only when such an agent is configured. Errors of
providers leave this room as `AgentError`; class names of Python never leave it.
"""
