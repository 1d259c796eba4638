"""Table 3, Figures 1d and 6: VL-BART on four tasks at once, and the MLP's width."""

from collections import Counter

import pandas

from oplora.harness.runs import Record
from oplora.report import rules
from oplora.report.claims import Thesis, better
from oplora.report.comparison import Comparison, final_loss
from oplora.report.experiment import Experiment
from oplora.report.figures import Curves, over_widths
from oplora.report.metrics import Column, Score
from oplora.report.page import Part, Row, Table
from oplora.report.statistics import shown
from oplora.report.tables import Groups, Items, grouped_rows, predictions, signed
from oplora.report.titles import by_method, by_number, method_of, title

# CIDEr has another unit, which would rule the average of four.
ACCURACY = Score("points of accuracy", "average_without_captions", cited="average without captions")
COLUMNS = (  # all are shown × 100, as the paper does
    Column("vqa", "vqa_accuracy", higher=True),
    Column("gqa", "gqa_accuracy", higher=True),
    Column("nlvr", "nlvr_accuracy", higher=True),
    Column("cider", "cider", higher=True),
    Column("average", "average", higher=True),
    Column("average without captions", ACCURACY.metric, higher=True),
)
TASKS = ("vqa", "gqa", "nlvr")  # with a score per item


def accuracy_by_epoch(record: Record) -> list[tuple[int, float]]:
    return [(epoch, 100 * metrics[ACCURACY.metric]) for epoch, metrics in record.metrics["epochs"]]


def item_scores(record: Record) -> pandas.DataFrame:
    """score of every test item by (task, id); captions have none."""
    rows = pandas.DataFrame(predictions(record)).dropna(subset="score")
    return rows.set_index(["task", "id"])[["score"]].sort_index()


def differences(items: pandas.DataFrame) -> dict[str, str]:
    points = 100 * items["score"]
    by_task = {task: points[task] for task in TASKS} | {"all three": points}
    return {task: signed(found, 1) for task, found in by_task.items()}


def widths(c: Comparison, final: Groups) -> list[Part]:
    """Figure 6 with its table, where there are three widths; adapters without an MLP as lines."""
    records = [r for r in c.scored if r.metrics["mlp_parameters"]]
    if len({r.config["mlp_width"] for r in records}) < 3:
        return []
    name, plain = f"{c.name}_width", {m: final.get(m, []) for m in ("lora", "dora")}
    drawn = (
        "Test accuracy (mean of VQA, GQA, NLVR) by the MLP's width, mean and range over seeds; "
        f"{c.scope} (compare Figure 6)."
    )
    listed = (
        f"{c.scope}: the MLP's width, at the rate chosen for the usual one; test set, mean ± 95% "
        "interval (seeds)."
    )
    columns = ("method", "rate", "width", *(c.title for c in COLUMNS), "trained parameters")
    return [
        over_widths(name, drawn, records, ACCURACY, "test accuracy, %", plain),
        Table(name, listed, grouped_rows(records, "mlp_width", COLUMNS), columns),
    ]


def direct_rates(c: Comparison) -> list[Part]:
    """How the rate of what is trained besides the adapters was chosen: once, for all methods."""
    runs = [r for r in c.every if r.config.get("direct_lr")]
    rates = by_number(runs, "direct_lr")
    if len(rates) < 2:
        return []
    usual = Counter(r.config["direct_lr"] for r in runs).most_common(1)[0][0]
    others = [r for rate, same in rates.items() if rate != usual for r in same]
    keys = {(method_of(r), r.config["lr"], r.config["seed"]) for r in others}
    kept = [r for r in runs if (method_of(r), r.config["lr"], r.config["seed"]) in keys]
    rows = []
    for method, of_method in by_method(kept).items():
        for lr, same in by_number(of_method, "lr").items():
            cells = {"method": title(method), "rate": f"{lr:g}"}
            for rate, at in by_number(same, "direct_lr").items():
                cells[f"{rate:g}"] = shown([final_loss(r) for r in at], 3)
            rows.append(Row(cells, same))
    caption = (
        f"{c.scope}: validation loss by the learning rate of what is trained besides the adapters "
        f"(visual embedding, biases), mean ± 95% interval (seeds). {usual:g} was chosen from this, "
        "once for all methods."
    )
    return [Table(f"{c.name}_direct_rates", caption, rows)]


def details(c: Comparison, final: Groups) -> list[Part]:
    return [*direct_rates(c), *widths(c, final)]


EXPERIMENT = Experiment(
    name="vl_bart",
    order=3,
    title="Vision and language, four tasks at once (Table 3)",
    paper="table3.yaml",
    readme=("vl_bart_small",),
    loss=final_loss,
    scores=(ACCURACY,),
    about="The learning rate of every method is the one with the lowest validation loss (mean over "
    "all four tasks' items); the test set is scored at that rate only.",
    columns=lambda final: COLUMNS,
    units="Accuracies in percent, CIDEr × 100.",
    items=Items(
        item_scores,
        differences,
        ("method", "items", "seeds", *TASKS, "all three"),
        unit=" in points",
    ),
    curves=Curves(
        "Validation accuracy (mean of VQA, GQA, NLVR) by epoch, each method at its chosen rate "
        "(mean and range over seeds; epoch 0 is the base model)",
        accuracy_by_epoch,
        "accuracy, %",
        "epoch",
        higher=True,
    ),
    more=details,
    theses=(
        better("OP-LoRA is better than LoRA", "5.2, Table 3", "oplora", "lora"),
        better("OP-DoRA is better than DoRA", "5.2, Table 3", "opdora", "dora"),
        Thesis("OP-LoRA gains over LoRA as much as DoRA does", "5.2",
               rules.not_worse, ("oplora", "dora")),
        Thesis("Performance is an inverted U over the MLP's width", "5.5, Figure 6",
               rules.inverted_u, ("opdora",), order=1),
    ),
)  # fmt: skip
