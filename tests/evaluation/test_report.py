"""The report: everything from the summary, nothing invented, nothing fetched, and what is missing named."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from summaries import example_summary

from dynskip.cli import main
from dynskip.evaluation.report import drawing
from dynskip.evaluation.report.document import Figure, Heading, Items, Paragraph, Table, to_html, to_markdown
from dynskip.evaluation.report.numbers import interval, number, percent, signed
from dynskip.evaluation.report.paper_claims import claims_table, tally
from dynskip.evaluation.report.rows import find, select
from dynskip.evaluation.report.savings import ORACLE_MIX, savings
from dynskip.evaluation.report.sections import SECTIONS
from dynskip.evaluation.report.sentences import section_sentences
from dynskip.evaluation.report.sentences.oracle_controls import paper_null
from dynskip.evaluation.report.short import in_short
from dynskip.evaluation.report.write import read_summary, report_blocks, write_report

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install dynskip[eval]")

_VOID = {"meta", "br", "hr", "link", "img"}


class Page(HTMLParser):
    """The tags of a page, checked to be closed in order, the ids, and what is fetched from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.references: list[str] = []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _VOID:
            self.open.append(tag)
        self._look(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._look(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def _look(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.append(value)
            if name in ("src", "href", "xlink:href") and value:
                (self.references if value.startswith("#") else self.fetched).append(value)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """HTML and Markdown of the example summary."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "summary.json").write_text(json.dumps(example_summary()), encoding="utf-8")
    html, markdown = write_report(folder)
    return html.read_text(encoding="utf-8"), markdown.read_text(encoding="utf-8")


def test_the_page_is_whole_and_needs_nothing_else(pages: tuple[str, str]) -> None:
    page = Page(pages[0])
    assert page.fetched == []
    assert len(page.ids) == len(set(page.ids)), "figures share no ids"
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert "url(http" not in pages[0] and "@import" not in pages[0] and "<script" not in pages[0]


def test_every_figure_is_sound_svg_and_described(pages: tuple[str, str]) -> None:
    drawings = re.findall(r"<svg.*?</svg>", pages[0], re.DOTALL)
    assert len(drawings) >= 12
    for each in drawings:
        ElementTree.fromstring(each)
        assert re.match(r'<svg role="img" aria-label="[^"]{10,}"', each)


def test_both_forms_hold_the_same_sections_and_numbers(pages: tuple[str, str]) -> None:
    html, markdown = pages
    headings = [re.sub("<.*?>", "", text) for text in re.findall(r"<h2.*?</h2>", html)]
    assert headings == re.findall(r"^## (.*)$", markdown, re.MULTILINE)
    assert headings[3 : 3 + len(SECTIONS)] == [title for title, _ in SECTIONS.values()]
    cells = {re.sub("<.*?>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", html)}
    for cell in cells:
        assert cell.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") in markdown


def test_text_of_the_summary_is_escaped(pages: tuple[str, str]) -> None:
    assert "a &lt;processor&gt; &amp; more" in pages[0]
    assert "<processor>" not in pages[0]


def test_the_numbers_are_those_of_the_summary(pages: tuple[str, str]) -> None:
    shown = select(example_summary()["static"], metric="rouge_l", family="paths", budget=8)[0]
    assert f"| 8 | {interval(shown)} |" in pages[1]
    changed = only("static")
    for row in changed["static"]["rows"]:
        row["value"] = 0.123456
    assert "0.123 [" in to_markdown(*report_blocks(changed))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is said: the figures stand where they stand, and are empty."""
    monkeypatch.setattr(drawing, "svg", lambda *_, **__: "<svg ></svg>")


def told_under(title: str, summary: dict[str, Any]) -> list[str]:
    """The list that follows the heading ``title``."""
    _, _, blocks = report_blocks(summary)
    at = blocks.index(Heading(title))
    items = blocks[at + 1]
    assert isinstance(items, Items)
    return list(items.texts)


_VALUE = r"[+−]?\d+(\.\d+)?( %)?"
_WITH_INTERVAL = re.compile(rf"{_VALUE} \[{_VALUE}, ({_VALUE}|∞)\]")


def with_missing_values(summary: dict[str, Any]) -> dict[str, Any]:
    """Every other row without a value, the others without intervals."""
    for name in SECTIONS:
        for row in summary[name]["rows"][::2]:
            row.update(value=None, low=None, high=None)
        for row in summary[name]["rows"][1::2]:
            row.update(low=None, high=None)
    return summary


def committed_summary() -> dict[str, Any]:
    path = Path(__file__).parents[2] / "bench" / "results" / "paper-smollm2" / "summary.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize(
    ("make", "num_answered"),
    [
        (lambda: example_summary(), 5),
        (committed_summary, 5),
        *((lambda name=name: only(name), 0 if name in ("siblings", "depth") else 1) for name in SECTIONS),
        (lambda: with_missing_values(example_summary()), 0),
        (lambda: {"conditions": {}}, 0),
    ],
    ids=["example", "committed", *SECTIONS, "without values", "bare"],
)
@pytest.mark.usefixtures("undrawn")
def test_the_report_opens_with_five_sentences_of_one_number_with_its_interval(make: Any, num_answered: int) -> None:
    summary = make()
    assert report_blocks(summary)[2][0] == Heading("In short")
    told = told_under("In short", summary)
    assert told == in_short(summary) and len(told) == 5
    answered = 0
    for sentence in told:
        assert sentence.endswith(".") and ". " not in sentence
        numbers = [found[0] for found in _WITH_INTERVAL.finditer(sentence)]
        assert len(numbers) == 1 or (not numbers and "is **untested**" in sentence), sentence
        answered += len(numbers)
        rest = _WITH_INTERVAL.sub("", sentence)
        assert not re.search(r"\d[.,]\d|\d %|[\[\]]|[+−]\d", rest), f"besides it only counts and layers: {rest}"
    assert answered == num_answered


@pytest.mark.usefixtures("undrawn")
def test_the_claims_of_the_paper_stand_below_the_five_sentences() -> None:
    summary = example_summary()
    blocks = report_blocks(summary)[2]
    at = blocks.index(Heading("Which of the paper's claims hold here", 3))
    assert at == 2 and blocks[at + 1 : at + 4] == [
        Paragraph(paper_null()),
        Paragraph(tally(summary)),
        claims_table(summary),
    ]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_opens_with_its_sentences(name: str) -> None:
    summary = example_summary()
    told = section_sentences(summary, name)
    assert told and told_under(SECTIONS[name][0], summary) == told
    assert section_sentences({"conditions": {}}, name) == []


@pytest.mark.usefixtures("undrawn")
def test_sentences_that_a_summary_brings_along_are_not_repeated() -> None:
    summary = example_summary()
    summary["oracle"] |= {"statements": ["A claim of old."], "answers": ["A claim of old."]}
    assert "A claim of old." not in to_markdown(*report_blocks(summary))


@pytest.mark.usefixtures("undrawn")
def test_what_each_way_saves_is_told_in_milliseconds_with_intervals() -> None:
    told = told_under("Milliseconds", example_summary())
    assert told[0].startswith(
        "Uniform paths: of the 0.580 [0.576, 0.584] ms that a token takes along all 24 layers in a batch of 32, "
        "4 layers save 0.400 [0.396, 0.404] ms, 8 layers save 0.320"
    )
    assert "24 layers save" not in told[0]
    assert told[1].endswith(
        "match full depth, 5.9 layers on average, would save 0.360 [0.340, 0.380] ms a token; nobody can make that "
        "choice beforehand."
    )
    # The largest gain in the example is the last predictor's, and of its budgets alike the first.
    assert "(transformer at a budget of 6 layers) saves 0.400 [0.390, 0.410] ms a token, and takes" in told[3]
    assert "takes 0.600 [0.580, 0.620] ms to choose the path of a prompt" in told[3]
    assert told[-1] == (
        "The fastest of 12 learned controllers (fixed  alpha=10) saves 0.300 [0.290, 0.310] ms a token at "
        "6.0 [5.9, 6.1] layers, its own decisions included."
    )
    assert len(told) == 6


@pytest.mark.usefixtures("undrawn")
def test_a_small_model_says_what_it_cannot_say_and_a_large_one_need_not() -> None:
    summary = example_summary()
    title = "What this model can say about OPT-1.3B, and what not"
    page = to_markdown(*report_blocks(summary))
    limits = page[page.index(f"## {title}") : page.index("## Hidden states")]
    assert "11,053,440 parameters, OPT-1.3B about 119 times as many" in limits
    assert "From 4 layers to all 24 ROUGE-L moves from 0.200 to 0.283 here" in limits
    assert "It **can** say" in limits and "It **cannot** say" in limits
    summary["conditions"]["num_parameters"] = 1_316_000_000
    assert title not in to_markdown(*report_blocks(summary))


def test_what_saves_nothing_costs() -> None:
    summary = only("controllers")
    for row in summary["controllers"]["rows"]:
        if row["metric"] == "ms_saved":
            row.update(value=row["value"] - 1, low=row["low"] - 1, high=row["high"] - 1)
    (told,) = savings(summary)
    assert " costs 0.700 [0.690, 0.710] ms more a token" in told
    assert savings({"conditions": {}}) == savings(only("depth")) == []


def test_the_papers_numbers_stand_beside(pages: tuple[str, str]) -> None:
    for known in (
        "0.2493",
        "0.3085",
        "0.3208",
        "0.3418",
        "0.3341",
        "0.3688",
        "0.3964",
        "0.233",
        "7.8",
        "0.320",
        "0.273",
    ):
        assert known in pages[1], known


def only(name: str) -> dict[str, Any]:
    """The example summary with one section."""
    summary = example_summary()
    return {"conditions": summary["conditions"], name: summary[name]}


def test_the_report_is_the_same_each_time() -> None:
    first, second = (to_html(*report_blocks(only("router"))) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", SECTIONS)
def test_missing_sections_are_named(name: str) -> None:
    _, _, blocks = report_blocks(only(name))
    missing = [block.text for block in blocks if isinstance(block, Paragraph) and block.missing]
    assert missing == [f"**Not run**: this run has no section `{other}`." for other in SECTIONS if other != name]


def test_a_section_without_rows_is_missing_too() -> None:
    summary = only("router") | {"router": {"n": 0, "seeds": 0, "rows": []}}
    _, _, blocks = report_blocks(summary)
    assert any(isinstance(block, Paragraph) and block.missing and "`router`" in block.text for block in blocks)


def test_a_bare_summary_makes_a_report() -> None:
    page = to_markdown(*report_blocks({"conditions": {}}))
    assert page.count("**Not run**") == len(SECTIONS)
    assert "Nothing is noted as cut" in page


@pytest.mark.parametrize("name", SECTIONS)
def test_rows_that_are_not_finite_are_left_out(name: str) -> None:
    summary = only(name)
    for row in summary[name]["rows"][::2]:
        row.update(value=None, low=None, high=None)
    for row in summary[name]["rows"][1::2]:
        row.update(low=None, high=None)
    _, _, blocks = report_blocks(summary)
    assert any(isinstance(block, Figure) for block in blocks)


def test_the_report_and_the_run_name_the_oracles_mix_alike() -> None:
    from dynskip.evaluation.experiments.oracle import MIX

    assert ORACLE_MIX == MIX


def test_figures_tell_series_apart_without_colour() -> None:
    from dynskip.evaluation.report.drawing import STYLES

    looks = [(style["marker"], str(style["linestyle"])) for style in STYLES]
    assert len({marker for marker, _ in looks}) == len(looks) == len({line for _, line in looks})


def test_numbers_as_readers_want_them() -> None:
    assert [number(value) for value in (0.12345, -0.5, -0.0001, None)] == ["0.123", "−0.500", "0.000", "–"]
    assert interval({"value": 0.5, "low": 0.25, "high": None}) == "0.500"
    assert interval({"value": 0.5, "low": -0.25, "high": 1.0}, 2) == "0.50 [−0.25, 1.00]"
    assert interval(None) == interval({"value": None}) == "–"
    share = {"value": 0.0237, "low": -0.004, "high": 0.0381}
    assert (percent(share), percent(share, 1)) == ("2 % [0 %, 4 %]", "2.4 % [−0.4 %, 3.8 %]")
    assert signed(share) == "+0.024 [−0.004, +0.038]"
    assert [signed({"value": value}) for value in (0.5, -0.5, 0.0, 0.0001)] == ["+0.500", "−0.500", "0.000", "0.000"]
    assert percent(None) == signed(None) == "–"


def test_rows_are_found_by_their_labels() -> None:
    section: dict[str, Any] = {"rows": [{"a": 1, "b": 2, "value": 3}, {"a": 1, "value": None}, {"a": 2, "value": 0}]}
    assert select(section, a=1) == [section["rows"][0]]
    assert find(section, a=2) == section["rows"][2]
    assert find(section, a=1, b=9) is None


def test_blocks_in_both_forms() -> None:
    blocks = [
        Heading("A & B"),
        Paragraph("**bold** `x < 1`"),
        Items(["one", "two"]),
        Table("T", ["name", "value"], [["a|b", "1.0 [0.5, 2.0]"]], folded=True),
        Paragraph("-2% [-10%, 6%] of 2024-11-22, opt-1.3b"),
    ]
    html, markdown = to_html("title", "subtitle", blocks), to_markdown("title", "subtitle", blocks)
    Page(html)
    assert '<h2 id="a-b">A &amp; B</h2>' in html
    assert "<strong>bold</strong> <code>x &lt; 1</code>" in html
    assert "<p>−2% [−10%, 6%] of 2024-11-22, opt-1.3b</p>" in html
    assert '<td class="text">a|b</td><td>1.0 [0.5, 2.0]</td>' in html
    begin = "# title\n\nsubtitle\n\n## A & B\n\n**bold** `x < 1`\n\n- one\n- two\n\n<details><summary>T</summary>\n\n"
    assert markdown.startswith(begin)
    assert "|\n\n</details>\n" in markdown and "**T**" not in markdown, "a folded table is folded in Markdown, too"
    assert r"| a\|b | 1.0 [0.5, 2.0] |" in markdown


def test_the_command_writes_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"conditions": {"model": "m"}}), encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "report.html"), str(tmp_path / "report.md")]
    assert "Dynamic layer selection on m" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_folder_without_a_summary_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "run must be a folder with summary.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"), [("{", "must hold JSON"), ("[]", "must hold an object with conditions")]
)
def test_a_broken_summary_is_a_mistake(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "summary.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_summary(tmp_path)
