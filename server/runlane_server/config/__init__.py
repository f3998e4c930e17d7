"""The settings of a server: the record `Config`, and where its values come from.

Every setting is a flag, an environment variable and a key of the TOML file. Nothing here starts
anything.
"""

from runlane_server.config.settings import Config

__all__ = ["Config"]
