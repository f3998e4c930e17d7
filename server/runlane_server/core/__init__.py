"""The rules of Runlane: plain functions over frozen records.

`lane` decides what each command makes of a session's lane; the other modules define the records,
the errors, the limits and the observer interface. Every other room may import from here. This room
never awaits, reads a clock, generates an id, does I/O, or imports protobuf.
"""
