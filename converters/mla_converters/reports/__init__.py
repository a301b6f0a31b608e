"""Typed reports, which one command writes and another reads."""
