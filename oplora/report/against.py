"""Your runs against the published ones: is what you measured within what more seeds would give?"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from oplora.harness.runs import Record
from oplora.report.comparison import Comparison
from oplora.report.page import Row, Table
from oplora.report.statistics import shown, t95
from oplora.report.titles import title

CAPTION = (
    "Your runs against the published: the range is where the mean of as many further seeds lies in "
    "95% of the cases, from the published seeds' mean and spread at the same learning rate."
)


@dataclass(frozen=True)
class Measured:
    """A method's score at its best rate, by seed."""

    scope: str  # with the score's unit
    method: str
    rate: float
    values: Sequence[float]
    digits: int
    runs: Sequence[Record]


def measured(c: Comparison) -> list[Measured]:
    return [
        Measured(str(c.scope.of(c.score.unit)), method, runs[0].config["lr"],
                 list(c.scores(method).values()), c.score.digits, runs)
        for method, runs in c.at_best.items()
        if c.scores(method)
    ]  # fmt: skip


def against(own: Iterable[Measured], published: Iterable[Measured]) -> Table:
    """A row for each of your scores that was published at the same rate, with two seeds or more."""
    known = {(m.scope, m.method, m.rate): m for m in published if len(m.values) > 1}
    rows = []
    for mine in own:
        theirs = known.get((mine.scope, mine.method, mine.rate))
        if theirs is None:
            continue
        n, middle, digits = len(theirs.values), fmean(theirs.values), mine.digits
        half = t95(n - 1) * stdev(theirs.values) * math.sqrt(1 / n + 1 / len(mine.values))
        value = fmean(mine.values)
        cells = {
            "setting": mine.scope,
            "method": title(mine.method),
            "rate": f"{mine.rate:g}",
            "yours": shown(mine.values, digits),
            "published": shown(theirs.values, digits),
            "range": f"{middle - half:.{digits}f} to {middle + half:.{digits}f}",
            "yours is": "inside" if abs(value - middle) <= half else "outside",
        }
        rows.append(Row(cells, mine.runs))
    return Table("against", CAPTION, rows)
