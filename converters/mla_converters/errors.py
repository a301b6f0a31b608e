"""The errors that users see. Their text is one sentence that says what is wrong, where, and what to do."""


class ConversionError(Exception):
    """Input that cannot be used."""


class OptionError(ConversionError):
    """An option has a wrong value, or contradicts another option."""


class UnfinishedError(ConversionError):
    """The run was stopped by something outside its input. Its work is kept, and the same command goes on from there."""


class StoppedError(UnfinishedError):
    """The user stopped the run."""
