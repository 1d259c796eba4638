"""Table 2: commonsense reasoning, with the learning-rate sweep and the controls."""

import pandas

from oplora.harness.runs import Record
from oplora.report import rules
from oplora.report.claims import Thesis, better
from oplora.report.comparison import Comparison
from oplora.report.experiment import Experiment
from oplora.report.figures import Curves
from oplora.report.metrics import Column, Score
from oplora.report.page import Part, Statement
from oplora.report.statistics import mean_interval, paired_bootstrap
from oplora.report.tables import Groups, Items, paired_items, predictions, signed
from oplora.report.titles import method, title

SECOND = "second text, Table 3"
NLL = Column("held-out NLL", "held_out_nll", 3, 1, higher=False)


def columns(final: Groups) -> list[Column]:
    """The averages, and every task that was scored."""
    metrics = next(iter(final.values()))[0].metrics
    tasks = [key for key in metrics if key.startswith("accuracy_")]
    return [
        NLL,
        Column("average", "accuracy", higher=True),
        *(Column(key.removeprefix("accuracy_"), key, detail=True, higher=True) for key in tasks),
    ]


def item_scores(record: Record) -> pandas.DataFrame:
    """accuracy (0 or 1) and nll (per token) of every test item by its id and number of tokens.

    An answer that was generated has neither a likelihood nor a number of tokens (then 1).
    """
    rows = []
    for item in predictions(record):
        row = {"item": item["id"], "tokens": 1, "accuracy": float(item["correct"]), "nll": None}
        if "logprobs" in item:
            answer = item["answer"]
            row["tokens"] = item["tokens"][answer]
            row["nll"] = -item["logprobs"][answer] / row["tokens"]
        rows.append(row)
    return pandas.DataFrame(rows).astype({"nll": float}).set_index(["item", "tokens"])


def differences(items: pandas.DataFrame) -> dict[str, str | None]:
    known = items["nll"].notna().any()
    return {
        "NLL": signed(items["nll"], 3, _tokens(items)) if known else None,
        "accuracy": signed(items["accuracy"] * 100, 1),
    }


def _tokens(items: pandas.DataFrame) -> pandas.Index:
    return items.index.get_level_values("tokens")


def beyond(c: Comparison, final: Groups) -> list[Part]:
    """What OP-LoRA gives beyond a better learning rate and a larger first A.

    Against the best of LoRA and its controls, and against the control that shares its step sizes
    and its first A: there the difference is what the MLP's movement of h does.
    """
    # generated answers have no likelihoods
    final = {m: runs for m, runs in final.items() if all(NLL(r) is not None for r in runs)}
    if not {"lora", "oplora"} <= set(final):
        return []
    rivals = [m for m in final if m == "lora" or method(m).role == "control"]
    names = dict.fromkeys(["lora", "oplora", *rivals])
    texts = [f"{title(m)} {NLL.cell(final[m])} at rate {c.chosen[m]:g}" for m in names]
    sentences = [f"Held-out NLL, each at its own best rate: {'; '.join(texts)}."]
    best = min(rivals, key=lambda m: mean_interval(list(map(NLL, final[m])))[0])
    judged = {best: "The best of LoRA and its controls is"}
    judged |= {"lora_matched_mlp_start": "The control with OP-LoRA's step sizes and first A is"}
    for rival, which in judged.items():
        if rival in final:
            items = paired_items(final["oplora"], final[rival], item_scores)
            _, low, high = paired_bootstrap(items["nll"], _tokens(items))
            verdict = "better" if high < 0 else "worse" if low > 0 else "neither better nor worse"
            sentences.append(
                f"{which} {title(rival)}: OP-LoRA is {verdict}, "
                f"{signed(items['nll'], 3, _tokens(items))} nats per token (paired over items)."
            )
    text = "Beyond step size and start. " + " ".join(sentences)
    return [Statement(f"{c.name}_beyond", text)]


EXPERIMENT = Experiment(
    name="commonsense",
    order=5,
    title="Commonsense reasoning (Table 2)",
    paper="table2.yaml",
    readme=("commonsense_small_float32",),
    loss=lambda r: r.metrics.get("validation_nll"),
    loss_title="validation NLL",
    loss_caption="Validation NLL after training, nats per token, by learning rate",
    scores=(
        Score("points of accuracy", "accuracy", cited="average"),
        Score("held-out nats per token", "held_out_nll", digits=3, scale=1, higher=False),
    ),
    about="The learning rate of every method is the one with the lowest validation NLL of its grid "
    "(of the same length for all); the test set is scored at that rate only.",
    variant=lambda r: r.config["model"]["dtype"],  # of the base weights
    variant_title="{} weights",
    columns=columns,
    units="Accuracy in percent; NLL in nats per token of the correct answer.",
    items=Items(item_scores, differences, ("method", "items", "NLL", "accuracy")),
    curves=Curves(
        "Held-out loss during training, each method at its best rate (mean and range over seeds)"
    ),
    more=beyond,
    theses=(
        better("OP-LoRA is better than LoRA", "5.4, Table 2", "oplora", "lora"),
        better("OP-DoRA is better than DoRA", "5.4, Table 2", "opdora", "dora"),
        better("OP-ScaledAdamW is better than ScaledAdamW", SECOND, "op_scaled", "riemannian"),
        better("OP-LoRA is better than LoRA of its size", SECOND, "oplora", "lora_large"),
        better("OP-LoRA is better than DeepLoRA", SECOND, "oplora", "deeplora"),
        better("OP-LoRA is better than HyperLoader", SECOND, "oplora", "hyperloader"),
        better("OP-LoRA is better than AdaLoRA", SECOND, "oplora", "adalora"),
        better("OP-LoRA is better than LoRA-GA", SECOND, "oplora", "lora_ga"),
        Thesis("OP-DoRA's best seed is better than DoRA's", "5.4, Table 2",
               rules.best_seed, ("opdora", "dora")),
        Thesis("Width 1 is too little, else the trend is flat", "5.5, Figure 6",
               rules.flat_beyond_one, ("opdora",), order=1),
    ),
)  # fmt: skip
