"""The command agent: it runs a program for each turn, prompt on stdin, answer on stdout.

`agent` is what the loader uses; the other modules start, limit and end the processes. Python code
never runs between fork and exec here: that is not safe in a process with threads.
"""
