"""The origins of text for calibration and healing."""

SELF = "self"
"""Given instead of a text file, it means text that the model writes itself."""
CHAT = "chat"
"""Given instead of a text file, it means conversations in which the model writes both sides."""
WRITTEN = (SELF, CHAT)
WINDOW = 512
"""Tokens in the shortest calibration window."""
ORIGINS = (
    "Text file like what you will serve; **self**: text sampled from the model; **chat**: conversations sampled with "
    "its chat template. May be repeated; each has an equal share."
)
