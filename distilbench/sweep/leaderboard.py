"""How a sweep stands: its trials beside the baseline, for the terminal, for MLflow, and for the results file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from optuna.trial import TrialState
from rich import box
from rich.table import Table
from rich.text import Text

from distilbench.report import duration, percent, points
from distilbench.results import Status
from distilbench.sweep.space import Cell, Space
from distilbench.sweep.study import FAILURES, REUSED, Standing

ROWS = 30
"""Trials that the description of MLflow's parent run shows; all of them are below it, as its children."""

_SHARES = ("accuracy", "f1")


@dataclass(frozen=True)
class Row:
    """One trial: ``values`` are its objectives, empty without a result; ``number`` is its directory.

    ``params`` are what varies in the sweep, by override key.
    """

    number: str
    name: str
    status: str
    is_baseline: bool
    values: tuple[float, ...]
    scores: Mapping[str, float]
    seconds: float
    run_id: str | None
    error: str | None
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Board:
    """The trials of a sweep, in order, the baselines beside the space first; ``left`` is how many are to come."""

    rows: Sequence[Row]
    objectives: Sequence[str]
    directions: Sequence[str]
    total: int

    @cached_property
    def counts(self) -> Counter[str]:
        """Trials by status."""
        return Counter(row.status for row in self.rows)

    @property
    def failed(self) -> int:
        """Trials that diverged, ran out of memory, or failed."""
        return sum(self.counts[status] for status in FAILURES)

    @property
    def done(self) -> int:
        """Trials that came to an end of their own."""
        return self.counts[Status.FINISHED] + self.counts[Status.PRUNED] + self.failed

    @cached_property
    def baseline(self) -> Row | None:
        """The first baseline that has a result."""
        return next((row for row in self.rows if row.is_baseline and row.values), None)

    @cached_property
    def best(self) -> list[Row]:
        """The best trial, or with several objectives all that no other beats in each of them."""
        trained = [row for row in self.rows if row.values and row.status == Status.FINISHED]
        signs = [1 if direction == "maximize" else -1 for direction in self.directions]

        def beats(a: Row, b: Row) -> bool:
            pairs = [(s * x, s * y) for s, x, y in zip(signs, a.values, b.values, strict=True)]
            return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)

        front = [row for row in trained if not any(beats(other, row) for other in trained)]
        return front if len(self.objectives) > 1 else front[:1]

    def seconds_left(self, at_once: int) -> float | None:
        """Predicted seconds until the last trial; None before the first result."""
        seconds = [row.seconds for row in self.rows if row.seconds]
        left = self.total - self.done
        return left * sum(seconds) / len(seconds) / at_once if seconds and left > 0 else None

    def line(self, at_once: int = 1) -> str:
        """The sweep in one line."""
        words = {"running": self.counts[Status.RUNNING], "pruned": self.counts[Status.PRUNED], "failed": self.failed}
        parts = [f"{self.done} of {self.total} trials"]
        parts += [f"{count} {word}" for word, count in words.items() if count]
        if len(self.objectives) > 1:
            parts.append(f"{len(self.best)} on the Pareto front")
        elif self.best:
            parts.append(f"best {self._against_baseline(self.best[0])}")
        left = self.seconds_left(at_once)
        return ", ".join(parts) + (f", about {duration(left)} left" if left else "")

    def _against_baseline(self, row: Row) -> str:
        objective, value = self.objectives[0], row.values[0]
        text = f"{objective} {shown(objective, value)} (trial {row.number})"
        if self.baseline is None:
            return text
        if row is self.baseline:
            return f"{text}, the baseline"
        return f"{text} against the baseline's {shown(objective, self.baseline.values[0])}"

    def metrics(self) -> dict[str, float]:
        """Counts, best and baseline, as metrics of the sweep's own run."""
        named = {"trials_done": self.done, "trials_finished": self.counts[Status.FINISHED],
                 "trials_pruned": self.counts[Status.PRUNED], "trials_failed": self.failed,
                 "trials_running": self.counts[Status.RUNNING], "trials_reused": self.counts[REUSED]}  # fmt: skip
        values: dict[str, float] = dict(named)
        if len(self.objectives) == 1 and self.best:
            values[f"best_{self.objectives[0]}"] = self.best[0].values[0]
        if self.baseline:
            values |= {f"baseline_{k}": v for k, v in zip(self.objectives, self.baseline.values, strict=True)}
        return values

    def results(self) -> dict[str, Any]:
        """What hydra-optuna-sweeper writes to ``optimization_results.yaml``, with each trial's number."""
        if len(self.objectives) > 1:
            return {"name": "optuna", "solutions": [
                {"trial": row.number, "params": dict(row.params), "values": list(row.values)} for row in self.best
            ]}  # fmt: skip
        best = self.best[0] if self.best else None
        return {"name": "optuna", "best_trial": best and best.number, "best_params": best and dict(best.params),
                "best_value": best and best.values[0]}  # fmt: skip

    def table(self) -> Table:
        """Every trial, the best first, as a rich table."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        header, *rows = self._cells()
        for title in header:
            is_text = title in ("trial", "settings", "status")
            table.add_column(
                title.replace(" ", "\n"), justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text
            )
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        return table

    def markdown(self, link: Callable[[str | None], str | None]) -> str:
        """The first trials of the same table, with links to their runs."""
        header, *rows = self._cells()
        lines = [f"**{self.line()}**", "", _row(header), _row(["---"] * len(header))]
        for cells, row in list(zip(rows, self.ordered, strict=True))[:ROWS]:
            page = link(row.run_id)
            name = f"[{_plain(cells[1])}]({page})" if page else _plain(cells[1])
            lines.append(_row([cells[0], name, *cells[2:]]))
        if len(rows) > ROWS:
            lines.append(f"\n{len(rows) - ROWS} more trials below this run.")
        return "\n".join(lines)

    @cached_property
    def ordered(self) -> list[Row]:
        """Best first by the first objective, those without a result last."""
        sign = -1 if self.directions[0] == "maximize" else 1
        return sorted(self.rows, key=lambda row: sign * row.values[0] if row.values else math.inf)

    def _cells(self) -> Iterator[list[str]]:
        others = [name for name in self.objectives if name not in ("accuracy", "train_seconds")]
        yield ["trial", "settings", "accuracy", "against baseline", *others, "time", "status"]
        base = self.baseline.scores.get("accuracy") if self.baseline else None
        for row in self.ordered:
            accuracy = row.scores.get("accuracy")
            known = accuracy is not None and base is not None
            values = dict(zip(self.objectives, row.values, strict=True)) if row.values else {}
            yield [
                row.number,
                row.name,
                "" if accuracy is None else percent(accuracy),
                f"{points(100 * (accuracy - base))} points" if known else "",  # type: ignore[operator]
                *(shown(name, values[name]) if name in values else "" for name in others),
                duration(row.seconds) if row.seconds else "",
                row.status + (f": {row.error}" if row.error and row.status in (*FAILURES, Status.PRUNED) else ""),
            ]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, also on MLflow's page, which does not know an escaped ``<``."""
    return "".join("&lt;" if c == "<" else f"\\{c}" if c in "\\`*_{}[]>()#|!&~$" else c for c in text)


