"""Where text for calibration and healing may come from."""

SELF = "self"
"""In the place of a text file: text that the model writes itself."""
CHAT = "chat"
"""In the place of a text file: conversations of which the model writes both sides."""
WRITTEN = (SELF, CHAT)
WINDOW = 512
"""Tokens in the shortest calibration window."""
ORIGINS = (
    "Text file like what you will serve; **self**: text sampled from the model; **chat**: conversations sampled with "
    "its chat template. May be repeated; each has an equal share."
)
