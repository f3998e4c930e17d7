"""Fuzzing of everything that accepts input from outside: the parsers and the server's port."""
