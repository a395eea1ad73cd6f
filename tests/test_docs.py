"""What README and docs show is there: commands compose, keys, paths and links lead somewhere. Nothing is run."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from distilbench.compare import to_hydra_argument
from distilbench.composition import check
from distilbench.settings import (
    AppSettings,
    BenchmarkSettings,
    CompareSettings,
    ConfirmSettings,
    PredictSettings,
    register_schema,
    settings_from,
)
from tests.conftest import ROOT
from tests.test_project import PROJECT, PYPROJECT

register_schema()

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
HELP = sorted((ROOT / "conf").glob("*.yaml"))
"""The main configurations, whose help texts show examples."""
SETTINGS = {
    "train": ("config", AppSettings),
    "benchmark": ("benchmark", BenchmarkSettings),
    "compare": ("compare", CompareSettings),
    "confirm": ("confirm", ConfirmSettings),
    "predict": ("predict", PredictSettings),
}
"""Module of ``python -m distilbench.<module>`` -> its main configuration and what it becomes."""
FILES = ("reviews.csv", "pairs.csv", "train.csv", "sst2/train.parquet", "sst2/validation.parquet")
"""What a reader is taken to have."""


@dataclass(frozen=True)
class Command:
    """One simple command of a page, its words as a shell would split them."""

    place: str
    words: tuple[str, ...]


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """The fenced blocks of a language, with the line on which each begins."""
    text = page.read_text()
    for block in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, block.start(1)) + 1, block[1]


def split(script: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line number from 0 and words of each simple command; comments go, ``&&`` and the like part commands."""
    joined = script.replace("\\\n", "\0")
    start = 0
    for line in joined.splitlines():
        lexer = shlex.shlex(line.replace("\0", " "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for is_operator, words in groupby(lexer, lambda word: set(word) <= set("&|;()<>")):
            if is_operator:
                assert set("".join(words)) <= set("&|;"), f"parentheses and angles are to be quoted: {line}"
            else:
                yield start, tuple(words)
        start += 1 + line.count("\0")


def commands_of(page: Path) -> Iterator[Command]:
    """Every simple command of a page's bash blocks."""
    for line, script in blocks(page, "bash"):
        for offset, words in split(script):
            yield Command(f"{page.relative_to(ROOT)}:{line + offset}", words)


def examples_of(config: Path) -> Iterator[Command]:
    """Every command that the help text of a main configuration shows, but those with an id cut short."""
    for number, line in enumerate(config.read_text().splitlines(), start=1):
        if line.startswith("    ") and line.split()[:2] == ["python", "-m"] and "..." not in line:
            yield Command(f"conf/{config.name}:{number}", tuple(shlex.split(line)))


COMMANDS = [command for page in PAGES for command in commands_of(page)]
EXAMPLES = [command for config in HELP for command in examples_of(config)]


@pytest.fixture(autouse=True)
def at_a_readers(tmp_path, monkeypatch):
    """Stand in a folder with the files that the pages speak of, the checkout's own beside them."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    model = tmp_path / "path" / "to" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps({"model_type": "distilbert", "n_layers": 6, "dim": 8}))
    for name in ("model.safetensors", "tokenizer.json"):
        (model / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SWEEP_DB", "postgresql+psycopg://host/database")


@pytest.mark.parametrize("command", [*COMMANDS, *EXAMPLES], ids=lambda c: c.place)
def test_every_command_is_one_that_a_reader_can_run(command):
    check_command(command.words)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_block_of_python_is_python(page):
    for line, block in blocks(page, "python"):
        compile(block, f"{page.name}:{line}", "exec")


def test_pages_show_commands():
    shown = {command.words[2] for command in COMMANDS if command.words[:2] == ("python", "-m")}
    assert shown >= {f"distilbench.{module}" for module in SETTINGS}
    assert len(COMMANDS) >= 40
    assert len(EXAMPLES) >= 10


@pytest.mark.parametrize(
    "line",
    [
        "python -m distilbench.train freeze.layer=3",
        "python -m distilbench.train freeze.layers=7 model=minilm",
        "python -m distilbench.train scheduler=cosin",
        "python -m distilbench.train schedule=cosine",
        "python -m distilbench.train optim.lr=0",
        "python -m distilbench.train data=files",
        "python -m distilbench.train data=files data.train=not/there.csv",
        "python -m distilbench.train freeze.layers=0,3",
        "python -m distilbench.train --multirum freeze.layers=0,3",
        "python -m distilbench.train --multirun freeze.layers=0,3 scheduler=linear,cosin",
        "python -m distilbench.train --multirun freeze.layers=0,-3",
        "python -m distilbench.train --multirun hydra/sweeper=optun",
        "python -m distilbench.train --multirun hydra.sweeper.jobs=8 freeze.layers=0,3",
        "python -m distilbench.train --multirun hydra/sweeper=optuna 'optim.lr=interval(0,1)'",
        "python -m distilbench.train --multirun hydra/sweeper=optuna optim.lr=interval(0.1,1)",
        "python -m distilbench.train --multirun hydra/sweeper=optuna search=none",
        "python -m distilbench.benchmark bench.step=8",
        "python -m distilbench.compare",
        "python -m distilbench.compare sweep=first layout=wide",
        "python -m distilbench.confirm sweep=first seeds=1",
        "python -m distilbench.tran",
        "python -m pytest -m slow",
        "python -m pytest tests/test_nothing.py",
        "pip install -e '.[tests]'",
        "pip install -c constraint.txt -e .",
        "pip install distilbench-sweeper",
        "make tests",
        "mlflow-ui",
        "mlflow uii",
        "pyton -m distilbench.train",
    ],
)
def test_a_command_that_would_not_run_is_noticed(line):
    with pytest.raises((Exception, SystemExit)):
        check_line(line)


def check_line(line: str) -> None:
    """Raise for a line that would not run."""
    for _, words in split(line):
        check_command(words)


@cache
def check_command(words: tuple[str, ...]) -> None:
    """Raise for a command that would not run; one that nobody knows how to check is an error as well."""
    name, *arguments = [word for i, word in enumerate(words) if i or not re.match(r"[A-Z_]+=", word)]
    CHECKS[name](arguments)


def check_python(arguments: Sequence[str]) -> None:
    """Check ``python -m <module>``."""
    dash_m, module, *rest = arguments
    assert dash_m == "-m"
    package, _, command = module.partition(".")
    if package == "distilbench":
        check_composition(command, rest)
    else:
        CHECKS[module](rest)


def check_composition(command: str, arguments: Sequence[str]) -> None:
    """Compose what a command line gives, each value of a sweep once, and check it as the command itself would."""
    name, kind = SETTINGS[command]
    given = get_args_parser().parse_args([to_hydra_argument(a) if command == "compare" else a for a in arguments])
    with schema_of(kind), initialize_config_dir(str(ROOT / "conf")):
        first, *others = list(jobs_of(given.overrides)) if given.multirun else [given.overrides]
        config = compose(name, first, return_hydra_config=True)
        points = jobs_of(lines_of(config.hydra.sweeper.get("params")))
        for overrides in [*others, *([*first, *point] for point in points)]:
            check_settings(compose(name, overrides), kind)
    check_settings(config, kind)


@contextmanager
def schema_of(kind: type) -> Iterator[None]:
    """Have ``config.yaml`` build on ``kind``, where that is not what it builds on anyhow."""
    if kind is not BenchmarkSettings:
        yield
        return
    register_schema(BenchmarkSettings)
    try:
        yield
    finally:
        register_schema()


def check_settings(config: DictConfig, kind: type) -> None:
    """Convert a composed configuration as its command does."""
    if issubclass(kind, AppSettings):
        config.output.dir = "."  # Hydra knows the job's directory only once the job runs
        check(config, ask_hub=False)
    settings_from(config, kind)


def jobs_of(overrides: Sequence[str]) -> Iterator[list[str]]:
    """As few jobs as show every value of every swept key."""
    values = [values_of(override) for override in OverridesParser.create().parse_overrides(list(overrides))]
    for i in range(max(map(len, values), default=0)):
        yield [each[i % len(each)] for each in values]


def values_of(override: Override) -> list[str]:
    """What a swept override may set: each choice, or both ends of a range or an interval."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    swept: Any = override.value()
    values = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else (swept.start, swept.end)
    if override.is_range_sweep():
        values = (values[0], values[-1])
    return [f"{override.get_key_element()}={value}" for value in values]


def lines_of(params: Mapping[str, str] | None) -> list[str]:
    """``hydra.sweeper.params`` as a command line, for a model of two layers."""
    return [f"{key}={re.sub('depth', '2', str(value))}" for key, value in (params or {}).items()]


def check_pytest(arguments: Sequence[str]) -> None:
    """Check the markers and the files that pytest is asked for."""
    markers = {line.partition(":")[0] for line in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    asked = [arguments[i + 1] for i, argument in enumerate(arguments) if argument == "-m"]
    assert set(asked) <= markers
    assert all((ROOT / path.partition("::")[0]).exists() for path in arguments if path.startswith("tests"))


def check_pip(arguments: Sequence[str]) -> None:
    """Check that what pip is to install is this project, with extras that it has, or a tool that hooks need."""
    verb, *rest = arguments
    assert verb == "install"
    options = dict(pairwise(rest))
    assert "-c" not in options or (ROOT / options["-c"]).is_file()
    for name in [word for i, word in enumerate(rest) if not word.startswith("-") and rest[i - 1 : i] != ["-c"]]:
        own = re.fullmatch(r"\.(\[([\w,]+)\])?", name)
        assert own or name == "pre-commit"
        assert not own or set((own[2] or "test").split(",")) <= PROJECT["optional-dependencies"].keys()


def check_make(arguments: Sequence[str]) -> None:
    """Check that a target is there."""
    assert set(arguments) <= make_targets()


@cache
def make_targets() -> frozenset[str]:
    """The Makefile's targets."""
    return frozenset(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def check_mlflow(arguments: Sequence[str]) -> None:
    """Check that mlflow's command is installed; its own commands take seconds to import."""
    assert "mlflow" in {script.name for script in entry_points(group="console_scripts")}
    assert arguments[0] in ("ui", "server", "experiments", "models")


def check_export(arguments: Sequence[str]) -> None:
    """Check that a variable gets a value."""
    assert all(re.fullmatch(r"[A-Z_]+=\S+", argument) for argument in arguments)


CHECKS = {
    "python": check_python,
    "pytest": check_pytest,
    "pip": check_pip,
    "make": check_make,
    "mlflow": check_mlflow,
    "export": check_export,
    "pre-commit": lambda arguments: None,
}
"""How a command is checked, by its first word."""


def test_every_key_in_running_text_is_a_setting():
    with schema_of(BenchmarkSettings), initialize_config_dir(str(ROOT / "conf")):
        known, asking = compose("benchmark"), compose("predict")
    keys = {key for page in PAGES for key in keys_in(page) if key.partition(".")[0] in known}
    assert len(keys) > 40
    assert {key for key in keys if is_missing(known, key) and is_missing(asking, key)} == set()


def keys_in(page: Path) -> Iterator[str]:
    """What stands in running text as code and is a setting by its looks: ``train.epochs`` or ``sweep.seeds=[1,2]``."""
    for code in re.findall(r"`([^`\n]+)`", page.read_text()):
        key = re.match(r"'?([a-z_]+(\.[a-z_0-9]+)+)(=|'?$)", code)
        if key and key[1].rpartition(".")[2] not in (
            "py",
            "md",
            "json",
            "yaml",
            "txt",
            "db",
            "html",
            "cff",
            "csv",
            "tsv",
        ):
            yield key[1]


def is_missing(config: DictConfig, key: str) -> bool:
    """Whether a composed configuration has no such node."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent)
    return not isinstance(node, DictConfig) or name not in list(node)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda p: p.name)
def test_every_link_and_path_leads_somewhere(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:", link)]
    paths = re.findall(r"`((?:conf|distilbench|hydra_plugins|tests|docs)/[\w./-]*)`", text)
    broken = [link for link in links if not leads_somewhere(page, link)]
    absent = [path for path in paths if "NAME" not in path and not (ROOT / path).exists()]
    assert (broken, absent) == ([], [])


def leads_somewhere(page: Path, link: str) -> bool:
    """Whether a relative link has a file, and its anchor a heading there."""
    name, _, anchor = link.partition("#")
    target = (page.parent / name) if name else page
    if not anchor or not target.exists():
        return target.exists()
    headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
    return anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short_and_has_the_line_that_ci_runs():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if re.match(r"pip install .*\[test\].*pytest", line)] == [
        "pip install -e '.[test]' && python -m pytest"
    ]
