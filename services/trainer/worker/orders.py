"""What the outside wants: set by signals and by lease replies, obeyed between two steps."""

from __future__ import annotations

import signal
from types import FrameType

FENCED_EXIT_CODE = 3
STOPPED_EXIT_CODE = 4


class Fenced(Exception):
    """A newer attempt runs: exit without writing anything more."""


class Stopped(Exception):
    """Stop before the next step; the trainer decides which state that is."""


class Orders:
    """Orders given so far. Any thread may set them; the main thread obeys by calling `check`.

    Attributes:
        fenced: Another attempt has taken over.
        stop: Stop before the next step.
        finish: Stop after this epoch and go on to the evaluation.
        failure: What ended the thread that talks to NATS; the main thread must not go on alone.
    """

    def __init__(self) -> None:
        self.fenced = False
        self.stop = False
        self.finish = False
        self.failure: BaseException | None = None

    def obey_signals(self) -> None:
        """Makes SIGTERM and SIGINT stop the worker at its next check."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.stop = True

    def check(self) -> None:
        """Raises what an order demands.

        Raises:
            Fenced: Another attempt has taken over.
            Stopped: The worker shall stop now.
        """
        if self.fenced:
            raise Fenced
        if self.stop:
            raise Stopped
        if self.failure is not None:
            raise self.failure
