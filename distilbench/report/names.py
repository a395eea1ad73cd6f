"""What tells one setting from others, spelled as the command line takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def varying_keys(treatments: Sequence[Mapping[str, object]]) -> list[str]:
    """Return the keys that differ among treatments; ``freeze.embeddings`` only where it does not follow the layers."""
    keys = sorted({key for treatment in treatments for key in treatment})
    varying = [key for key in keys if len({repr(treatment.get(key)) for treatment in treatments}) > 1]
    follows = all(t.get("freeze.embeddings") == (t.get("freeze.layers") != 0) for t in treatments)
    return [key for key in varying if not (key == "freeze.embeddings" and follows)]


def spell(key: str, value: object) -> str:
    """Spell one value as an override: ``freeze.layers=3``, ``scheduler=cosine``."""
    if value is None:
        shown = "null"
    elif isinstance(value, bool):
        shown = str(value).lower()
    else:
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"{key.removesuffix('.name')}={shown}"
