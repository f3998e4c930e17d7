"""`runlane chat`: a conversation with a session at the terminal."""
