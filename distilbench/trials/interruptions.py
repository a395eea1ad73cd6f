"""Signals that wait: what opens and closes a trial is never cut short, and a step is taken to its end."""

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
"""How often Ctrl-C may be pressed while a trial is closed: a minute, where a server has stopped answering."""

STEP_SECONDS = 10
"""Longest wait for the end of a step, and a checkpoint, after a signal; Slurm kills 30 s after SIGTERM."""


class TakenOver(RuntimeError):
    """Another process has closed this trial, whose process had stood still for too long, and tries it again."""


class SignalGuard:
    """Hold signals back from here to the end of the block, but for the parts where they are :meth:`released`.

    The first signal in such a part does what it would have done; every other waits until the block is left, so that
    nothing interrupts the closing of what the first has ended (a closed terminal often sends SIGHUP twice); whoever
    presses Ctrl-C again and again is let go. Signals that are ignored, as under nohup, stay so. In another thread than
    the main one, which gets no signals, this does nothing.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._waiting: list[int] = []
        self._is_held = True
        self._is_left = False
        self._waits_for_step = False

    def __enter__(self) -> SignalGuard:
        if threading.current_thread() is threading.main_thread():
            for number in STATUS:  # by USR1, USR2 or TERM Slurm, submitit and spot machines say that time is up
                handler = signal.getsignal(number)
                if handler not in (signal.SIG_IGN, None):  # None: not installed from Python, and not to be restored
                    self._handlers[number] = handler
                    signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_left, self._is_held = True, False  # from here on a handler that is still ours passes signals on
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.deliver()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let signals through in this block; those that waited come first."""
        self._is_held = False
        self.deliver()
        try:
            yield
        finally:
            self._is_held = True

    @contextmanager
    def released_at_steps(self) -> Iterator[None]:
        """Let Ctrl-C through in this block, and other signals only by :meth:`deliver`, however many: Slurm sends two.

        That is called between two steps, once there is a checkpoint; after :data:`STEP_SECONDS` by an alarm.
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

    @property
    def is_waiting(self) -> bool:
        """Whether a signal waits for the end of a step."""
        return self._waits_for_step and bool(self._waiting)

    def deliver(self) -> None:
        """Have the signals do what they would have done, which as a rule ends the training by an exception."""
        while self._waiting:
            self._handle(self._waiting.pop(0), None)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_held:
            self._waiting.append(number)
            if self._waiting.count(signal.SIGINT) > _PATIENCE:
                os._exit(128 + signal.SIGINT)
        elif self._waits_for_step and number != signal.SIGINT:
            if not self._waiting:
                signal.alarm(STEP_SECONDS)
            self._waiting.append(number)
        else:
            self._handle(number, frame)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        handler = self._handlers[number]
        self._is_held = not self._is_left
        if callable(handler):
            handler(number, frame)  # raises, as a rule
            self._is_held = False
        elif self._is_left:
            signal.signal(number, handler)
            signal.raise_signal(number)
        else:  # the default would end the process here, with everything open
            self._waiting.append(number)
            raise KeyboardInterrupt
