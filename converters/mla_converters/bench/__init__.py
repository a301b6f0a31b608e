"""Measuring how fast models serve: the same random requests, sent to several engines in turn."""
