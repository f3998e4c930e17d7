"""What is true of every lane and of every transition, written down without the code under test."""
