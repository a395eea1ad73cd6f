"""What people read: a trial beside its baseline, and many trials as a table and a page.

Sees settings and results only: what is shown is handed in, where it goes is for others to say.
"""

from distilbench.report.formats import duration, p_value, percent, points, time_gain
from distilbench.report.trial import (
    Comparison,
    Summary,
    compare,
    comparison_markdown,
    comparison_metrics,
    frozen_part,
    print_summary,
    trial_line,
)

__all__ = [
    "Comparison",
    "Summary",
    "compare",
    "comparison_markdown",
    "comparison_metrics",
    "duration",
    "frozen_part",
    "p_value",
    "percent",
    "points",
    "print_summary",
    "time_gain",
    "trial_line",
]
