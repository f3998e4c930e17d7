"""Whether a server keeps the rules R1 to R30, found out over the wire.

    runlane-conformance 127.0.0.1:50051

The server is one that was started with `--harness --agent scripted` and has nothing else to do: it
is cancelled, crashed, drained and moved ahead in time. Each rule has one or more cases, in the
module for its part of the rules; a case stages what the rule is about by means of the gates.
"""
