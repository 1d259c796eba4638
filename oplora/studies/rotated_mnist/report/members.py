"""Batched runs as the report's rules know runs: one record per rate and seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy

from oplora.harness.runs import Record
from oplora.report.comparison import Comparison
from oplora.report.metrics import Score
from oplora.report.tables import cited_scores
from oplora.report.titles import by_method

PAPER = "rotated_mnist.yaml"
LOSS = Score("nats", "final_loss", 3, 1, higher=False, cited="best training loss")
PROJECTION = Score("of |vᵀg|", "projection", 3, 1, cited="|vᵀg| at the end")


def command(preset: str, *methods: str) -> str:
    """What trains all rates and seeds of these methods."""
    scale = f" preset={preset}" if preset != "paper" else ""
    names = ",".join(methods)
    return f"python experiments/rotated_mnist.py --multirun{scale} method={names}"


class Batched(Comparison):
    """A comparison whose missing runs are whole batches."""

    def command(self, *methods: str, sweep: str = "seeds") -> str:
        return command(self.preset, *methods)

    def rates_command(self, *methods: str) -> str:
        return f"{self.command(*methods)} rates=[…]"

    def can_run(self, method: str) -> bool:
        return method != "hyperloader"  # a batch has a generator a layer

    @property
    def base_loss(self) -> float | None:
        """Of the frozen network, which every batch measures."""
        return next((r.metrics["base_loss"] for r in self.records), None)


@dataclass(frozen=True)
class Batch:
    """The runs of a preset, one a method."""

    preset: str
    runs: dict[str, Record]

    @cached_property
    def comparison(self) -> Comparison:
        """By the loss on the training digits, which also chooses the rates."""
        return self.compare(LOSS)

    def compare(self, score: Score) -> Comparison:
        return Batched(
            experiment="rotated_mnist",
            preset=self.preset,
            name=f"rotated_mnist_{self.preset}",
            records=[member for run in self.runs.values() for member in members(run)],
            loss=LOSS,
            score=score,
            cited=cited_scores(PAPER, score.cited),
        )


def curves(run: Record) -> dict[str, numpy.ndarray]:
    with numpy.load(run.path / "curves.npz", allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def batches(records: Sequence[Record]) -> list[Batch]:
    """Of the paper's network and rank, not of changed ones; of several of a method the first."""
    found: dict[str, dict[str, list[Record]]] = {}
    for r in records:
        config = r.config
        if config["experiment"] == "rotated_mnist" and _is_default(config):
            found.setdefault(config["preset"], []).append(r)
    return [
        Batch(preset, {name: same[0] for name, same in by_method(runs).items()})
        for preset, runs in sorted(found.items())
    ]


def _is_default(config: dict) -> bool:
    return config["rank"] == 4 and config["pretraining"]["hidden"] == 512


def members(run: Record) -> list[Record]:
    """A record per rate and seed, as if each had been a run; costs are shares of the batch's."""
    m, config = run.metrics, run.config
    rates, seeds = config["rates"], config["seeds"]
    direct = m["trained_parameters"] == m["adapter_parameters"]
    shared = {
        "base_loss": m["base_loss"],
        "adapter_parameters": m["adapter_parameters"],
        "mlp_parameters": 0 if direct else m["trained_parameters"],
        "trained_parameters": m["trained_parameters"],
        "train_seconds": m["train_seconds"] / (len(rates) * len(seeds)),
        "peak_memory_bytes": m["peak_memory_bytes"],
    }
    projections = curves(run).get("projection")  # at the best and the low rate, over training
    found = []
    for i, rate in enumerate(rates):
        for j, seed in enumerate(seeds):
            metrics = dict(shared)
            if m["diverged"][i][j]:
                metrics["diverged"] = "worse than the frozen network"
            else:
                metrics |= {key: m[key][i][j] for key in ("final_loss", "test_accuracy")}
            if projections is not None and rate == m["best_rate"] and j < projections.shape[1]:
                metrics["projection"] = float(projections[0, j, -1])
            found.append(replace(run, config={**config, "lr": rate, "seed": seed}, metrics=metrics))
    return found
