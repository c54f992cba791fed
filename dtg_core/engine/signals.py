"""SIGTERM and SIGINT as a request to stop after the current step."""
from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType
from typing import Any, ClassVar

#: Seconds within which signals are one request: a scheduler signals every process of a job, and torchrun passes its own on.
ONE_REQUEST = 2.0


class StopSignals:
    """Records the first signal while entered. A second one, some seconds later, ends the process at once, unless it is
    ``patient``.

    ``note`` is printed at the first signal, because the step that it waits for may be long.

    ``received`` is the number that this process got, ``agreed`` the one that all processes act upon; 0: none.
    """

    NUMBERS: ClassVar = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, patient: bool = False, note: str = "") -> None:
        self.patient, self.note = patient, note
        self.process = os.getpid()  # a loader's workers inherit the handler
        self.received = 0
        self.first = 0.0  # when that was
        self.agreed = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.first = time.monotonic()
        elif not self.patient and time.monotonic() - self.first > ONE_REQUEST:
            os._exit(128 + number)
        if self.note and not self.received and os.getpid() == self.process:
            with contextlib.suppress(OSError):
                os.write(2, f"\n{self.note}\n".encode())  # print may be interrupted by this very signal
        self.received = self.received or number
