"""What people read: a trial beside its baseline, and many trials as a table and a page. Sees settings and results only."""

from distilbench.report.findings import Confirmed, Curve, Report, headline
from distilbench.report.formats import (
    duration,
    p_value,
    percent,
    points,
    time_gain,
)
from distilbench.report.page import page
from distilbench.report.rows import Row, against_baseline, find_baseline, group, label_rows
from distilbench.report.tables import csv_report, latex_report, markdown_report, note, print_report
from distilbench.report.trial import (
    Comparison,
    Summary,
    compare,
    comparison_markdown,
    comparison_metrics,
    frozen_part,
    print_summary,
)
