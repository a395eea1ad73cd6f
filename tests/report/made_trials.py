"""Fabricated trials as a store would return them: seeded, with predictions of a known accuracy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from distilbench.report.comparison import compare_with_baseline
from distilbench.report.findings import Report
from distilbench.report.rows import find_baseline, label_rows, rows_from
from distilbench.results import Predictions, Status, StoredTrial

EXAMPLES = 872
USUAL = {
    "freeze.layers": 0,
    "freeze.embeddings": False,
    "scheduler.name": "linear",
    "optim.lr": 2e-5,
    "optim.weight_decay": 0.01,
    "train.epochs": 3,
}
HOSTILE = '<img src=x onerror="document.title=1">|**b**`c`\\input{/etc/passwd}=cmd()\x1b[31m\n</script>'


def treatment(**changes) -> dict[str, object]:
    """Return the usual treatment with changes; ``freeze_layers=3`` sets ``freeze.layers``, and embeddings follow."""
    changed = {**USUAL, **{key.replace("_", ".", 1): value for key, value in changes.items()}}
    return {**changed, "freeze.embeddings": changed["freeze.layers"] > 0}


def trial(accuracy: float = 0.9, seed: int = 1, place: int = 0, settings=None, right=None, **changes) -> StoredTrial:
    """Return a finished trial that is right on ``accuracy`` of the examples, or where the array ``right`` is True."""
    if right is None:
        hardness = np.random.default_rng(0).random(EXAMPLES) * 0.7
        luck = np.random.default_rng([seed, place]).random(EXAMPLES) * 0.3
        order = np.argsort(hardness + luck)
        right = np.isin(np.arange(EXAMPLES), order[: round(accuracy * EXAMPLES)])
    labels = np.arange(len(right)) % 2
    values = {
        "run_id": f"{place:028x}{seed:04x}",
        "name": f"run {place}",
        "protocol_id": "0123456789ab",
        "treatment": settings or treatment(),
        "seed": seed,
        "status": Status.FINISHED,
        "accuracy": float(right.mean()),
        "loss": 0.35,
        "train_seconds": 1371.0,
        "trainable_parameters": 22_700_000,
        "measured_on": "cpu; trainer",
        "predictions": Predictions(labels, np.eye(2)[np.where(right, labels, 1 - labels)]),
        "model": "all-MiniLM-L6-v2",
        "data": "sst2",
        "started_ms": place,
        "score": float(right.mean()),
        "url": f"http://127.0.0.1:5000/#/experiments/1/runs/{place}",
    }
    return StoredTrial(**{**values, **changes})


def failed(status: Status, number: int, settings, error: str = "the loss is nan; lower optim.lr") -> StoredTrial:
    """Return a trial without a result."""
    nothing = dict.fromkeys(("accuracy", "loss", "train_seconds", "score"), float("nan")) | {"predictions": None}
    return replace(trial(place=number, settings=settings), status=status, error=error, **nothing)


def sweep(settings: int, seeds: int = 1, hostile: bool = False) -> list[StoredTrial]:
    """Return a fabricated sweep: deeper freezing is faster, and slightly worse from three layers on; some fail."""
    rng = np.random.default_rng(3)
    trials = [trial(0.905, seed, 0) for seed in range(1, seeds + 1)]
    for number in range(1, settings):
        depth, lr = int(rng.integers(0, 7)), float(10 ** rng.uniform(-5, -3.6))
        scheduler = HOSTILE if hostile and number % 5 == 0 else str(rng.choice(["linear", "cosine"]))
        chosen = treatment(freeze_layers=depth, optim_lr=lr, scheduler_name=scheduler)
        if number % 23 == 7:
            trials.append(failed(Status.DIVERGED, number, chosen))
            continue
        lead = 0.02 * np.exp(-((np.log10(lr) + 4.3) ** 2) * 6) - 0.006 * max(0, depth - 2)
        figures = {
            "name": HOSTILE if hostile else f"run {number}",
            "train_seconds": 1371 * (1 - 0.115 * depth) * (1 + 0.02 * rng.normal()),
            "loss": 0.33 + rng.normal() * 0.02,
            "trainable_parameters": 22_700_000 - (depth > 0) * 11_900_000 - depth * 1_770_000,
        }
        accuracy = 0.90 + lead + rng.normal() * 0.004
        trials += [trial(accuracy, seed, number, chosen, **figures) for seed in range(1, seeds + 1)]
    return trials


def report_of(
    trials,
    selected_on_report_split: bool = True,
    shown: int = 200,
    title: str = "Sweep first",
    margin: float = 1.0,
    **changes,
) -> Report:
    """Return the report of these trials, with fabricated learning curves."""
    rows = rows_from(trials)
    baseline = find_baseline(rows, USUAL)
    rows = label_rows(rows, baseline)
    rows, majority = compare_with_baseline(rows, baseline, margin, shown, selected_on_report_split and len(rows) > 2)
    curves = tuple((row, [(step, row.accuracy - 0.03 / step) for step in (1, 2, 3)]) for row in rows[:8] if row.trials)
    return Report(title, tuple(rows), shown, trials[0], margin, curves=curves, majority=majority, **changes)
