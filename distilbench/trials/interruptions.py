"""Deferred signals: opening and closing a trial is never interrupted, and a training step is completed first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from distilbench.cli import STATUS

_PATIENCE = 2
"""How often Ctrl-C is ignored while a trial is closed, which takes a minute if a server has stopped answering."""

STEP_SECONDS = 10
"""Longest wait after a signal for the step to end and a checkpoint to be written; Slurm kills 30 s after SIGTERM."""


class TrialTakenOver(RuntimeError):
    """Another process has closed this trial, since its process was frozen for too long, and trains it again."""


class SignalGuard:
    """Defer signals until the block ends, except in the parts where they are :meth:`released`.

    In such a part, the first signal takes effect; all others wait until the block ends, so that they do not interrupt
    the clean-up after the first (a closed terminal often sends SIGHUP twice). Repeated Ctrl-C ends the process. Ignored
    signals, as under nohup, stay ignored. Outside of the main thread, which alone gets signals, this does nothing.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self.waiting: list[int] = []
        """Signals that wait, in the order in which they came."""
        self._is_held = True
        self._waits_for_step = False

    def __enter__(self) -> SignalGuard:
        if threading.current_thread() is threading.main_thread():
            for number in STATUS:  # Slurm, submitit and spot machines announce their end by USR1, USR2 or TERM
                handler = signal.getsignal(number)
                if handler not in (signal.SIG_IGN, None):  # None: not installed from Python, can't be restored
                    self._handlers[number] = handler
                    signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        while self.waiting:
            signal.raise_signal(self.waiting.pop(0))

    @contextmanager
    def released(self) -> Iterator[None]:
        """Deliver signals in this block, starting with those that waited."""
        self._is_held = False
        self.deliver()
        try:
            yield
        finally:
            self._is_held = True

    @contextmanager
    def released_at_steps(self) -> Iterator[None]:
        """Deliver Ctrl-C at once in this block; other signals (Slurm sends two) wait for :meth:`deliver`.

        It is called between two steps, after a checkpoint, or by an alarm after :data:`STEP_SECONDS`.
        """
        can_wait = bool(self._handlers) and hasattr(signal, "alarm")
        before = signal.signal(signal.SIGALRM, lambda *_: self.deliver()) if can_wait else None
        try:
            with self.released():
                self._waits_for_step = can_wait
                yield
        finally:
            self._waits_for_step = False
            if can_wait:
                signal.alarm(0)
                signal.signal(signal.SIGALRM, before)

    def deliver(self) -> None:
        """Call the original handlers of the waiting signals, which usually raise and so end the training."""
        while self.waiting:
            self._handle(self.waiting.pop(0), None)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_held:
            self.waiting.append(number)
            if self.waiting.count(signal.SIGINT) > _PATIENCE:
                os._exit(128 + signal.SIGINT)
        elif self._waits_for_step and number != signal.SIGINT:
            if not self.waiting:
                signal.alarm(STEP_SECONDS)
            self.waiting.append(number)
        else:
            self._handle(number, frame)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        handler = self._handlers[number]
        self._is_held = True
        if callable(handler):
            handler(number, frame)  # usually raises
            self._is_held = False
        else:  # the default would end the process here, with everything open
            self.waiting.append(number)
            raise KeyboardInterrupt
