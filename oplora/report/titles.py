"""How methods and presets are called and grouped, as the YAML files in configs/ say.

The files are read as they stand: a run's own config has these fields only if it is recent.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from math import inf
from pathlib import Path
from typing import Any

import yaml

from oplora.harness.runs import Record

FIELDS = ("title", "role", "mlp", "family", "grid", "order")  # of configs/method/<name>.yaml
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
USUAL = "AdamW"  # the optimizer of a method that does not name another
ROLES = ("full", "method", "control")  # in the order of the tables
FAMILIES = ("lora", "dora", "full", "scale", "generator", "other")  # each has a colour


@dataclass(frozen=True)
class Method:
    """What configs/method/<name>.yaml says; a method without a file goes by its name."""

    name: str
    title: str
    role: str = "method"
    mlp: str = "none"  # or full, lite, other: what predicts the adapter in training
    family: str = "other"  # of FAMILIES
    grid: str = "plain"  # of configs/grids.yaml
    order: float = inf  # among the methods of its role; those without one follow, by name

    @property
    def key(self) -> tuple:
        """What the tables sort by."""
        return ROLES.index(self.role), self.order, self.name


@cache
def methods(configs: Path = CONFIGS) -> dict[str, Method]:
    """All methods of configs/method/ by name, in the order of the tables."""
    found = []
    for path in configs.glob("method/*.yaml"):
        given = _read(path)
        given = {key: given[key] for key in FIELDS if key in given}
        method = Method(path.stem, **{"title": path.stem, **given})
        for what, value, known in (
            ("role", method.role, ROLES),
            ("family", method.family, FAMILIES),
        ):
            if value not in known:
                raise ValueError(f"{path}: {what} is {value!r}, choose one of {', '.join(known)}")
        found.append(method)
    return {method.name: method for method in sorted(found, key=lambda m: m.key)}


def method_of(record: Record) -> str:
    """The method's name, and after a + its optimizer's class where that is not the usual AdamW."""
    name, optimizer = record.config["method"]["name"], record.config.get("optimizer") or {}
    kind = str(optimizer.get("_target_", USUAL)).rsplit(".", 1)[-1]
    return name if kind == USUAL else f"{name}+{kind}"


def method(name: str) -> Method:
    known, _, optimizer = name.partition("+")
    found = methods().get(known) or Method(known, known)
    if not optimizer:
        return found
    return replace(found, name=name, title=f"{found.title}, {optimizer}", family="other", order=inf)


def title(name: str) -> str:
    return method(name).title


def label(name: str, runs: Iterable[Record]) -> str:
    """The method's title, with † where a run is noted (see report.provenance)."""
    return title(name) + ("†" if any("note" in r.environment for r in runs) else "")


def in_order(names: Iterable[str]) -> list[str]:
    """Methods as the tables show them: full fine-tuning, methods, controls."""
    return sorted(set(names), key=lambda name: method(name).key)


def by_method(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Runs of every method, in the order of the tables."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for r in records:
        groups[method_of(r)].append(r)
    return {name: groups[name] for name in in_order(groups)}


def by_number(records: Iterable[Record], key: str) -> dict[int, list[Record]]:
    """Runs by a number of the config, in its order."""

    def number(record: Record) -> int:
        return record.config[key]

    return {n: list(same) for n, same in groupby(sorted(records, key=number), number)}


@dataclass(frozen=True)
class Scope:
    """What is trained on what, as in "tiny SDXL, emoji, fluent (mmd)"."""

    model: str
    data: str = ""
    variant: str = ""  # what tells it from others of the same preset
    unit: str = ""  # of the score

    def __str__(self) -> str:
        text = ", ".join(filter(None, (self.model, self.data, self.variant)))
        return f"{text} ({self.unit})" if self.unit else text

    @property
    def short(self) -> str:
        return f"{self.column} ({self.unit})" if self.unit else self.column

    def of(self, unit: str) -> "Scope":
        """By one score."""
        return replace(self, unit=unit)

    @property
    def column(self) -> str:
        """Of the matrix of claims and settings."""
        return ", ".join(filter(None, (self.model, self.variant)))


@cache
def presets(experiment: str, configs: Path = CONFIGS) -> dict[str, Scope]:
    """The presets of an experiment that have a title, by name."""
    paths = sorted((configs / experiment).glob("*.yaml"))
    found = {path.stem: _read(path).get("title") for path in paths}
    return {
        name: Scope(given) if isinstance(given, str) else Scope(**given)
        for name, given in found.items()
        if given
    }


def preset(experiment: str, name: str) -> Scope:
    """What a preset trains on what; one without a title goes by its name."""
    return presets(experiment).get(name) or Scope(f"{experiment} {name}")


def _read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
