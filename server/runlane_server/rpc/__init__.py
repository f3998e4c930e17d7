"""The wire: decodes requests, calls the coordinator, encodes answers and errors.

One servicer per service, one table for errors. Only `process` and `telemetry` import from here.
No rule about runs is decided in this room.
"""