def shown(objective: str, value: float) -> str:
    """A value of an objective, for people."""
    if objective in _SHARES:
        return percent(value)
    return duration(value) if objective.endswith("seconds") else f"{value:.4g}"


def name_of(cell: Cell, space: Space, seed: int | None = None) -> str:
    """What varies in the sweep, and only that: ``layers=3 scheduler=cosine``."""
    if cell.is_baseline and (cell.extra or not cell.params):
        return "baseline" + (f" seed={seed}" if "seed" in space.dimensions else "")
    ends = Counter(key.rpartition(".")[2] for key in space.dimensions)
    parts = []
    for key, value in cell.params.items():
        end = key.rpartition(".")[2]
        parts.append(f"{end if ends[end] <= 1 else key}={_short(value)}")
    varied = " ".join(parts) or "trial"
    return f"baseline: {varied}" if cell.is_baseline else varied


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def row_of(standing: Standing, space: Space, objectives: int, prefix: str, twin: Standing | None) -> Row:
    """A study's trial as a row; one that was not trained has its ``twin``'s result."""
    attributes = {**(twin.trial.user_attrs if twin else {}), **standing.trial.user_attrs}
    cell = Cell(standing.trial.params, tuple(attributes.get("extra", ())), standing.is_baseline)
    complete = standing.trial.state == TrialState.COMPLETE
    return Row(
        number=f"{prefix}{standing.number}",
        name=str(attributes.get("name") or name_of(cell, space)),
        status=standing.status if standing.status != REUSED else f"{REUSED} from {attributes['reused_from']}",
        is_baseline=standing.is_baseline,
        values=tuple(standing.trial.values)[:objectives] if complete else (),
        scores=attributes.get("scores", {}),
        seconds=0.0 if standing.status == REUSED else attributes.get("figures", {}).get("train_seconds", 0.0),
        run_id=attributes.get("run_id"),
        error=attributes.get("error"),
        params=standing.trial.params,
    )
