"""Real servers for the tests of applications that call Runlane.

`LocalServer` runs on the event loop of the test, `RunningServer` in its own thread, and
`Gatekeeper` controls the latches of the scripted agent. The server never imports this package.
"""

from runlane_server.testing.server import LocalServer
from runlane_server.testing.thread import Gatekeeper, RunningServer

__all__ = ["Gatekeeper", "LocalServer", "RunningServer"]
