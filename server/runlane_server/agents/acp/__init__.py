"""The ACP agent: it runs a program that speaks the Agent Client Protocol, version 1, over stdio.

`agent` is what the loader uses: it leads one conversation for each turn, with a process of its own.

    opening         what comes before the prompt: capabilities, and a session of the agent
    connection      JSON-RPC over the pipes of a program that may write anything
    content         what the agent gets: the prompt, and the turns that it has not seen
    updates         what the agent reports, as events of the turn
    tool_calls      one call and one result for each of its tool calls
    permissions     who answers when the agent asks whether it may do something
    policy          the operator's answer, as a setting
    agent_sessions  which session of the agent continues a session of ours

The types are those of the package `agent-client-protocol`. Its connection is not used: it has no
backpressure, no timeouts and no limits.
"""
