"""What a report consists of, in Markdown, HTML, CSV, LaTeX, SVG and JSON."""

import base64
import html
import io
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import pandas
from matplotlib.figure import Figure

from oplora.harness.runs import Record, write_atomically
from oplora.report.style import INK

HERE = Path(__file__).parent
HUNDREDTHS = re.compile(r"(\d\.\d\d)\d+")  # of a point are enough for coordinates
SVG = {"svg.fonttype": "none", "svg.hashsalt": "oplora", "axes.facecolor": "none"}


class Link(str):
    """In a table's cell: text that leads to what has the id `target` on the same page."""

    def __new__(cls, text: str, target: str | None = None, kind: str = "", title: str = ""):
        self = super().__new__(cls, text)
        self.target, self.kind, self.title = target or text, kind, title
        return self


@dataclass(frozen=True)
class Missing:
    """In a table's cell: no value yet, and the command that makes its runs."""

    command: str


@dataclass(frozen=True)
class Row:
    """Cells by column, and the runs that they were computed from."""

    cells: dict[str, Any]
    runs: Sequence[Record] = ()


@dataclass
class Table:
    """Rows as they are shown; missing values are shown as an em dash, never as a number."""

    name: str  # file name without ending, and its id on the page
    caption: str
    rows: list[Row]
    columns: Sequence[str] | None = None  # default: all that the rows have
    text: bool = False  # columns of sentences, left-aligned
    details: Collection[str] = ()  # columns that the README leaves out
    cards: int = 0  # as many columns head a card of the rest, one a row
    higher: Mapping[str, bool] = field(default_factory=dict)  # column → is a higher value better?

    @cached_property
    def cells(self) -> pandas.DataFrame:
        """With the commands of what is missing."""
        found = [row.cells for row in self.rows]
        return pandas.DataFrame(found, columns=self.columns, dtype=object)  # keeps whole numbers

    @cached_property
    def frame(self) -> pandas.DataFrame:
        return self.cells.mask(self.cells.map(lambda cell: isinstance(cell, Missing)), None)

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
    photo: bool = False  # of pixels, not of lines

    @property
    def file(self) -> str:
        return f"{self.name}.{'webp' if self.photo else 'svg'}"

    @cached_property
    def data(self) -> bytes:
        """The same bytes each time."""
        buffer, options = io.BytesIO(), {"bbox_inches": "tight"}
        if self.photo:
            self.drawing.savefig(buffer, format="webp", dpi=110, **options)
            return buffer.getvalue()
        with matplotlib.rc_context(SVG):
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            self.drawing.savefig(buffer, format="svg", metadata=nothing, **options)
        text = buffer.getvalue().decode()
        text = re.sub(r"<\?xml.*?(?=<svg)|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r'<g id="[^"]*"', "<g", text)
        text = re.sub(r"<[^>]+>", lambda tag: HUNDREDTHS.sub(r"\1", tag[0]), text)
        text = re.sub(r'(id="|url\(#|href="#)', rf"\1{self.name}-", text)
        return re.sub(r"\s*\n\s*", "\n", text).encode()


@dataclass
class Script:
    """What needs JavaScript: HTML that is shown where there is any."""

    name: str
    caption: str
    code: Callable[[], str]  # made when it is written: it is large


Part = str | Statement | Table | ReportFigure | Script


@dataclass
class Section:
    title: str
    parts: list[Part] = field(default_factory=list)  # in reading order


@dataclass
class Writer:
    """Writes all forms of a report below `out`; runs: all that it is made from, below `root`."""

    out: Path
    root: Path = Path()
    runs: Sequence[Record] = ()

    @cached_property
    def numbers(self) -> Mapping[Path, int]:
        return {r.path: number for number, r in enumerate(self.runs)}

    def write(self, title: str, sections: list[Section]) -> Path:
        """The path of index.html, which needs no other file."""
        for folder in ("figures", "tables"):
            (self.out / folder).mkdir(parents=True, exist_ok=True)
        links = (f'<li><a href="#{_anchor(s)}">{html.escape(s.title)}</a>' for s in sections)
        body = [f"<h1>{html.escape(title)}</h1>"]
        markdown = [f"# {title}"]
        for section in sections:
            markdown.append(f"## {section.title}")
            body.append(f'<h2 id="{_anchor(section)}">{html.escape(section.title)}</h2>')
            for part in section.parts:
                in_markdown, in_html = self._written(part)
                markdown += filter(None, [in_markdown])
                body.append(in_html)
        write_atomically(self.out / "report.md", "\n\n".join(markdown) + "\n")
        page = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title>'
            f"<style>\n{(HERE / 'page.css').read_text()}</style></head><body>\n"
            f"<nav><ul>{''.join(links)}</ul></nav><main>\n" + "\n".join(body) + self._all_runs()
        )
        page += f"</main><script>\n{(HERE / 'page.js').read_text()}</script></body></html>\n"
        write_atomically(self.out / "index.html", page)
        return self.out / "index.html"

    def _written(self, part: Part) -> tuple[str, str]:
        """A part in Markdown and in HTML; tables and figures are also written as files."""
        if isinstance(part, str | Statement):
            text, name = (part, "") if isinstance(part, str) else (part.text, part.name)
            given = f' id="{name}" class="statement"' if name else ""
            return text, f"<p{given}>{html.escape(text)}</p>"
        if isinstance(part, Script):
            return "", (
                f'<section class="script" id="{part.name}" hidden><p class="caption">'
                f"{html.escape(part.caption)}</p>{part.code()}</section>"
            )
        if isinstance(part, Table):
            folder = self.out / "tables"
            texts = part.frame.map(_cell)
            texts.where(texts != "—").to_csv(folder / f"{part.name}.csv", index=False)
            latex = texts.to_latex(index=False, escape=True)
            write_atomically(folder / f"{part.name}.tex", latex)
            return f"{part.caption}\n\n{markdown_table(part.frame)}", self._table(part)
        (self.out / "figures" / part.file).write_bytes(part.data)
        text = f"![{part.caption}](figures/{part.file})\n\n{part.caption}"
        return text, _figure(part)

    def _table(self, table: Table) -> str:
        caption = f'<p class="caption">{html.escape(table.caption)} (tables/{table.name}.csv)</p>'
        columns, rows = list(map(str, table.cells.columns)), table.cells.to_numpy()
        runs = [self._links(row.runs) for row in table.rows]
        if table.cards:
            body = "\n".join(
                _card(f"{table.name}-{n}", columns, row, table.cards, behind)
                for n, (row, behind) in enumerate(zip(rows, runs, strict=True))
            )
            return f'<div class="cards" id="table-{table.name}">{caption}\n{body}</div>'
        columns += ["runs"] if any(runs) else []
        ways = {column: up for column, up in table.higher.items() if column in table.frame}
        best = {column: _best(table.frame[column], up) for column, up in ways.items()}
        arrows = {column: " ↑" if up else " ↓" for column, up in ways.items()}
        head = "".join(f"<th>{html.escape(c)}{arrows.get(c, '')}</th>" for c in columns)
        body = "\n".join(
            "<tr>"
            + "".join(
                _html_cell(c, v, best.get(c) == n) for c, v in zip(columns, row, strict=False)
            )
            + (f"<td>{behind}</td>" if any(runs) else "")
            + "</tr>"
            for n, (row, behind) in enumerate(zip(rows, runs, strict=True))
        )
        style = ' class="text"' if table.text else ""
        return (
            f'<div class="table" id="table-{table.name}">{caption}\n'
            f'<div class="scroll" tabindex="0"><table{style}><thead><tr>{head}</tr></thead>\n'
            f"<tbody>{body}</tbody></table></div></div>"
        )

    def _links(self, runs: Iterable[Record]) -> str:
        known = [self.numbers[r.path] for r in runs if r.path in self.numbers]
        if not known:
            return ""
        links = " ".join(f'<a href="#r{n}">{n}</a>' for n in dict.fromkeys(known))
        return f'<details class="runs"><summary>{len(known)}</summary>{links}</details>'

    def _all_runs(self) -> str:
        """Every run with its files, to which the tables' numbers lead."""
        lines = []
        for n, record in enumerate(self.runs):
            name = record.path.relative_to(self.root).as_posix()
            folder = Path(os.path.relpath(record.path, self.out)).as_posix()
            files = (f'<a href="{folder}/{f}">{f}</a>' for f in ("config.yaml", "metrics.json"))
            lines.append(f'<li id="r{n}" value="{n}">{html.escape(name)}: {", ".join(files)}')
        if not lines:
            return ""
        return (
            f'<details class="all-runs"><summary>All {len(lines)} runs, by number</summary>'
            f"<ol>{chr(10).join(lines)}</ol></details>"
        )


def write_summary(out: Path, content: dict[str, Any]) -> None:
    write_atomically(out / "summary.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _anchor(section: Section) -> str:
    return re.sub(r"\W+", "-", section.title.lower()).strip("-")


def markdown_table(frame: pandas.DataFrame) -> str:
    """A GitHub table; no dependency needed for it."""
    cells = [[_markdown_cell(value) for value in row] for row in frame.to_numpy()]
    lines = [list(map(str, frame.columns)), ["---"] * len(frame.columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value) -> str:
    if isinstance(value, list):
        return " ".join(map(_cell, value))
    return "—" if value is None or value != value else str(value)


def _markdown_cell(value) -> str:
    text = _cell(value).replace("|", "\\|")
    figure = isinstance(value, Link) and not value.kind
    return f"[{text}](figures/{value.target}.svg)" if figure else text


def _html_value(value) -> str:
    if isinstance(value, list):
        return " ".join(map(_html_value, value))
    if isinstance(value, Missing):
        code = html.escape(value.command)
        return f'<details class="missing"><summary>—</summary><code>{code}</code></details>'
    text = html.escape(_cell(value))
    if not isinstance(value, Link):
        return _short_number(text)
    named = f' title="{html.escape(value.title)}"' if value.title else ""
    return f'<a href="#{value.target}" class="{value.kind}"{named}>{text}</a>'


def _short_number(text: str) -> str:
    """55381440 is read as 55.4 M."""
    if not re.fullmatch(r"\d{7,}", text):
        return text
    return f'<span title="{int(text):,}">{int(text) / 1e6:.1f} M</span>'


def _best(cells: pandas.Series, higher: bool) -> int | None:
    """The row of the best mean over several seeds, where there are two."""
    means = cells.astype(str).str.extract(r"^(-?[\d.]+) ± ")[0].astype(float)
    if means.notna().sum() < 2:
        return None
    return int(means.idxmax() if higher else means.idxmin())


def _html_cell(column: str, value, best: bool = False) -> str:
    style = ' class="best"' if best else ""
    return f'<td data-column="{html.escape(column)}"{style}>{_html_value(value)}</td>'


def _kind(verdict) -> str:
    return html.escape(_cell(verdict)).replace(" ", "-")


def _card(name: str, columns: list[str], row: Sequence, heads: int, runs: str) -> str:
    """A row that opens; it is found by its id though it is closed."""
    cells = dict(zip(columns, row, strict=True))
    verdict = _kind(cells.get("verdict", "not run yet"))
    head = " ".join(
        f'<span class="{"verdict" if column == "verdict" else "head"}">{_html_value(cells[column])}'
        "</span>"
        for column in columns[:heads]
    )
    rest = [(c, _html_value(cells[c])) for c in columns[heads:] if _cell(cells[c]) != "—"]
    rest = [(c, f"<code>{v}</code>" if c == "to be run" else v) for c, v in rest]
    rest += [("runs", runs)] if runs else []
    lines = "".join(f"<dt>{html.escape(column)}</dt><dd>{value}</dd>" for column, value in rest)
    return (
        f'<details class="card {verdict}"><summary>{head}</summary>'
        f'<dl id="{name}">{lines}</dl></details>'
    )


def _figure(figure: ReportFigure) -> str:
    caption = html.escape(figure.caption)
    if figure.photo:
        data = base64.b64encode(figure.data).decode()
        picture = f'<img alt="{caption}" src="data:image/webp;base64,{data}">'
    else:  # black ink takes the page's colour, white paper the page's
        text = figure.data.decode().replace(INK, "currentColor").replace("#ffffff", "none")
        picture = text.replace("<svg ", f'<svg role="img" aria-label="{caption}" ', 1)
    return f'<figure id="{figure.name}">{picture}<figcaption>{caption}</figcaption></figure>'
