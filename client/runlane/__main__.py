"""`python -m runlane` runs the `runlane` command.

Unlike the installed command, it cannot silence gRPC, which `runlane` has already imported.
"""

from runlane.cli import main

main()
