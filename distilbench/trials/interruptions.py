"""Signals that wait: what opens and closes a trial is never cut short by Ctrl-C, SIGTERM or SIGHUP."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

_PATIENCE = 2
"""How often Ctrl-C may be pressed while a trial is closed: a minute, where a server has stopped answering."""


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

    def __enter__(self) -> SignalGuard:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if handler not in (signal.SIG_IGN, None):  # None: not installed from Python, and not to be restored
                    self._handlers[number] = handler
                    signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_left, self._is_held = True, False  # from here on a handler that is still ours passes signals on
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._deliver()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let signals through in this block; those that waited come first."""
        self._is_held = False
        self._deliver()
        try:
            yield
        finally:
            self._is_held = True

    def _deliver(self) -> None:
        while self._waiting:
            signal.raise_signal(self._waiting.pop(0))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_held:
            self._waiting.append(number)
            if self._waiting.count(signal.SIGINT) > _PATIENCE:
                os._exit(128 + signal.SIGINT)
            return
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
