"""Invariants of every lane and transition, written without the code under test."""
