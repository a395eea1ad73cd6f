"""Signals wait while something is opened or closed, and come where they may."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from distilbench.cli import STATUS
from distilbench.trials import interruptions
from distilbench.trials.interruptions import SignalGuard


class Ended(KeyboardInterrupt):
    """A signal, as the command line makes an exception of it."""


@pytest.fixture(params=list(STATUS), ids=lambda number: number.name)
def number(request):
    """A signal whose handler raises."""

    def handler(number, frame):
        raise Ended(number)

    before = signal.signal(request.param, handler)
    yield request.param
    signal.signal(request.param, before)


def test_a_signal_waits_for_the_end_of_the_block(number):
    steps = []

    def close():
        with SignalGuard():
            signal.raise_signal(number)
            steps.append("closed")

    with pytest.raises(Ended):
        close()
    assert steps == ["closed"]


def test_a_signal_is_let_through_where_it_is_released_and_the_next_one_waits(number):
    steps = []

    def work():
        with SignalGuard() as guard, guard.released():
            try:
                signal.raise_signal(number)
                steps.append("not reached")
            finally:
                signal.raise_signal(number)
                steps.append("closed")

    with pytest.raises(Ended) as raised:
        work()
    assert steps == ["closed"]
    assert isinstance(raised.value.__context__, Ended), "the second came after the first"


def test_a_signal_that_waited_comes_at_the_beginning_of_the_released_part(number):
    steps = []

    def work():
        with SignalGuard() as guard:
            signal.raise_signal(number)
            steps.append("opened")
            with guard.released():
                steps.append("not reached")

    with pytest.raises(Ended):
        work()
    assert steps == ["opened"]


def test_the_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with SignalGuard() as guard:
        assert signal.getsignal(number) != before
        with guard.released():
            pass
    assert signal.getsignal(number) is before


def test_a_signal_that_comes_while_the_handlers_are_put_back_takes_effect_after_it(number, monkeypatch):
    before = {other: signal.getsignal(other) for other in STATUS}
    guard, put_back, came = SignalGuard(), signal.signal, []

    def strike(other, handler):
        if not came:
            came.append(number)
            guard._on_signal(number, None)
        return put_back(other, handler)

    def leave():
        with guard:
            monkeypatch.setattr(signal, "signal", strike)

    with pytest.raises(Ended):
        leave()
    assert {other: signal.getsignal(other) for other in STATUS} == before


def test_a_handler_that_goes_on_is_asked_again_and_after_the_released_part_at_the_end():
    told = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        with SignalGuard() as guard:
            with guard.released():
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)
                assert told == [signal.SIGTERM] * 2
            signal.raise_signal(signal.SIGTERM)
            assert told == [signal.SIGTERM] * 2
        assert told == [signal.SIGTERM] * 3
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminals to hang up")
def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalGuard() as guard, guard.released():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_default_ends_the_process_after_the_block_only():
    code = (
        "import signal; from distilbench.trials.interruptions import SignalGuard\n"
        "with SignalGuard() as guard:\n"
        "    try:\n"
        "        with guard.released(): signal.raise_signal(signal.SIGTERM); print('not reached', flush=True)\n"
        "    finally: print('closed', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "closed\n")


def test_signals_wait_for_the_end_of_a_step_but_for_ctrl_c(monkeypatch):
    told, alarm = [], signal.getsignal(signal.SIGALRM)
    numbers = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, frame: told.append(number)) for n in numbers}
    try:
        with SignalGuard() as guard, guard.released_at_steps():
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):  # as Slurm does where time is up
                signal.raise_signal(number)
                monkeypatch.setattr(interruptions, "STEP_SECONDS", 60)
            assert signal.getitimer(signal.ITIMER_REAL)[0] <= 10, "counted from the first"
            assert (told, bool(guard.waiting)) == ([], True)
            guard.deliver()
            assert (told, bool(guard.waiting)) == ([signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM], False)
            told.clear()
            signal.raise_signal(signal.SIGINT)
            assert told == [signal.SIGINT]
            signal.raise_signal(signal.SIGUSR1)
            assert told == [signal.SIGINT]
        assert told == [signal.SIGINT, signal.SIGUSR1], "the one that waited for no step comes at the end"
        assert (signal.getsignal(signal.SIGALRM), signal.alarm(0)) == (alarm, 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_step_that_takes_too_long_is_cut_short(monkeypatch):
    monkeypatch.setattr(interruptions, "STEP_SECONDS", 1)
    before = signal.signal(signal.SIGUSR2, signal.default_int_handler)

    def take_a_long_step():
        with SignalGuard() as guard, guard.released_at_steps():
            signal.raise_signal(signal.SIGUSR2)
            time.sleep(30)

    try:
        with pytest.raises(KeyboardInterrupt):
            take_a_long_step()
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_another_thread_is_left_alone():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work():
        with SignalGuard() as guard, guard.released_at_steps():
            seen.append(signal.getsignal(signal.SIGINT))
        seen.append("left")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, "left"]


def test_whoever_presses_ctrl_c_again_and_again_is_let_go():
    code = (
        "import signal; from distilbench.trials.interruptions import SignalGuard\n"
        "with SignalGuard() as guard:\n"
        "    for _ in range(2): signal.raise_signal(signal.SIGINT)\n"
        "    print('closing', flush=True)\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    print('not reached', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stdout) == (130, "closing\n")
