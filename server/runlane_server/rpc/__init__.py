"""The gRPC services: decode a request, call the engine, encode the answer or the error.

There is one servicer per service and one table of errors. Only `process` and `telemetry` import
from here. This room decides nothing about runs.
"""
