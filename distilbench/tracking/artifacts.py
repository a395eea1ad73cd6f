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
    from sklearn.metrics import ConfusionMatrixDisplay

    size = len(label_names)
    side = 0.4 * min(size, 40)  # inches
    figure = Figure(figsize=(4 + side, 3.2 + side), layout="constrained")
    axes = figure.subplots()
    ConfusionMatrixDisplay.from_predictions(
        predictions.labels, predictions.logits.argmax(axis=1), labels=range(size), display_labels=label_names,
        include_values=size <= 20, values_format=",", xticks_rotation=45 if size > 4 else 0, cmap="Blues",
        colorbar=False, ax=axes,
    )  # fmt: skip
    axes.set_title(f"accuracy {predictions.correct.mean():.2%}")
    if size > 40:  # of 150 labels, each with its name, drawing took 5 s
        axes.set(xticks=[], yticks=[])
    return figure


def curve_figure(losses: list[tuple[int, float]], result: TrialResult) -> Any:
    """Return loss, of training too, and accuracy over steps as a matplotlib Figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4))
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    loss_axes.plot([step for step, _ in losses], [loss for _, loss in losses], color="0.6", linewidth=1)
    for axes, name in ((loss_axes, "loss"), (accuracy_axes, "accuracy")):
        axes.plot([e.step for e in result.history], [e.metric(name) for e in result.history], "o-")
        axes.set(xlabel="step", title=name)
    return figure
