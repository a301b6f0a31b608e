"""Measuring models: several models score the same token windows, on either engine."""
