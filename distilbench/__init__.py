"""The Python interface, for notebooks and scripts; settings are overrides, as on the command line.

Importing this module is fast: each function imports what it needs when called. While working, it prints what the
corresponding command prints. An error that the user can fix raises :class:`distilbench.settings.SettingsError` with a
one-line message. See ``docs/quickstart.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from distilbench.version import __version__

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from pandas import DataFrame

    from distilbench.report.findings import Report
    from distilbench.settings import AppSettings
    from distilbench.trials.prepared import Job
    from distilbench.trials.run import Trial

__all__ = [
    "__version__",
    "compose",
    "make_report",
    "predict_texts",
    "run_sweep",
    "to_table",
    "train_trial",
    "train_trials",
]


def compose(*overrides: str) -> AppSettings:
    """Compose the settings from overrides such as ``freeze.layers=3``, and check them."""
    with _hydra():
        return _job(overrides).settings


def train_trial(*overrides: str) -> Trial:
    """Train one trial, print how it compares with its baseline, and return it, however it ended.

    Its ``result`` has the figures, ``comparison`` the verdict (None without a baseline), ``predictions`` the logits.
    """
    with _hydra():
        from distilbench.trials.batch import run_and_compare

        return run_and_compare(_job(overrides))


def train_trials(trials: Iterable[Sequence[str]]) -> list[Trial]:
    """Train a trial for each list of overrides, together if the engine can; the results keep the order.

    Raises for an invalid setting before any training, and for any other error of a trial once all trials have ended.
    """
    with _hydra():
        from distilbench.trials.batch import BatchRunner

        ended = BatchRunner(max_trials=32).train([_job(overrides) for overrides in trials], lambda trial: trial)
    if error := next((end for end in ended if isinstance(end, Exception)), None):
        raise error
    return [end for end in ended if not isinstance(end, Exception)]


def run_sweep(*overrides: str) -> None:
    """Run or continue a sweep as ``python -m distilbench.train --multirun`` does; then call :func:`make_report`.

    Raises :class:`distilbench.cli.CommandFailed` if too many trials fail.
    """
    from distilbench.cli import run_in_process
    from distilbench.train import main

    run_in_process(main, ["--multirun", *overrides])


def make_report(*overrides: str) -> Report:
    """Return the report that ``python -m distilbench.compare`` makes: ``make_report("sweep=first")``."""
    with _hydra():
        from distilbench.compare import report_of, to_hydra_argument
        from distilbench.settings import CompareSettings, settings_from

        return report_of(settings_from(_composed("compare", map(to_hydra_argument, overrides)), CompareSettings))


def to_table(report: Report) -> DataFrame:
    """Return a report's rows as a pandas DataFrame with every column of ``report.csv``; names and ids stay text."""
    from io import StringIO

    from pandas import read_csv

    from distilbench.report.tables import csv_report

    texts = dict.fromkeys(("trial", "setting", "slice", "seeds", "protocol", "runs"), str)
    return read_csv(StringIO(csv_report(report)), dtype=texts, keep_default_na=False, na_values=[""])


def predict_texts(texts: Iterable[str | Sequence[str]], *overrides: str) -> DataFrame:
    """Return label and probabilities of each text or pair; ``run=``, ``dir=`` or ``sweep=`` names the model."""
    with _hydra():
        from distilbench.predict import open_model, rows_of
        from distilbench.settings import PredictSettings, settings_from

        config = _composed("predict", ["data.test=unread", *overrides])
        settings = settings_from(config, PredictSettings)
        classifier = open_model(settings)
        return classifier.predict_texts(rows_of(texts, classifier), settings.batch_size)


def _composed(name: str, overrides: Iterable[str]) -> DictConfig:
    import hydra

    from distilbench.settings import require

    given = list(overrides)
    wrong = next((one for one in given if not isinstance(one, str)), "")
    require(wrong == "", "an override", "a string such as 'freeze.layers=3'", wrong)
    return hydra.compose(name, given, return_hydra_config=True)


def _job(overrides: Sequence[str]) -> Job:
    """Return the trial for these overrides, in a new directory unless they name one."""
    from datetime import datetime

    from omegaconf import open_dict

    from distilbench.composition import check, refuse_settings_of_sweeps
    from distilbench.settings import require, root
    from distilbench.train import job_of

    require(not isinstance(overrides, str), "a trial", "a list of overrides", overrides)
    directory = root() / "outputs" / f"{datetime.now():%Y-%m-%d/%H-%M-%S-%f}"
    config = _composed("config", [f"output.dir={directory}", *overrides])
    refuse_settings_of_sweeps(config)
    choices = config.hydra.runtime.choices
    with open_dict(config):
        del config["hydra"]
    check(config, ask_hub=False)
    return job_of(config, choices)


@contextmanager
def _hydra() -> Iterator[None]:
    """Initialise Hydra with our configurations, and turn its errors into one-line ones."""
    from hydra import initialize_config_dir

    from distilbench.cli import as_settings_error
    from distilbench.settings import CONF, register_schema

    register_schema()
    try:
        with initialize_config_dir(str(CONF)):
            yield
    except Exception as error:
        mistake = as_settings_error(error)
        if mistake is None or mistake is error:
            raise
        raise mistake from None
