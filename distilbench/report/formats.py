"""Formatting of figures, and escaping of names, for all tables."""

from __future__ import annotations

import math


def duration(seconds: float) -> str:
    """Format seconds as ``8.4 s``, ``22 min 51 s``, ``2 h 14 min``."""
    whole = round(seconds)
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def percent(share: float) -> str:
    """Format a share in [0, 1] as ``90.71 %``."""
    return f"{100 * share:.2f} %"


def points(difference: float) -> str:
    """Format percentage points as ``+0.12``; zero has no sign."""
    text = f"{difference:+.2f}"
    return text if float(text) else text[1:]


def p_value(p: float) -> str:
    """Format a p-value as ``0.63``, ``0.043``, ``< 0.001``."""
    if p < 0.001:
        return "< 0.001"
    return f"{p:.2f}" if p >= 0.1 else f"{p:.3f}"


def saving(saved_percent: float, is_count: bool = False) -> str:
    """Format a saving: ``35 % less`` (at most 99 %), ``12 % more``, ``as much``; of a count ``fewer``, ``as many``."""
    whole = min(round(saved_percent), 99)
    if not whole:
        return "as many" if is_count else "as much"
    return f"{abs(whole)} % {('fewer' if is_count else 'less') if whole > 0 else 'more'}"


def flops(number: float) -> str:
    """Format floating-point operations with SI prefixes, ``689 T``, ``1.25 P``."""
    number = float(f"{number:.3g}")  # so that 999.7 T becomes 1 P
    power = min(max(int(math.log10(number) // 3), 0), 6) if number > 0 else 0
    return f"{number / 1000**power:.3g} {' kMGTPE'[power]}".rstrip()


def memory(size: float) -> str:
    """Format bytes as ``1.5 GiB``, ``640 MiB``."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def mean_and_deviation(mean: float, deviation: float | None) -> str:
    """Format shares in [0, 1] as ``90.71 ± 0.23 %``; only the mean without a deviation (a single value)."""
    return percent(mean) if deviation is None else f"{100 * mean:.2f} ± {100 * deviation:.2f} %"


def interval(low: float, high: float) -> str:
    """Format an interval in percentage points as ``-0.50 to +0.74``."""
    return f"{points(low)} to {points(high)}"


def millions(number: int) -> str:
    """Format a count as ``66.96 M``; counts below 100,000 in full."""
    return f"{number / 1e6:.2f} M" if number >= 100_000 else f"{number:,}"


def one_line(text: str) -> str:
    """Return ``text`` on one line, without control characters, which could move a terminal's cursor."""
    shown = text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)
    return " ".join(shown.split())


def markdown(text: str) -> str:
    """Escape text for Markdown, on one line."""
    escaped = (f"\\{c}" if c in "\\`*_{}[]>#|!&~$" else c for c in one_line(text))
    return "".join("&lt;" if c == "<" else c for c in escaped)  # MLflow's page shows the backslash of an escaped one


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''", "±": r"$\pm$",
}  # fmt: skip


def latex(text: str) -> str:
    """Escape text for LaTeX, on one line; ``±`` becomes a command."""
    return "".join(_LATEX.get(c, c) for c in one_line(text))
