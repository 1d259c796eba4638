"""Table 4: what a photo shows, named by LLaVA; ranks, and the MLP's width with its cost."""

import pandas

from oplora.harness.runs import Record
from oplora.report.claims import better
from oplora.report.comparison import Comparison, final_loss
from oplora.report.experiment import Experiment
from oplora.report.figures import Curves
from oplora.report.metrics import Column, Score
from oplora.report.page import Part, Row, Table
from oplora.report.tables import Groups, Items, grouped_rows, predictions, signed
from oplora.report.titles import method, method_of

COLUMNS = (
    Column("top-1", "accuracy", higher=True),
    Column("top-1, exact", "exact_accuracy", higher=True),
    Column("test NLL", "test_nll", 3, 1, higher=False),
)


def untrained(final: Groups) -> list[Row]:
    """What guessing reaches."""
    any_run = next(iter(final.values()))[0]
    chance, majority = (f"{100 * any_run.metrics[key]:.1f}" for key in ("chance", "majority"))
    return [
        Row({"method": "chance", "rate": None, "top-1": chance}, [any_run]),
        Row({"method": "always the most frequent class", "top-1": majority}, [any_run]),
    ]


def image_scores(record: Record) -> pandas.DataFrame:
    """correct (0 or 1) and nll of every test image by its id."""
    rows = pandas.DataFrame(predictions(record)).set_index("id")
    correct = (rows["found"] == rows["label"]).astype(float)
    return pandas.DataFrame({"correct": correct, "nll": rows["nll"]})


def differences(images: pandas.DataFrame) -> dict[str, str]:
    return {"top-1": signed(100 * images["correct"], 1), "NLL": signed(images["nll"], 3)}


def ranks_and_widths(c: Comparison, final: Groups) -> list[Part]:
    every = [r for r in c.scored if method(method_of(r)).role != "control"]
    found: list[Part] = []
    if len({r.config["rank"] for r in every}) > 1:
        usual_width = c.records[0].config["mlp_width"]
        adapters = [r for r in every if r.metrics["adapter_parameters"]]
        ranks = [r for r in adapters if r.config["mlp_width"] == usual_width]
        caption = f"{c.scope}: ranks, at the rates chosen for rank {c.rank}; test set."
        found.append(Table(f"{c.name}_ranks", caption, grouped_rows(ranks, "rank", COLUMNS)))
    widths = [r for r in every if r.metrics["mlp_parameters"] and r.config["rank"] == c.rank]
    if len({r.config["mlp_width"] for r in widths}) > 1:
        caption = "the MLP's width, at the rate chosen for the usual one; test set."
        caption = f"{c.scope}, rank {c.rank}: {caption}"
        rows = grouped_rows(widths, "mlp_width", COLUMNS)
        found.append(Table(f"{c.name}_width", caption, rows))
    return found


EXPERIMENT = Experiment(
    name="llava_cars",
    order=4,
    title="Recognition through the projector (Table 4)",
    paper="table4.yaml",
    readme=("llava_cars_small",),
    loss=final_loss,
    scores=(Score("points of accuracy", "accuracy", cited="rank {rank}"),),
    about="Only the projector is adapted; full fine-tuning trains the whole projector. The "
    "learning rate of every method is the one with the lowest validation loss; the test set is "
    "scored at that rate only. An answer counts if the label is the longest one found in it, or "
    "(exact) if it is the label and nothing else.",
    names_rank=True,
    columns=lambda final: COLUMNS,
    units="Accuracies in percent, NLL in nats per token of the label.",
    untrained=untrained,
    items=Items(image_scores, differences, ("method", "images", "seeds", "top-1", "NLL")),
    curves=Curves("Validation loss during training"),
    more=ranks_and_widths,
    theses=(better("OP-LoRA is better than LoRA", "5.3, Table 4", "oplora", "lora"),),
)
