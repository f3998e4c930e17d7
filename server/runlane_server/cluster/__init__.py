"""Cooperation of nodes that share a store.

Heartbeats and the lease of a node, recovery of the runs of dead nodes, claims of waiting lanes, and
the relay of live events from the node that executes a run. There is no leader. This room never
changes a lane: the version of the lane in the store decides.
"""
