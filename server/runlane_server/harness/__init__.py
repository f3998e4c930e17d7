"""What an integration harness controls in a server under test: gates, the clock, and the process.

Without `--harness` no gate is ever armed and the clock is the system's. Nothing here changes an
order of events that could not happen by itself.
"""
