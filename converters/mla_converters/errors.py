"""The errors that users see. Their text is one sentence: what is wrong, where, and what to do."""


class ConversionError(Exception):
    """Input that cannot be used."""


class OptionError(ConversionError):
    """An option has a wrong value, or contradicts another."""


class UnfinishedError(ConversionError):
    """Stopped by something outside the input. The work so far is kept, and the same command goes on from it."""


class StoppedError(UnfinishedError):
    """Stopped by the user."""
