"""GLUE (second text): each task by itself, OP-VeRA beside VeRA and OP-LoRA beside LoRA."""

from collections.abc import Sequence

import pandas

from oplora.harness.runs import Record
from oplora.report.claims import better
from oplora.report.comparison import final_loss
from oplora.report.experiment import Experiment
from oplora.report.figures import Curves
from oplora.report.metrics import Column, Score
from oplora.report.page import Row
from oplora.report.tables import Groups, Items, predictions, signed

SCORE = Column("score", "score", higher=True)
LOSS = Column("test loss", "test_loss", 3, 1, higher=False)


def columns(final: Groups) -> Sequence[Column]:
    """The metric that stands for the task, the loss, and the task's other metrics."""
    _, *others = next(iter(final.values()))[0].config["task"]["metrics"]
    return [SCORE, LOSS, *(Column(name, name, detail=True, higher=True) for name in others)]


def untrained(final: Groups) -> list[Row]:
    """What naming the most frequent class reaches, of tasks whose score is the accuracy."""
    any_run = next(iter(final.values()))[0]
    if next(iter(any_run.config["task"]["metrics"])) != "accuracy":
        return []
    share = f"{100 * any_run.metrics['majority']:.1f}"
    return [Row({"method": "always the most frequent class", "score": share}, [any_run])]


def row_scores(record: Record) -> pandas.DataFrame:
    """correct (0 or 1; NaN where labels are numbers) and loss of every test row by its id."""
    rows = pandas.DataFrame(predictions(record)).set_index("id")
    classes = rows["label"].dtype != float
    correct = (rows["prediction"] == rows["label"]).astype(float) if classes else float("nan")
    return pandas.DataFrame({"correct": correct, "loss": rows["loss"]})


def differences(rows: pandas.DataFrame) -> dict[str, str | None]:
    known = rows["correct"].notna().any()
    return {
        "accuracy": signed(100 * rows["correct"], 1) if known else None,
        "loss": signed(rows["loss"], 3),
    }


EXPERIMENT = Experiment(
    name="glue",
    order=6,
    title="GLUE (second text)",
    paper="glue.yaml",
    readme=("glue_small_sst2", "glue_small_mrpc", "glue_small_rte"),
    loss=final_loss,
    scores=(
        Score("points", "score", cited="{variant}"),
        Score("test loss", "test_loss", digits=3, scale=1, higher=False),
    ),
    about="The learning rate of every method is the one with the lowest validation loss of this "
    "task; the test set is scored at that rate only. The head has a rate of its own, the same for "
    "every adapter.",
    variant=lambda r: r.config["task"]["name"],
    variant_option="task={}",
    columns=columns,
    units="Score: accuracy, of CoLA Matthews' correlation, of STS-B Pearson's, in percent; loss in "
    "nats, of STS-B squared.",
    untrained=untrained,
    items=Items(row_scores, differences, ("method", "rows", "seeds", "accuracy", "loss")),
    curves=Curves("Validation loss during training"),
    theses=(
        better("OP-VeRA is better than VeRA", "second text, GLUE", "opvera", "vera"),
        better("OP-LoRA is better than LoRA", "v2's abstract (GLUE)", "oplora", "lora"),
    ),
)
