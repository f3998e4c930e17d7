"""Runlane's server: accepts prompts, runs them one at a time per session, tells how they ended."""
