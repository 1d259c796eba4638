"""What a report consists of, in Markdown, HTML, CSV, LaTeX and PNG."""

import base64
import html
from dataclasses import dataclass, field
from pathlib import Path

import pandas
from matplotlib.figure import Figure

from oplora.runs import write_atomically

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { border-bottom: 1px solid var(--line); margin-top: 2.5rem; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; margin: .5rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { background: var(--soft); }
table.text th, table.text td { text-align: left; vertical-align: top; }
figcaption, caption { font-size: .85rem; opacity: .8; text-align: left; } figure { margin: 1rem 0; }
"""


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
    """Write all forms below `out`; the path of index.html."""
    for folder in ("figures", "tables"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    markdown, body = [f"# {title}"], [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        markdown.append(f"## {section.title}")
        body.append(f"<h2>{html.escape(section.title)}</h2>")
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


def markdown_table(rows: pandas.DataFrame) -> str:
    """A GitHub table; no dependency needed for it."""
    cells = [[_cell(value).replace("|", "\\|") for value in row] for row in rows.to_numpy()]
    lines = [list(map(str, rows.columns)), ["---"] * len(rows.columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value) -> str:
    return "—" if value is None or value != value else str(value)


def _html_table(table: Table) -> str:
    rows = table.rows.map(_cell)
    inner = rows.to_html(index=False, border=0, classes="text" if table.text else None)
    return (
        f'<div class="scroll">{inner}</div><p><small>{html.escape(table.caption)} '
        f"(tables/{table.name}.csv)</small></p>"
    )


def _html_figure(picture: Picture, png: Path) -> str:
    data = base64.b64encode(png.read_bytes()).decode()
    caption = html.escape(picture.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    return path
