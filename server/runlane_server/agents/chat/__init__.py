"""The agent that is a language model, through pydantic-ai (extra `chat`).

Only the loader imports from here, and only when a `chat:` agent is configured. Provider errors and
class names of Python never leave this room.
"""
