"""The agent for tests: does what its prompt says, and can be held at named gates.

It is shipped because users test their own backends with it. It never runs unless `--agent scripted`
asks for it.
"""
