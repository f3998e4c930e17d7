"""What executes a run."""
