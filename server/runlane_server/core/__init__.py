"""What a lane is and what may happen to it: plain functions over frozen records.

Nothing here awaits, reads a clock, makes an id or does I/O.
"""
