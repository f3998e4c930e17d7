"""The settings of a server: the record, and the types of their values.

Every setting is a flag, an environment variable and a key of the TOML file. Nothing here starts
anything.
"""

from runlane_server.config.settings import Config

__all__ = ["Config"]
