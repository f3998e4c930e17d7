"""`python -m runlane`: the command. gRPC, which is loaded before this is, is not silenced here."""

from runlane.cli import main

main()
