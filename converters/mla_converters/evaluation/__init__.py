"""Measuring models: the same token windows, scored by several models, on either engine."""
