"""What is measured of a run, and how tables show it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from oplora.harness.runs import Record
from oplora.report.statistics import shown


@dataclass(frozen=True)
class Column:
    """A metric as a table shows it: mean and interval over seeds."""

    title: str
    metric: str | Callable[[Record], float | None]  # its name, or what reads it
    digits: int = 1
    scale: float = 100  # fractions are shown in percent
    detail: bool = False  # left out in the README
    higher: bool | None = None  # is a higher value better?

    def __call__(self, record: Record) -> float | None:
        """The metric as it is shown; None where a run has none."""
        named = not callable(self.metric)
        value = record.metrics.get(self.metric) if named else self.metric(record)
        return None if value is None else self.scale * value

    def cell(self, runs: Iterable[Record]) -> str | None:
        return shown([value for r in runs if (value := self(r)) is not None], self.digits)


@dataclass(frozen=True)
class Score(Column):
    """A metric by which methods are compared; the title is its unit."""

    higher: bool = True
    cited: str | None = None  # the column of the paper's table; may name {rank} and {variant}

    @property
    def unit(self) -> str:
        return self.title
