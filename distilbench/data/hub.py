"""What the sources of text and of weights share: is the hub there, and what did an installed package bring."""

from __future__ import annotations

import hashlib
import logging
import os
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
"""How long the one request to the hub may take in all, name resolution and proxies included."""


@lru_cache(maxsize=1)
def hub_reachable() -> bool:
    """Return whether the Hugging Face hub answers, as decided once in a process, within five seconds.

    ``HF_HUB_OFFLINE`` and ``TRANSFORMERS_OFFLINE`` decide it without a request. Where the hub is out of reach,
    ``HF_HUB_OFFLINE`` is set for this process and its children, since the libraries' own timeouts add up to minutes;
    they then answer at once, from the cache. Requests are not logged one by one, as httpx would.
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


def hub_endpoint() -> str:
    """Return the address of the hub that the libraries use: ``HF_ENDPOINT``, or the public one."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _answers_in_time(endpoint: str) -> bool:
    """Ask in a thread: a socket's timeout bounds neither name resolution nor a server that sends byte after byte."""
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(_answers(endpoint)), daemon=True, name="hub-probe")
    thread.start()
    thread.join(PROBE_SECONDS)
    return answers == [True]


def _answers(endpoint: str) -> bool:
    """Whether ``endpoint`` answers as a hub may; 403, 407 and 5xx are what a filter, a proxy or a gateway says."""
    try:
        with build_opener().open(Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS):
            return True
    except HTTPError as error:
        return error.code not in {403, 407} and error.code < 500
    except (OSError, HTTPException, ValueError, OverflowError):  # the last two: an HF_ENDPOINT or port that is none
        return False


def package_file(name: str, relative_path: str, sha256: str) -> Path:
    """Return the path of a file that the installed distribution of that ``name`` carries, without importing it.

    ``sha256`` is what the file must hash to. Raises :class:`SettingsError` where the distribution is not installed,
    or the file is not there or altered.
    """
    try:
        path = Path(str(distribution(name).locate_file(relative_path)))
    except PackageNotFoundError:
        raise SettingsError(f"package {name} must be installed, got none; run: pip install {name}") from None
    found = file_sha256(path) if path.is_file() else None
    require(found == sha256, str(path), f"a file of sha256 {sha256}", found,
            f"run: pip install --force-reinstall --no-deps {name}")  # fmt: skip
    return path


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: Exception) -> str:
    """Return what an exception says, cut to its first line, for a message that must be one."""
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
