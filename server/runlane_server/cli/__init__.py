"""The command `runlane-server`: serving, tokens, and maintenance of the database.

`main` is the entry point. A command parses its arguments, calls one function elsewhere, and prints.
"""
