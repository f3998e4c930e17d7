"""Addresses: parsed once at the edge, passed on as values.

No other module splits an address. Nothing here opens a connection that lasts.
"""
