"""The one error that users see."""


class ConversionError(Exception):
    """Input that cannot be converted. Its text is one sentence: what is wrong, where, and what to do."""
