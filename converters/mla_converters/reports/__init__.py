"""Typed reports: what one command writes and another reads."""
