"""The agent that is any program: started for each run, fed on stdin, read from stdout.

`agent` is what the loader uses; the other modules start, confine and end the processes. Nothing
here runs Python code between fork and exec in the server's own process.
"""
