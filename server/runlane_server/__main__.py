"""`python -m runlane_server`."""

from runlane_server.cli.main import main

main()
