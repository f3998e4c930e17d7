"""A tenant or a stranger attacks a server; a quiet tenant next to it must notice nothing."""
