"""The page needs nothing but itself, and what it is told in names stays text."""

import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from distilbench.identity import treatment_of
from distilbench.report import charts
from distilbench.report.figures import MOST_POINTS
from distilbench.report.page import TEMPLATE, page
from distilbench.results import Status
from tests.report.made_trials import HOSTILE, failed, report_of, sweep, treatment, trial

VOID = {"meta", "br", "img", "input", "link"}


class Document(HTMLParser):
    """Elements with their attributes, the text of each, and whether every tag was closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def document() -> Document:
    return Document(page(report_of(sweep(40, seeds=3), url="http://127.0.0.1:5000/#/x")))


def test_nothing_is_loaded_from_elsewhere(document):
    for tag, attributes in document.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed"), tag
        assert not {"src", "srcset", "background", "action"} & set(attributes)
        if "href" in attributes:
            assert tag == "a"
    policy = next(a["content"] for t, a in document.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_every_tag_is_closed(document):
    assert document.open == []


def test_the_answer_comes_first_then_the_table(document):
    words = document.words
    assert words.index("settings tried") < words.index("difference (95 %)") < words.index("Accuracy against cost")


def test_each_row_has_a_cell_for_each_column_and_a_value_to_sort_by(document):
    tags = [tag for tag, _ in document.elements]
    rows, cells = tags.count("tr") - 1, tags.count("td")
    assert rows == 40
    assert cells == rows * tags.count("th")
    assert all("data-value" in attributes for tag, attributes in document.elements if tag == "td")


def test_all_charts_are_there_for_a_sweep_that_has_the_trials(document):
    for title in ("Accuracy against cost", "Learning curves", "Accuracy by freeze depth", "What mattered",
                  "The sweep as it went"):  # fmt: skip
        assert title in document.words


def test_names_are_text_wherever_they_stand():
    trials = sweep(30, hostile=True)
    document = Document(page(report_of(trials, title=HOSTILE)))
    tags = {tag for tag, _ in document.elements}
    assert "img" not in tags
    assert not any(name.startswith("on") for _, attributes in document.elements for name in attributes)
    assert [tag for tag, _ in document.elements].count("script") == 1
    assert "<img src=x" in document.words
    assert "\x1b" not in document.words


def test_a_link_that_is_no_web_address_is_no_link():
    text = page(report_of([trial(0.9, url="javascript:alert(1)"), trial(0.9, 1, 1, treatment(freeze_layers=3))]))
    assert "javascript:" not in text


@pytest.mark.parametrize(
    "trials",
    [
        [trial(0.9)],
        [failed(Status.DIVERGED, 1, treatment(optim_lr=1.0))],
        [failed(Status.DIVERGED, 0, treatment()), trial(0.9, 1, 1, treatment(freeze_layers=3))],
        [trial(0.9), trial(0.9, 1, 1, treatment(freeze_layers=3), measured_on="cuda")],
    ],
    ids=["baseline alone", "all failed", "baseline failed", "other device"],
)
def test_reports_that_hold_little_still_make_a_page(trials):
    assert Document(page(report_of(trials))).open == []


def test_a_confirmation_stands_beside_the_sweep():

    report = report_of([trial(0.9), trial(0.9, 1, 1, treatment(freeze_layers=3))])
    row = report.candidates[0]
    words = Document(page(report_of([trial(0.9)], confirmation=(replace(row, confirmation=row),)))).words
    assert "Confirmed with fresh seeds?" in words
    assert "The advantage of layers=3 was not there in the sweep either: " in words


def test_a_chart_of_very_many_settings_stays_drawable():
    trials = [
        trial(None, 1, n, treatment(optim_lr=1e-5 * (n + 2)), right=trial(0.9).predictions.correct) for n in range(3000)
    ]
    text = page(report_of(trials, shown=5))
    assert text.count("<circle") <= 2 * MOST_POINTS + 100


def test_a_data_curve_is_drawn_where_amounts_of_text_vary():
    trials = [
        trial(a, 1, n + depth, treatment(freeze_layers=depth) | {"data.max_train_examples": n}, train_examples=n,
              train_flops=n * 1e9)
        for depth, a, n in ((0, 0.85, 500), (0, 0.9, 5000), (3, 0.8, 500), (3, 0.88, 5000))
    ]  # fmt: skip
    words = Document(page(report_of(trials))).words
    assert "How much text" in words
    assert "Half of the text costs about " in words
    assert "1,000 2,000 5,000" in words, "a logarithmic axis"


def test_pruned_trials_are_drawn_where_they_stopped():
    stopped = replace(failed(Status.PRUNED, 3, treatment(optim_lr=1e-3)), accuracy=0.6, train_seconds=300.0)
    text = page(report_of([trial(0.9), trial(0.9, 1, 1, treatment(freeze_layers=3)), stopped]))
    assert text.count('class="stopped"') == 2, "in the trade-off and in the sweep as it went"
    assert "Crosses are where trials were stopped." in text


def test_learning_curves_of_single_evaluations_are_not_drawn():
    report = report_of([trial(0.9), trial(0.9, 1, 1, treatment(freeze_layers=3))])
    single = replace(report, curves=tuple((row, points[:1]) for row, points in report.curves))
    assert "Learning curves" in page(report)
    assert "Learning curves" not in page(single)


def test_marks_and_rows_are_tied_so_that_filter_and_card_find_them(document):
    rows = {a["data-row"]: a for tag, a in document.elements if tag == "tr" and "data-row" in a}
    marks = {a["data-row"] for tag, a in document.elements if tag in ("circle", "polyline") and "data-row" in a}
    assert marks <= rows.keys()
    assert len(rows) == 40
    assert {a["data-depth"] for a in rows.values()} == set("0123456")
    assert rows["0"]["data-command"].startswith("python -m distilbench.train freeze.layers=")
    assert " seed=1" in rows["0"]["data-command"]


def test_every_finished_setting_is_a_line_across_what_varied(document):
    lines = [a for tag, a in document.elements if tag == "polyline" and "data-row" in a]
    finished = [a for tag, a in document.elements if tag == "tr" and a.get("data-kind") not in (None, "ended")]
    assert len(lines) == len(finished)
    assert "Every setting" in document.words


def test_headings_have_scopes_the_table_a_caption_and_the_phone_a_menu_to_sort(document):
    assert all(a.get("scope") == "col" for tag, a in document.elements if tag == "th")
    tags = [tag for tag, _ in document.elements]
    assert tags.count("caption") == 1
    assert [a["id"] for tag, a in document.elements if tag == "select" and "id" in a] == ["order"]


def luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb`` or ``#rgb`` (WCAG 2.2)."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(colour: str, back: str, opacity: float = 1.0) -> float:
    """The contrast of a colour, laid with ``opacity`` over another, with that other one."""
    mixed = [round(int(a, 16) * opacity + int(b, 16) * (1 - opacity))
             for a, b in zip(*(re.findall("..", one[1:] if len(one) == 7 else "".join(2 * d for d in one[1:]))
                               for one in (colour, back)), strict=True)]  # fmt: skip
    high, low = sorted((luminance("#" + "".join(f"{part:02x}" for part in mixed)), luminance(back)), reverse=True)
    return (high + 0.05) / (low + 0.05)


STYLE = TEMPLATE.read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]
OPACITIES = {float(found) for found in re.findall(r"(?:fill|stroke)-opacity: ([.\d]+)", STYLE)}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_a_contrast_of_4_5_and_a_mark_of_3_on_each_ground(scheme):
    light, dark = STYLE.split("@media (prefers-color-scheme: dark)")
    colours = dict(re.findall(r"--(\w+): (#\w+)", light if scheme == "light" else dark.partition("* {")[0]))
    grounds = [colours.pop("back"), colours.pop("soft")]
    colours.pop("line")  # rules between rows and grid lines, which tell nothing
    assert len(colours) == 9
    for name, colour in colours.items():
        for ground in grounds:
            assert contrast(colour, ground) >= 4.5, (name, ground)
            assert contrast(colour, ground, min(OPACITIES)) >= 3, (name, ground)


@pytest.mark.parametrize(
    ("amounts", "ticks"),
    [
        ((8000, 9000), [8000, 8500, 9000]),
        ((500, 4000), [500, 1000, 2000]),
        ((500, 67_349), [1000, 3000, 10_000, 30_000]),
        ((100, 2_000_000), [100, 1000, 10_000, 100_000, 1_000_000]),
    ],
)
def test_a_long_range_of_examples_has_few_labels_which_do_not_touch(amounts, ticks):
    assert [
        tick
        for tick in charts.Chart("", [charts.Mark("line", [(n, 0) for n in amounts])], is_log=True).x.ticks
        if amounts[0] <= tick <= amounts[1]
    ] == ticks


def test_text_of_charts_has_11_pixels_on_a_phone_of_390():
    """A chart is as wide as the page without the paddings of the body and the figure, whatever its own unit."""
    size = float(re.search(r"svg {.*?font: ([\d.]+)px", STYLE).group(1))
    body = int(re.search(r"max-width: 700px\) {\s+body { padding: (\d+)px", STYLE).group(1))
    figure = int(re.search(r"figure { margin: 0; padding: \d+px (\d+)px", STYLE).group(1))
    assert size * (390 - 2 * body - 2 * figure) / charts.WIDTH >= 11


def test_a_cards_line_names_sources_and_all_that_is_not_as_usual():
    trials = [trial(0.9), trial(0.9, 1, 1, treatment(freeze_layers=3, scheduler_name="cosine", train_epochs=1))]
    report = report_of(trials, default_treatment=treatment(), sources=("model=minilm", "data=files"))
    rows = [attributes for tag, attributes in Document(page(report)).elements if tag == "tr" and attributes]
    lines = {row["data-command"] for row in rows}
    start = "python -m distilbench.train model=minilm data=files "
    assert lines == {f"{start}seed=1", f"{start}freeze.layers=3 scheduler.name=cosine train.epochs=1 seed=1"}


@pytest.mark.parametrize(
    "given",
    [("freeze=bias",), ("freeze=scheduled", "freeze.layers=2"), ("adapter=lora", "adapter.rank=4"), ("optim=sgd",),
     ("optim.name=sgd",), ("freeze.layers=2", "freeze.embeddings=false")],
)  # fmt: skip
def test_a_cards_line_composes_to_its_settings(settings, given):
    usual, ours = (treatment_of(settings(*overrides).trial, "") for overrides in ((), given))
    report = report_of([trial(0.9, settings=usual), trial(0.9, 1, 1, ours)], default_treatment=usual)
    lines = [shlex.split(dict(at)["data-command"]) for tag, at in Document(page(report)).elements if tag == "tr" and at]
    assert ours in [treatment_of(settings(*line[3:]).trial, "") for line in lines]


def test_labels_with_units_are_few_and_numbers_stay_with_them():
    costs = [trial(0.9 - n / 50, 1, n, treatment(freeze_layers=n), train_flops=1.03e12 - n * 1.14e11) for n in range(7)]
    drawn = page(report_of(costs)).partition("Accuracy against FLOPs")[2].partition("</svg>")[0]
    assert re.findall(r">([\d.]+ [GT])<", drawn) == ["400 G", "600 G", "800 G", "1 T"]
    assert "11\N{NO-BREAK SPACE}% fewer FLOPs" in page(report_of(costs, selected_on_report_split=False, margin=5.0))


def test_a_sweep_whose_trials_all_score_the_same_has_its_page():
    """What mattered is then not told: a forest has no variance to share out."""
    equal = [
        trial(0.8, 1, i, treatment(optim_lr=10**-i, scheduler_name=("linear", "cosine")[i % 2])) for i in range(30)
    ]
    assert "What mattered" in page(report_of(sweep(40)))
    assert "What mattered" not in page(report_of(equal))
