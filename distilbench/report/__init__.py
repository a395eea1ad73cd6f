"""What people read: a trial beside its baseline, and many trials as a table and a page.

Sees settings and results only: what is shown is handed in, where it goes is for others to say. Comparisons are made in
``rows`` (with ``statistics``), said in ``words``, laid out by ``columns``.
"""

from distilbench.report.formats import duration, less, p_value, percent, points
from distilbench.report.trial import (
    Comparison,
    Summary,
    compare,
    comparison_headline,
    comparison_markdown,
    comparison_metrics,
    frozen_part,
    print_summary,
    sentence,
    trial_line,
)

__all__ = [
    "Comparison",
    "Summary",
    "compare",
    "comparison_headline",
    "comparison_markdown",
    "comparison_metrics",
    "duration",
    "frozen_part",
    "less",
    "p_value",
    "percent",
    "points",
    "print_summary",
    "sentence",
    "trial_line",
]
