"""Agents whose runs workers execute: processes in any language that offer slots to this server.

`workers` matches turns with offers, `execution` is one attempt that a worker executes, and `slot`
is one stream of a worker. Nothing here knows gRPC; `rpc/worker` decodes and encodes the messages.
The events of a worker pass the same checks and limits as the events of every other agent.
"""
