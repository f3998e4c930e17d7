"""Addresses: parsed once, by the command line, and passed on as values.

No other module splits an address. Nothing here keeps a connection open.
"""
