"""SIGINT, SIGTERM and SIGHUP, noted so that training can end after its step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np


class Interruption:
    """Notes signals while it is entered, so that training can end after its step; a second SIGINT or SIGTERM ends it.

    SIGHUP, which a terminal sends as it closes, is left to who started this process with it ignored, as nohup does.

    Args:
        is_shared: training ends where all processes of the run have agreed on it, by `get_flags` and `note_flags`.
    """

    # Windows has no SIGHUP.
    HANGUP = getattr(signal, "SIGHUP", None)
    NUMBERS = (signal.SIGINT, signal.SIGTERM, *[HANGUP] * (HANGUP is not None))

    def __init__(self, is_shared: bool = False) -> None:
        self.is_shared = is_shared
        self.signal = 0
        self._received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        # Python lets the main thread alone handle signals.
        if threading.current_thread() is threading.main_thread():
            for number in self.NUMBERS:
                if number != self.HANGUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number in self.NUMBERS:
            self._restore(number)

    def get_flags(self) -> np.ndarray:
        """Returns which of the signals this process has received, as zeros and ones."""
        return np.array([self._received == number for number in self.NUMBERS], np.float32)

    def note_flags(self, flags: Sequence[float]) -> None:
        """Takes the sum of all processes' flags: what one has received holds for all."""
        self.signal = next((number for number, flag in zip(self.NUMBERS, flags, strict=True) if flag), self.signal)

    def _note(self, number: int, _: object) -> None:
        self._received = number
        if not self.is_shared:
            self.signal = number
        # It often comes twice, from the terminal and from the shell, and service managers send it after SIGTERM.
        if self.HANGUP in self._previous:
            signal.signal(self.HANGUP, signal.SIG_IGN)
        for other in (signal.SIGINT, signal.SIGTERM):
            self._restore(other)

    def _restore(self, number: int) -> None:
        if number in self._previous:
            signal.signal(number, self._previous.pop(number))
