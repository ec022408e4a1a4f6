"""Ctrl-C that waits for the end of a step, so that what is saved is a state a run can continue from bit by bit."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupt:
    """While active, the first SIGINT sets `requested`; the second raises KeyboardInterrupt at once.

    Signal handlers belong to the main thread; elsewhere this does nothing and Ctrl-C is what it always is.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: object = None
        self._active = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
            self._active = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._previous)  # type: ignore[arg-type]
