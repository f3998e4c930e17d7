"""Controls for integration tests of a running server: gates, the clock, and the process.

`harness` has the state of all three, `gates` and `clock` one each; `rpc/harness.py` serves them.
Without `--harness` no gate is ever armed and the clock is the system's. Nothing here may produce an
order of events that could not happen without it.
"""
