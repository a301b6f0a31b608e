"""Recognising Ctrl-C behind the exceptions that it causes in libraries."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible() -> Iterator[None]:
    """Make sure that Ctrl-C ends the block with ``KeyboardInterrupt``.

    torch and safetensors call each other, and treat any exception as a failed attempt. A ``KeyboardInterrupt`` that is
    raised inside them may therefore come out as another exception (``ValueError: could not determine the shape``).

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed, and the block ended with an exception.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield  # this thread gets no signals, or they are ignored
        return
    interrupted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        previous(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception as error:
        if interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, previous)
