"""What may differ between two calls of one sweep."""

from __future__ import annotations

import pytest

from distilbench.settings import SettingsError
from distilbench.sweep.resume import check_unchanged


def identity(**fixed: str):
    return {"space": {}, "fixed": fixed, "objectives": ["accuracy"], "directions": ["maximize"]}


def test_a_setting_that_an_older_version_did_not_have_is_null():
    older = identity(seed="1")
    check_unchanged(older, identity(seed="1", **{"data.pair_column": "null"}), "first", extend=False)
    with pytest.raises(SettingsError, match=r"which had data\.pair_column unset \(now two\); take another name$"):
        check_unchanged(older, identity(seed="1", **{"data.pair_column": "two"}), "first", extend=False)
