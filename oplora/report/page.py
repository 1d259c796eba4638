"""What a report consists of, in Markdown, HTML, CSV, LaTeX and PNG."""

import base64
import html
import re
from dataclasses import dataclass, field
from pathlib import Path

import pandas
from matplotlib.figure import Figure

from oplora.harness.runs import write_atomically

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #2a83; --part: #b803;
  --bad: #c443; --link: light-dark(#0645ad, #8ab4f8); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: auto; padding: 0 1rem 3rem;
  overflow-wrap: break-word; }
h1, h2 { line-height: 1.2; } h2 { border-bottom: 1px solid var(--line); margin-top: 2.5rem; }
a { color: var(--link); }
nav ul { columns: 18rem; padding-left: 1.2rem; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
.scroll { overflow-x: auto; max-height: 85vh; }
table { border-collapse: collapse; font-size: .85rem; margin: .5rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
table:not(.text) td:not(:first-child) { white-space: nowrap; }
thead th { background: Canvas; position: sticky; top: 0; vertical-align: bottom; }
table.text th, table.text td { text-align: left; vertical-align: top; min-width: 5rem; }
td.holds { background: var(--good); } td.holds-in-a-range { background: var(--part); }
td.does-not-hold { background: var(--bad); }
p.caption { font-size: .85rem; opacity: .8; margin: 0 0 .3rem; }
@media (max-width: 44rem) {  /* a row of sentences becomes a card */
  .scroll:has(table.text) { max-height: none; }
  table.text, table.text tbody, table.text tr, table.text td { display: block; }
  table.text thead { display: none; }
  table.text tr { border: 1px solid var(--line); border-radius: 4px; margin: .6rem 0; }
  table.text td { border: 0; } table.text td:first-child { font-weight: bold; }
  table.text td:not(:first-child)::before { content: attr(data-column) ": "; opacity: .7; }
}
figure { margin: 1.5rem 0; } figcaption { font-size: .85rem; opacity: .8; }
"""


class Link(str):
    """In a table's cell: the name of a picture of the same report."""


@dataclass
class Table:
    """Rows as they are shown; missing values are shown as an em dash, never as a number."""

    name: str  # file name without ending
    caption: str
    rows: pandas.DataFrame
    text: bool = False  # columns of sentences, left-aligned


@dataclass
class Statement:
    """A paragraph that the README shows, too."""

    name: str
    text: str


@dataclass
class Picture:
    name: str
    caption: str
    figure: Figure


@dataclass
class Section:
    title: str
    parts: list[str | Statement | Table | Picture] = field(default_factory=list)  # in reading order


def write_report(title: str, sections: list[Section], out: Path) -> Path:
    """Write all forms below `out`; the path of index.html, which needs no other file."""
    for folder in ("figures", "tables"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    markdown, body = [f"# {title}"], [f"<h1>{html.escape(title)}</h1>", _contents(sections)]
    for section in sections:
        markdown.append(f"## {section.title}")
        body.append(f'<h2 id="{_anchor(section)}">{html.escape(section.title)}</h2>')
        for part in section.parts:
            if isinstance(part, str | Statement):
                text = part if isinstance(part, str) else part.text
                markdown.append(text)
                body.append(f"<p>{html.escape(text)}</p>")
            elif isinstance(part, Table):
                part.rows.to_csv(out / "tables" / f"{part.name}.csv", index=False)
                latex = part.rows.map(_cell).to_latex(index=False, escape=True)
                write_atomically(out / "tables" / f"{part.name}.tex", latex)
                markdown.append(f"{part.caption}\n\n{markdown_table(part.rows)}")
                body.append(_html_table(part))
            else:
                png = _save(part.figure, out / "figures" / f"{part.name}.png")
                markdown.append(f"![{part.caption}](figures/{part.name}.png)\n\n{part.caption}")
                body.append(_html_figure(part, png))
    write_atomically(out / "report.md", "\n\n".join(markdown) + "\n")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
    write_atomically(out / "index.html", page)
    return out / "index.html"


def _contents(sections: list[Section]) -> str:
    items = "".join(
        f'<li><a href="#{_anchor(section)}">{html.escape(section.title)}</a></li>'
        for section in sections
    )
    return f"<nav><ul>{items}</ul></nav>"


def _anchor(section: Section) -> str:
    return re.sub(r"\W+", "-", section.title.lower()).strip("-")


def markdown_table(rows: pandas.DataFrame) -> str:
    """A GitHub table; no dependency needed for it."""
    cells = [[_markdown_cell(value) for value in row] for row in rows.to_numpy()]
    lines = [list(map(str, rows.columns)), ["---"] * len(rows.columns), *cells]
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
    columns = [str(column) for column in table.rows.columns]
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "\n".join(
        f"<tr>{''.join(map(_html_cell, columns, row))}</tr>" for row in table.rows.to_numpy()
    )
    style = ' class="text"' if table.text else ""
    return (
        f'<p class="caption" id="{table.name}">{html.escape(table.caption)} '
        f"(tables/{table.name}.csv)</p>\n"
        f'<div class="scroll" tabindex="0"><table{style}><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _html_figure(picture: Picture, png: Path) -> str:
    data = base64.b64encode(png.read_bytes()).decode()
    caption = html.escape(picture.caption)
    return (
        f'<figure id="{picture.name}"><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    return path
