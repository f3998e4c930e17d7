"""The store that is gone with the process: for simulations, tests and trials.

It keeps the same contract as the others and passes the same tests; nothing else depends on it.
"""
