"""The scripted agent, for tests: it follows the script in its prompt, and waits at named latches.

It is shipped because users test their own backends with it. It only runs with `--agent scripted`.
"""
