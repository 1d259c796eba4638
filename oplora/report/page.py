"""What a report consists of, in Markdown, HTML, CSV, LaTeX and PNG."""

import base64
import html
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas
from matplotlib.figure import Figure

from oplora.harness.runs import Record, write_atomically

STYLE = Path(__file__).with_name("page.css")


class Link(str):
    """In a table's cell: the name of a figure of the same report."""


@dataclass(frozen=True)
class Row:
    """Cells by column, and the runs that they were computed from."""

    cells: dict[str, Any]
    runs: Sequence[Record] = ()


@dataclass
class Table:
    """Rows as they are shown; missing values are shown as an em dash, never as a number."""

    name: str  # file name without ending
    caption: str
    rows: list[Row]
    columns: Sequence[str] | None = None  # default: all that the rows have
    text: bool = False  # columns of sentences, left-aligned
    details: Collection[str] = ()  # columns that the README leaves out

    @cached_property
    def frame(self) -> pandas.DataFrame:
        cells = [row.cells for row in self.rows]
        return pandas.DataFrame(cells, columns=self.columns, dtype=object)  # keeps whole numbers

    @property
    def compact(self) -> pandas.DataFrame:
        return self.frame[[column for column in self.frame if column not in self.details]]


@dataclass
class Statement:
    """A paragraph that the README shows, too."""

    name: str
    text: str


@dataclass
class ReportFigure:
    name: str
    caption: str
    drawing: Figure


Part = str | Statement | Table | ReportFigure


@dataclass
class Section:
    title: str
    parts: list[Part] = field(default_factory=list)  # in reading order


def write_report(title: str, sections: list[Section], out: Path) -> Path:
    """Write all forms below `out`; the path of index.html, which needs no other file."""
    for folder in ("figures", "tables"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    links = (f'<li><a href="#{_anchor(s)}">{html.escape(s.title)}</a></li>' for s in sections)
    body = [f"<h1>{html.escape(title)}</h1>", f"<nav><ul>{''.join(links)}</ul></nav>"]
    markdown = [f"# {title}"]
    for section in sections:
        markdown.append(f"## {section.title}")
        body.append(f'<h2 id="{_anchor(section)}">{html.escape(section.title)}</h2>')
        for part in section.parts:
            in_markdown, in_html = _written(part, out)
            markdown.append(in_markdown)
            body.append(in_html)
    write_atomically(out / "report.md", "\n\n".join(markdown) + "\n")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>\n{STYLE.read_text()}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
    write_atomically(out / "index.html", page)
    return out / "index.html"


def _written(part: Part, out: Path) -> tuple[str, str]:
    """A part in Markdown and in HTML; tables and figures are also written as files."""
    if isinstance(part, str | Statement):
        text = part if isinstance(part, str) else part.text
        return text, f"<p>{html.escape(text)}</p>"
    if isinstance(part, Table):
        part.frame.to_csv(out / "tables" / f"{part.name}.csv", index=False)
        latex = part.frame.map(_cell).to_latex(index=False, escape=True)
        write_atomically(out / "tables" / f"{part.name}.tex", latex)
        return f"{part.caption}\n\n{markdown_table(part.frame)}", _html_table(part)
    png = out / "figures" / f"{part.name}.png"
    part.drawing.savefig(png, dpi=110, bbox_inches="tight", metadata={"Software": None})
    text = f"![{part.caption}](figures/{part.name}.png)\n\n{part.caption}"
    return text, _html_figure(part, png)


def _anchor(section: Section) -> str:
    return re.sub(r"\W+", "-", section.title.lower()).strip("-")


def markdown_table(frame: pandas.DataFrame) -> str:
    """A GitHub table; no dependency needed for it."""
    cells = [[_markdown_cell(value) for value in row] for row in frame.to_numpy()]
    lines = [list(map(str, frame.columns)), ["---"] * len(frame.columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value) -> str:
    return "—" if value is None or value != value else str(value)


def _markdown_cell(value) -> str:
    text = _cell(value).replace("|", "\\|")
    return f"[{text}](figures/{value}.png)" if isinstance(value, Link) else text


def _html_cell(column: str, value) -> str:
    text = html.escape(_cell(value))
    style = f' class="{text.replace(" ", "-")}"' if column == "verdict" else ""
    shown = f'<a href="#{text}">{text}</a>' if isinstance(value, Link) else text
    return f'<td data-column="{html.escape(column)}"{style}>{shown}</td>'


def _html_table(table: Table) -> str:
    columns = [str(column) for column in table.frame.columns]
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "\n".join(
        f"<tr>{''.join(map(_html_cell, columns, row))}</tr>" for row in table.frame.to_numpy()
    )
    style = ' class="text"' if table.text else ""
    return (
        f'<p class="caption" id="{table.name}">{html.escape(table.caption)} '
        f"(tables/{table.name}.csv)</p>\n"
        f'<div class="scroll" tabindex="0"><table{style}><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _html_figure(figure: ReportFigure, png: Path) -> str:
    data = base64.b64encode(png.read_bytes()).decode()
    caption = html.escape(figure.caption)
    return (
        f'<figure id="{figure.name}"><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )
