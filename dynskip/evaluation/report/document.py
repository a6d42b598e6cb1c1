"""A document of few kinds of blocks, and its two forms: a self-contained HTML page and Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

_MINUS = re.compile(r"(?<![\w.,-])-(?=\d)")  # a hyphen in front of a number that stands by itself
_SENTENCE = 48  # characters of a cell that may be broken wherever it stands
_NUMBER = re.compile(r"[-+−±\d.,%\s\[\]…–()×]*")
_INLINE = re.compile(r"\*\*(?P<strong>[^*]+)\*\*|`(?P<code>[^`]+)`")

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #1a1a1a; background: #fff;
  max-width: 68rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin-bottom: .3rem; }
h2 { font-size: 1.3rem; margin-top: 2.6rem; padding-top: .8rem; border-top: 2px solid #1a1a1a; }
h3 { font-size: 1.05rem; margin-top: 1.6rem; }
p.title { margin-bottom: 0; font-weight: 600; } p.title + .scroll table { margin-top: .3rem; }
p, li { max-width: 48rem; }
figure { margin: 1.2rem 0; overflow-x: auto; } figure svg { width: 100%; min-width: 46rem; height: auto; }
figcaption { font-size: .9rem; color: #333; max-width: 48rem; position: sticky; left: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .9rem .22rem 0; text-align: right; vertical-align: top; }
th { vertical-align: bottom; }
th { border-bottom: 1px solid #1a1a1a; font-weight: 600; } tr + tr td { border-top: 1px solid #ddd; }
th.text, td.text { text-align: left; } td { white-space: nowrap; } td.text + td.text, td.long { white-space: normal; }
td.long { min-width: 13rem; }
code { font: .92em ui-monospace, "DejaVu Sans Mono", monospace; background: #f2f2f2; padding: 0 .2em; }
details { margin: .6rem 0; } summary { cursor: pointer; color: #333; }
nav { font-size: .92rem; } nav a { margin-right: .9rem; }
.missing { border: 2px dashed #1a1a1a; padding: .6rem 1rem; max-width: 46rem; }
@media print { body { margin: 0; max-width: none; } details > * { display: block; }
  h2, figure { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Heading:
    """A heading of ``level`` 2 or 3."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Text; ``**strong**`` and `` `code` `` are known. ``missing`` frames it: something is not there."""

    text: str
    missing: bool = False


@dataclass(frozen=True)
class Items:
    """A list of texts."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table of texts; ``folded`` hides it until it is asked for, under its ``title``."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False


@dataclass(frozen=True)
class Drawing:
    """SVG text, the name of its file, and what stands for it where it is not seen."""

    name: str
    alt: str
    svg: str

    @property
    def path(self) -> str:
        """Where the file lies, seen from the report."""
        return f"figures/{self.name}.svg"


@dataclass(frozen=True)
class Figure:
    """A drawing and its caption. In HTML it is part of the page, in Markdown a file that is linked."""

    drawing: Drawing
    caption: str


Block: TypeAlias = Heading | Paragraph | Items | Table | Figure


def to_html(title: str, subtitle: str, blocks: Sequence[Block]) -> str:
    """The page, with nothing that is fetched from elsewhere."""
    links = " ".join(
        f'<a href="#{_anchor(block.text)}">{html.escape(block.text)}</a>'
        for block in blocks
        if isinstance(block, Heading) and block.level == 2
    )
    body = "\n".join(_html_block(block) for block in blocks)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n<p>{_inline(subtitle)}</p>\n<nav>{links}</nav>\n{body}\n</body></html>\n"
    )


def to_markdown(title: str, subtitle: str, blocks: Sequence[Block]) -> str:
    """The same in Markdown: figures are links to their files."""
    return "\n\n".join([f"# {title}", subtitle, *map(_markdown_block, blocks)]) + "\n"


def _html_block(block: Block) -> str:
    match block:
        case Heading(text, level):
            anchor = f' id="{_anchor(text)}"' if level == 2 else ""
            return f"<h{level}{anchor}>{html.escape(text)}</h{level}>"
        case Paragraph(text, missing):
            return f'<p class="missing">{_inline(text)}</p>' if missing else f"<p>{_inline(text)}</p>"
        case Items(texts):
            return "<ul>" + "".join(f"<li>{_inline(text)}</li>" for text in texts) + "</ul>"
        case Figure(drawing, caption):
            named = drawing.svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(drawing.alt)}" ', 1)
            return f"<figure>{named}<figcaption>{_inline(caption)}</figcaption></figure>"
        case Table(title, header, rows, folded):
            table = _html_table(header, rows)
            if folded:
                return f"<details><summary>{_inline(title)}</summary>{table}</details>"
            return (f'<p class="title">{_inline(title)}</p>' if title else "") + table


def _class(cell: str, is_text: bool) -> str:
    """Of a table's cell; a first column is not broken, but where it holds a sentence."""
    return (' class="text long"' if len(cell) > _SENTENCE else ' class="text"') if is_text else ""


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    is_text = [any(not _NUMBER.fullmatch(row[column]) for row in rows) for column in range(len(header))]

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{_class(cell, text)}>{_inline(cell)}</{tag}>" for cell, text in zip(cells, is_text, strict=True)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{line(header, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def _markdown_block(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Paragraph(text, _):
            return text
        case Items(texts):
            return "\n".join(f"- {text}" for text in texts)
        case Figure(drawing, caption):
            return f"![{drawing.alt}]({drawing.path})\n\n*{caption}*"
        case Table(title, header, rows, folded):
            lines = [_markdown_row(header), f"|{'---|' * len(header)}", *map(_markdown_row, rows)]
            if folded:
                return "\n".join([f"<details><summary>{_inline(title)}</summary>\n", *lines, "\n</details>"])
            return "\n".join([f"**{title}**\n", *lines] if title else lines)


def _markdown_row(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", r"\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _inline(text: str) -> str:
    """``text`` escaped for HTML, with strong and code marked, and a minus where a number is negative."""
    text = _MINUS.sub("−", text)
    return _INLINE.sub(
        lambda found: (
            f"<strong>{found['strong']}</strong>" if found["strong"] is not None else f"<code>{found['code']}</code>"
        ),
        html.escape(text, quote=False),
    )


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
