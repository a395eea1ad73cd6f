"""What a command shares with every other: signals, exit statuses, and output that never ends it.

Ctrl-C and SIGTERM end a command at once while there is nothing to close, later as an exception.

An exception out of a signal in the middle of an import or of a composition comes out as whatever the interrupted code
makes of it; OmegaConf for one turns it into an error of its own.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception: ends a trial as cleanly as Ctrl-C does."""


def end_at_once() -> None:
    """From here on, both signals end the process without a word."""
    for number in STATUS:
        signal.signal(number, _exit)


_received: list[int] = []


def end_cleanly() -> None:
    """From here on there is something to close: both signals are exceptions, where :func:`end_at_once` was called."""
    if signal.getsignal(signal.SIGTERM) is _exit:
        for number in STATUS:
            signal.signal(number, _raise)


def was_signalled() -> bool:
    """Return whether a signal has become an exception, whatever the code that it interrupted made of that."""
    return bool(_received)


def _exit(signum: int, frame: Any) -> NoReturn:
    os._exit(STATUS[signal.Signals(signum)])


def _raise(signum: int, frame: Any) -> NoReturn:
    _received.append(signum)
    raise KeyboardInterrupt if signum == signal.SIGINT else Terminated


class _Unread(io.FileIO):
    """A standard stream that drops what nobody takes any more: a closed pipe, a closed terminal, a full disk."""

    def write(self, data: Any) -> int:
        """Write, or do as if."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


def protect_output() -> None:
    """Let no print fail from here on: drop what standard output and error can't take, replace what they can't show.

    A trial may take hours: it is not to end since ``| head -1`` has seen enough, or for an umlaut in a path.
    """
    sys.stdout, sys.stderr = _protected(sys.stdout), _protected(sys.stderr)


def _protected(stream: TextIO) -> TextIO:
    try:
        raw = _Unread(stream.fileno(), "w", closefd=False)
    except (AttributeError, OSError, ValueError):  # none at all, closed, or in memory
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, "replace", line_buffering=True)


def cli(entrypoint: Callable[[], object]) -> None:
    """Run an entrypoint as the command line does, with exit statuses for interruption."""
    end_at_once()
    protect_output()
    try:
        entrypoint()
    except Terminated:
        sys.exit(143)
    except KeyboardInterrupt:
        exec("")  # CPython notes an interrupt inside of exec (as dataclasses do), and would die of SIGINT after all
        sys.exit(130)
    except SystemExit as ending:
        from hydra.errors import CompactHydraException

        # Hydra ends with 1 while it handles what it has explained: a choice or a key that there is not
        sys.exit(2 if ending.code == 1 and isinstance(ending.__context__, CompactHydraException) else ending.code)
