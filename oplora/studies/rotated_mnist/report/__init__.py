"""Rotated MNIST: training loss over rates, surfaces, curvature, and the second text's claims."""

from dataclasses import dataclass

import numpy

from oplora.harness.runs import Record
from oplora.report import across
from oplora.report.against import Measured
from oplora.report.against import measured as measured_of
from oplora.report.claims import Claim
from oplora.report.comparison import Comparison
from oplora.report.front import Gain, gains_of
from oplora.report.metrics import Column
from oplora.report.page import Part, Row, Section, Table
from oplora.report.rates import GOOD, good_rates, loss_at
from oplora.report.statistics import shown
from oplora.report.tables import COSTS, cited_table, method_row
from oplora.report.titles import label
from oplora.studies.rotated_mnist.report import figures
from oplora.studies.rotated_mnist.report.members import PAPER, Batch, batches, curves
from oplora.studies.rotated_mnist.report.rules import claims, measured, within_bounds

INTRO = (
    "A two-layer network with 512 hidden units is trained for 30 epochs on upright digits and "
    "frozen; adapters of rank 4 in both layers learn the same digits, each turned once by a random "
    "angle, in 10 epochs of Adam at a constant rate. Every method has the same grid of rates over "
    "six decades and the same seeds (of the adapter's start and of the order of the digits); one "
    "network serves all. The loss is that on all training digits. All rates and seeds of a method "
    "train as one batch: seconds are a member's share of it, memory is the whole batch's."
)
COLUMNS = (
    Column("training loss", "final_loss", 3, 1),
    Column("held-out accuracy", "test_accuracy"),
)
ABOUT = (
    "mean ± 95% interval (seeds) at each method's best rate, the neighbouring rates (of 13) that "
    "reach most of the fall from the frozen network to the best method, and the members that "
    "diverge or end no better than the frozen network, of all rates."
)
CURVATURE = (
    "The gradient g along v, the Hessian's top direction by power iteration, in the values of the "
    "adapter at the end of training, each method at its best rate and at a rate a hundred times "
    "lower; mean ± 95% interval (seeds)."
)
CONDITIONS = (
    "Condition numbers of the Hessian of the output layer's loss at the end, in A, B and in the "
    "weight W, each method at its best rate (medians over seeds), and for how many seeds Eq. 3 "
    "brackets κ(H_A). With an L2 term on W, without which κ(H_W) is infinite."
)


@dataclass(frozen=True)
class RotatedMNIST:
    name: str = "rotated_mnist"
    order: int = 1
    readme: tuple[str, ...] = ()
    stand_ins: tuple[str, ...] = ()

    def read(self, records: list[Record]) -> "Results":
        return Results(batches(records))


@dataclass(frozen=True)
class Results:
    """All presets that were run."""

    batches: list[Batch]
    comparisons: tuple = ()  # of test results over seeds and domains: here it is a training loss

    @property
    def settings(self) -> list[Comparison]:
        return [batch.comparison for batch in self.batches]

    def claims(self) -> list[Claim]:
        return claims(self.batches)

    def section(self) -> Section | None:
        if not self.batches:
            return None
        paper = cited_table("rotated_mnist_paper", PAPER)
        parts = [part for batch in self.batches for part in self._parts(batch)]
        return Section("Rotated MNIST (second text, Figure 2 and Table 5)", [INTRO, paper, *parts])

    def _parts(self, batch: Batch) -> list[Part]:
        c, name = batch.comparison, batch.comparison.name
        first = next(iter(batch.runs.values())).metrics
        images = f"{first['train_images']:,} digits to train on, {first['test_images']:,} held out"
        table = Table(name, f"{c.scope} ({images}): {ABOUT}", results(batch), details=COSTS)
        return [
            figures.loss_over_rates(batch),
            table,
            *figures.surfaces(batch),
            *figures.projections(batch),
            Table(f"{name}_curvature", f"{c.scope}. {CURVATURE}", curvature(batch)),
            Table(f"{name}_conditions", f"{c.scope}. {CONDITIONS}", conditions(batch)),
        ]

    def gains(self) -> list[Gain]:
        return [gain for c in self.settings for gain in gains_of(c)]

    def measured(self) -> list[Measured]:
        return [each for c in self.settings for each in measured_of(c)]

    def standings(self) -> list[Row]:
        return []  # none of the controls was run

    def sensitivity(self) -> list[Row]:
        return [row for c in self.settings for row in across.sensitivity_of(c)]


def results(batch: Batch) -> list[Row]:
    c = batch.comparison
    bound = loss_at(GOOD, c.base_loss, c.best_loss)
    rows = []
    for method, runs in c.at_best.items():
        row = method_row(method, runs, COLUMNS)
        diverged = numpy.array(batch.runs[method].metrics["diverged"])
        cells = {
            f"rates for {GOOD:.0%} of the gain": str(good_rates(c.losses(method), bound)),
            "diverged": f"{diverged.sum()} of {diverged.size}",
        }
        costs = {key: row.cells[key] for key in COSTS}
        rows.append(Row({**row.cells, **cells} | costs, [batch.runs[method]]))
    return rows


def curvature(batch: Batch) -> list[Row]:
    """The end of training, at the best and the low rate."""
    rows = []
    for run in measured(batch):
        arrays = curves(run)
        for i, which in enumerate(("best", "low")):
            ends = {
                "|vᵀg|": arrays["projection"],
                "|g|": arrays["gradient_norm"],
                "top eigenvalue": arrays["top_eigenvalue"],
            }
            cells = {
                "method": label(run.config["method"]["name"], [run]),
                "at": f"{which} rate, {run.metrics[f'{which}_rate']:g}",
            }
            cells |= {name: shown(values[i, :, -1], 2) for name, values in ends.items()}
            rows.append(Row(cells, [run]))
    return rows


def conditions(batch: Batch) -> list[Row]:
    rows = []
    for run in measured(batch):
        found = run.metrics["condition_numbers"]
        medians = {name: f"{numpy.median(values):.3g}" for name, values in found.items()}
        lower, upper, count = within_bounds([run])
        cells = {"method": label(run.config["method"]["name"], [run])}
        cells |= {f"κ({name})": median for name, median in medians.items()}
        cells |= {"lower bound": f"{lower} of {count}", "upper bound": f"{upper} of {count}"}
        rows.append(Row(cells, [run]))
    return rows


EXPERIMENT = RotatedMNIST()
