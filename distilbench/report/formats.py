"""How figures and names are written: one way for every table, and nothing in a name acts as markup."""

from __future__ import annotations

import math


def duration(seconds: float) -> str:
    """``8.4 s``, ``22 min 51 s``, ``2 h 14 min``."""
    whole = round(seconds)
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def percent(share: float) -> str:
    """``90.71 %`` of a share in [0, 1]."""
    return f"{100 * share:.2f} %"


def points(difference: float) -> str:
    """``+0.12`` points of accuracy (per cent); zero has no sign."""
    text = f"{difference:+.2f}"
    return text if float(text) else text[1:]


def p_value(p: float) -> str:
    """``0.63``, ``0.043``, ``< 0.001``."""
    if p < 0.001:
        return "< 0.001"
    return f"{p:.2f}" if p >= 0.1 else f"{p:.3f}"


def less(saved_percent: float, few: bool = False) -> str:
    """``35 % less``, ``12 % more`` of a cost, never all of it, or ``as much``; ``few``: ``35 % fewer``, ``as many``."""
    whole = min(round(saved_percent), 99)
    if not whole:
        return "as many" if few else "as much"
    return f"{abs(whole)} % {('fewer' if few else 'less') if whole > 0 else 'more'}"


def flops(number: float) -> str:
    """``689 T``, ``1.25 P`` floating-point operations, as powers of a thousand."""
    number = float(f"{number:.3g}")  # so that 999.7 T is 1 P
    power = min(max(int(math.log10(number) // 3), 0), 6) if number > 0 else 0
    return f"{number / 1000**power:.3g} {' kMGTPE'[power]}".rstrip()


def memory(size: float) -> str:
    """``1.5 GiB``, ``640 MiB``."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def spread(mean: float, deviation: float | None) -> str:
    """``90.71 ± 0.23 %`` of shares in [0, 1]; without a deviation (one value) the mean alone."""
    return percent(mean) if deviation is None else f"{100 * mean:.2f} ± {100 * deviation:.2f} %"


def interval(low: float, high: float) -> str:
    """``-0.50 to +0.74``, in points."""
    return f"{points(low)} to {points(high)}"


def millions(number: int) -> str:
    """``66.96 M``; small counts as they are."""
    return f"{number / 1e6:.2f} M" if number >= 100_000 else f"{number:,}"


def one_line(text: str) -> str:
    """``text`` without control characters, which move a terminal's cursor, and without line breaks."""
    shown = text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)
    return " ".join(shown.split())


def markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    escaped = (f"\\{c}" if c in "\\`*_{}[]>#|!&~$" else c for c in one_line(text))
    return "".join("&lt;" if c == "<" else c for c in escaped)  # MLflow's page shows the backslash of an escaped one


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''", "±": r"$\pm$",
}  # fmt: skip


def latex(text: str) -> str:
    """Text that LaTeX shows as it is, on one line; ``±`` becomes a command."""
    return "".join(_LATEX.get(c, c) for c in one_line(text))
