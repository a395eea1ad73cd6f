"""The files around the package agree with pyproject.toml."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import distilbench
from tests.conftest import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
REQUIRED = [Requirement(line) for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]]
LEFT_TO_TORCH = re.compile(r"nvidia-|cuda-|triton$")
"""What a CUDA build of torch asks for by exact version itself; a pin would fight it."""
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] not in ("#", "")]


PINNED = [requirement for requirement in REQUIRED if not LEFT_TO_TORCH.match(requirement.name)]


@pytest.mark.parametrize("requirement", PINNED, ids=lambda r: r.name)
def test_every_dependency_is_pinned_to_a_version_that_it_allows(requirement):
    pinned = {canonicalize_name(pin.name): pin for pin in PINS}
    (exact,) = pinned[canonicalize_name(requirement.name)].specifier
    assert exact.operator == "=="
    assert requirement.specifier.contains(exact.version, prereleases=True), f"{requirement} is pinned to {exact}"


def test_constraints_choose_versions_and_no_build_or_place():
    assert not [str(pin) for pin in PINS if pin.url or any(Version(s.version).local for s in pin.specifier)]
    assert not [pin.name for pin in PINS if LEFT_TO_TORCH.match(pin.name)]


def test_citation_and_changelog_name_the_version():
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == PROJECT["version"] == distilbench.__version__


def test_each_release_has_each_kind_of_change_once_at_most():
    for release in (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1:]:
        kinds = re.findall(r"^### (\w+)$", release, re.MULTILINE)
        assert sorted(set(kinds)) == sorted(kinds), f"put together what is said twice under {release.splitlines()[0]}"
