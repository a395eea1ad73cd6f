"""What a run keeps as files: predictions as Parquet, a confusion matrix and a learning curve."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from distilbench.results import Predictions, TrialResult


def write_predictions(predictions: Predictions, path: Path) -> None:
    """Write Parquet with a row per example: ``index``, ``label``, ``prediction``, ``logit_0`` ... (float32), ``slice``.

    The last is there where results are also reported by it.
    The file is whole or not there: where it can't be written, the room that its part took is given back.
    """
    import pyarrow
    import pyarrow.parquet

    columns = {
        "index": np.arange(len(predictions.labels)),
        "label": predictions.labels,
        "prediction": predictions.logits.argmax(axis=1),
        **{f"logit_{i}": column.astype(np.float32) for i, column in enumerate(predictions.logits.T)},
    }
    if predictions.slices is not None:
        columns["slice"] = predictions.slices
    partial = path.with_name(f"{path.name}.partial")
    try:
        pyarrow.parquet.write_table(pyarrow.table(columns), partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_predictions(path: Path) -> Predictions:
    """Read what :func:`write_predictions` wrote; raises OSError, KeyError or ValueError (pyarrow's) for other files."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    logits = [name for name in table.column_names if name.startswith("logit_")]
    return Predictions(
        labels=table["label"].to_numpy(),
        logits=np.stack([table[name].to_numpy() for name in logits], axis=1),
        slices=table["slice"].to_numpy() if "slice" in table.column_names else None,
    )


def confusion_figure(predictions: Predictions, label_names: tuple[str, ...]) -> Any:
    """Return counts of predicted against true labels as a matplotlib Figure, with numbers up to twenty labels."""
    from matplotlib.figure import Figure

    size = len(label_names)
    counts = np.zeros((size, size), dtype=np.int64)
    np.add.at(counts, (predictions.labels, predictions.logits.argmax(axis=1)), 1)
    side = 0.4 * min(size, 40)  # inches; of 150 labels, each with its name at full size, drawing took 5 s
    figure = Figure(figsize=(4 + side, 3.2 + side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(counts, cmap="Blues")
    axes.set(xlabel="predicted", ylabel="true", title=f"accuracy {predictions.correct.mean():.2%}")
    every = max(1, size // 40)
    axes.set_xticks(range(0, size, every), label_names[::every], rotation=45 if size > 4 else 0)
    axes.set_yticks(range(0, size, every), label_names[::every])
    if size <= 20:
        for (row, column), count in np.ndenumerate(counts):
            dark = count > counts.max() / 2
            axes.text(column, row, f"{count:,}", ha="center", va="center", color="white" if dark else "black")
    return figure


def curve_figure(losses: list[tuple[int, float]], result: TrialResult) -> Any:
    """Loss (train, selection split) and accuracy over steps as a matplotlib Figure, the kept epoch marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4))  # fixed margins: a layout that measures itself draws all of it twice, 0.15 s
    loss_axes, accuracy_axes = figure.subplots(1, 2, gridspec_kw={"left": 0.07, "right": 0.98, "bottom": 0.15})
    if losses:
        loss_axes.plot(*zip(*losses, strict=True), color="0.6", linewidth=1, label="train")
    steps = [evaluation.step for evaluation in result.history]
    for axes, name in ((loss_axes, "loss"), (accuracy_axes, "accuracy")):
        axes.plot(steps, [e.metric(name) for e in result.history], "o-", label=f"{name} at evaluations")
        if result.selection is not None:
            axes.axvline(result.selection.step, color="tab:green", linestyle=":", label="kept")
        axes.set(xlabel="step", title=name)
        axes.legend(loc="best" if len(losses) < 1000 else "upper right")
    return figure
