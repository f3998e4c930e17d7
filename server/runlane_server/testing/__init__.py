"""Real servers for the tests of applications that call Runlane.

`LocalServer` runs in the event loop of the test, `RunningServer` in a thread of its own, and
`Gatekeeper` stages what the scripted agent does. The server itself never imports this package.
"""

from runlane_server.testing.server import LocalServer
from runlane_server.testing.thread import Gatekeeper, RunningServer

__all__ = ["Gatekeeper", "LocalServer", "RunningServer"]
