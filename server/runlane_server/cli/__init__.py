"""The command `runlane-server`: serving, tokens, and maintenance of the database.

`main` is the entry point. A command parses its arguments, calls one function of another room, and
prints the result.
"""
