"""Reports as self-contained HTML files: the answer, the table, the charts."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from distilbench.cli import format_command, format_override
from distilbench.identity import value_of
from distilbench.report import charts
from distilbench.report.columns import FULL, drop_empty, to_csv_value
from distilbench.report.figures import figures_of, kind_of
from distilbench.report.findings import Report, answer
from distilbench.report.formats import one_line
from distilbench.report.names import embeddings_are_auto, sort_keys
from distilbench.report.rows import Row
from distilbench.report.slices import COLUMNS as SLICES
from distilbench.report.tables import failures, notes_of, protocol_lines
from distilbench.report.words import VERDICTS, describe_confirmation

TEMPLATE = Path(__file__).with_name("page.html")
_HIDDEN_COLUMNS = ("loss", "brier", "ece", "trainable_parameters", "seeds", "p_holm", "train_cpu_seconds",
                   "peak_memory_bytes")  # fmt: skip
"""Columns that are hidden until the reader asks for all."""


def page(report: Report) -> str:
    """Render the page. Names and settings are escaped; its content security policy forbids loading anything."""
    found = [row.difference for row in report.table_rows if row.difference]
    return template().render(
        report=report,
        answer=answer(report),
        counts=_counts(report),
        seeds=sorted({row.num_seeds for row in report.candidates}),
        verdicts=VERDICTS,
        depths=sorted({str(row.treatment.get("freeze.layers", "")) for row in report.table_rows}),
        columns=drop_empty(FULL, report.table_rows),
        slices=SLICES,
        figures=figures_of(report),
        failures=failures(report),
        notes=[*protocol_lines(report), *notes_of(report)],
        command_of=lambda row: _command(row, report),
        scale=charts.forest_axis([(difference.low, difference.high) for difference in found]),
        kind_of=kind_of,
        hidden_columns=_HIDDEN_COLUMNS,
        to_csv_value=to_csv_value,
        describe_confirmation=describe_confirmation,
        one_line=one_line,
    )


@cache
def template() -> Template:
    """Return the page's template, which takes 0.07 s to compile."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: one_line(value) if type(value) is str else value,
    )  # fmt: skip
    environment.globals["size"] = charts
    environment.filters |= {"px": "{:.1f}".format, "unbroken_units": _unbroken_units}
    environment.tests["web"] = lambda url: url.startswith(("http://", "https://"))
    return environment.get_template(TEMPLATE.name)


def _counts(report: Report) -> list[tuple[str, str, str]]:
    """Count the settings with each verdict, and those without one."""
    counts = Counter(row.final_verdict for row in report.candidates)
    items = [(counts[verdict], name, verdict.name.lower()) for verdict, name in VERDICTS.items()]
    items += [(counts[None], "without a verdict", "untested")]
    items += [(sum(not row.trials for row in report.rows), "without a finished trial", "ended")]
    return [(f"{count:,}", name, kind) for count, name, kind in items if count]


def _command(row: Row, report: Report) -> str:
    """Return the command that trains a setting again: its sources, and all settings that differ from the default."""
    keys = {*row.treatment, *report.default_treatment} - {"train.precision", "freeze.embeddings"}
    changed = {
        key: value for key in keys if (value := value_of(row.treatment, key)) != value_of(report.default_treatment, key)
    }
    if not embeddings_are_auto(row.treatment):
        changed["freeze.embeddings"] = row.treatment["freeze.embeddings"]
    overrides = (format_override(key, changed[key]) for key in sort_keys([*changed]))
    return format_command("train", [*report.sources, *overrides, f"seed={row.first_trial.seed}"])


def _unbroken_units(text: str) -> Markup:
    """Return escaped text in which no line breaks between a number and its unit."""
    unit = r"(?<=\d) (?=%|(points?|[kMGTPE]|s|min|h)\b)"
    return escape(re.sub(unit, "\N{NO-BREAK SPACE}", one_line(text)))
