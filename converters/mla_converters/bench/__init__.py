"""Measuring how fast models serve: several engines take turns at the same random requests."""
