"""How a method looks in every figure: its family's colour, its kind's dash, its own marker.

Family, role and MLP are what configs/method/<name>.yaml says. The colours are Okabe and Ito's,
which the colour-blind tell apart.
"""

from dataclasses import dataclass
from functools import cache

from oplora.report.titles import FAMILIES, method, methods

INK = "#000000"  # the page's own text colour: black on white, white on black
COLORS = dict(
    zip(FAMILIES, ("#0072B2", "#D55E00", INK, "#009E73", "#CC79A7", "#E69F00"), strict=True)
)
MARKERS = {  # matplotlib's → Vega's
    "o": "circle", "s": "square", "D": "diamond", "^": "triangle-up", "v": "triangle-down",
    "<": "triangle-left", ">": "triangle-right", "P": "cross", "X": "stroke", "h": "wedge",
}  # fmt: skip
DASHES = {"plain": "-", "OP": "--", "control": ":"}  # Vega's: see report.explorer


@dataclass(frozen=True)
class Style:
    color: str
    kind: str  # of DASHES
    marker: str

    @property
    def line(self) -> dict[str, str | float]:
        """Options of matplotlib's plot."""
        return {"color": self.color, "ls": DASHES[self.kind], "marker": self.marker, "ms": 4}


@cache
def style(name: str) -> Style:
    """Of a method; one without a file is a plain one of no family."""
    found = method(name)
    kind = "control" if found.role == "control" else "OP" if found.mlp != "none" else "plain"
    family = [m.name for m in methods().values() if m.family == found.family]
    position = family.index(name) if name in family else 0
    return Style(COLORS[found.family], kind, list(MARKERS)[position % len(MARKERS)])
