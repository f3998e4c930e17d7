"""What anybody may send: parsers, and a server's port, with input that nobody meant."""
