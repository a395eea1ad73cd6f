"""Redact secrets from whatever is stored or shown."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from urllib.parse import unquote

_SECRET_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|PASSWORD|PASSWD|SECRET|(?:API|ACCESS|PRIVATE)_?KEY|CREDENTIALS?)(?:$|_)", re.IGNORECASE
)
_PASSWORD_IN_URI = re.compile(r"//[^/\s:@]*:([^/\s@]+)@")
_USER_IN_URI = re.compile(r"//[^/\s'\"]+@")
_ASSIGNED = re.compile(r"(\b\w*(?:token|password|passwd|secret|api_?key)=)[^&\s'\"]+", re.IGNORECASE)
_KNOWN_SHAPES = re.compile(r"\b(?:hf_|gh[pousr]_|sk-)[A-Za-z0-9_-]{16,}")
_SHORTEST_SECRET = 6


def redact(text: str) -> str:
    """Replace by ``***``: user and password in URIs, assigned or well-known tokens, and the secrets of the environment:
    values of variables with such names, and passwords in URIs (of six characters or more: shorter ones are words)."""
    return _redact(text, _secrets_of_environment())


def redact_values(values: Mapping[str, object], longest: int) -> dict[str, str]:
    """Return each value as redacted text of at most ``longest`` characters; reads the environment only once."""
    secrets = _secrets_of_environment()
    return {name: _redact(str(value), secrets)[:longest] for name, value in values.items()}


def _redact(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    text = _ASSIGNED.sub(r"\1***", _USER_IN_URI.sub("//***@", text))
    return _KNOWN_SHAPES.sub("***", text)


def _secrets_of_environment() -> list[str]:
    """Return secrets, the longest first, so that one that contains another is replaced as a whole."""
    found = set()
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name):
            found.add(value)
        for password in _PASSWORD_IN_URI.findall(value) if "//" in value else ():
            found |= {password, unquote(password)}
    return sorted((secret for secret in found if len(secret) >= _SHORTEST_SECRET), key=len, reverse=True)
