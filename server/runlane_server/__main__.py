"""`python -m runlane_server`."""

from runlane_server.cli import main

main()
