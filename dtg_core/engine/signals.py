"""SIGTERM and SIGINT as a request to stop after the current step."""
from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any, ClassVar


class StopSignals:
    """Records the first signal while entered. A second one ends the process at once, unless it is ``patient``.

    ``received`` is the number that this process got, ``agreed`` the one that all processes act upon; 0: none.
    """

    NUMBERS: ClassVar = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, patient: bool = False) -> None:
        self.patient = patient
        self.received = 0
        self.agreed = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and not self.patient:
            os._exit(128 + number)
        self.received = self.received or number
