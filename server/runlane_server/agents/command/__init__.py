"""The command agent: it runs a program for each turn, prompt on stdin, answer on stdout.

`agent` is what the loader uses; `programs` starts its programs, and those of the ACP agent. Three
kinds of processes take part:

    the server          `program` (one program), `guardian` (the guardian process, seen from here)
    the guardian        `guardian_process`: one per server; forks a launcher for each run
    a launcher          `launcher`: one per run; starts the program with its `limits`, and ends
                        everything that the program started (`process_tree`)

Python code runs between fork and exec in the last two only: that is not safe in a process with
threads. They import nothing but the standard library and each other.
"""
