"""The errors that users see. Their text is one sentence: what is wrong, where, and what to do."""


class ConversionError(Exception):
    """Input that cannot be converted."""


class UnfinishedError(ConversionError):
    """Stopped by something outside the input; the work so far is kept, and the same command goes on from it."""


class StoppedError(UnfinishedError):
    """Stopped by the user."""
