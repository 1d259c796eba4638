"""What the MLP adds: all that may stand between what is learned and A and B, side by side."""

from collections.abc import Sequence

from oplora.report.comparison import Comparison
from oplora.report.page import Missing, Part, Row, Section, Statement, Table
from oplora.report.statistics import ahead, shown
from oplora.report.titles import method, title

NOTHING, ONE_NUMBER, MLP = "lora", "oplora_scalar", "oplora"
GENERATORS = (NOTHING, ONE_NUMBER, "oplora_free", "oplora_linear", MLP, "hyperloader", "nola")
ABOUT = (
    "What stands between the learned numbers and A and B: nothing; one number a layer, how far to "
    "go along what was learned; hidden units that are learned themselves; the MLP without its "
    "ReLU; the paper's; one MLP for all layers; coefficients of a fixed random basis. Validation "
    "loss (two-layer network: training loss), each at its own best rate, mean ± 95% interval "
    "(seeds); then by how much one is below the other on the same seeds."
)


def section(comparisons: Sequence[Comparison]) -> Section | None:
    """None where nothing but LoRA and OP-LoRA was run."""
    parts: list[Part] = []
    for preset in sorted({c.preset for c in comparisons}):
        if found := [c for c in comparisons if c.preset == preset and was_run(c)]:
            name = f"ablation_{preset}"
            parts += [Statement(f"{name}_told", sentence(found))]
            parts += [Table(name, ABOUT, [row(c) for c in found])]
    return Section("What the MLP adds", parts) if parts else None


def was_run(c: Comparison) -> bool:
    swept = any(method(name).family == "generator" for name in c.sweep)
    return swept and c.own_sweep and c.learns


def losses(c: Comparison, name: str) -> dict[int, float]:
    """Seed → loss at the method's best rate."""
    runs = c.seed_runs(name, c.chosen[name]) if name in c.chosen else {}
    return {seed: loss for seed, r in runs.items() if (loss := c.loss(r)) is not None}


def below(c: Comparison, name: str, other: str) -> list[float]:
    """By how much a method's loss is below another's, for every seed that both have."""
    mine, theirs = losses(c, name), losses(c, other)
    return [theirs[seed] - mine[seed] for seed in sorted(mine.keys() & theirs.keys())]


def row(c: Comparison) -> Row:
    cells = {"scope": str(c.scope)}
    for name in GENERATORS:
        known = shown(list(losses(c, name).values()), 3)
        absent = Missing(c.command(name)) if c.can_run(name) else None
        cells[title(name)] = known or absent
    cells["one number over LoRA"] = shown(below(c, ONE_NUMBER, NOTHING), 3, "+")
    cells["the MLP over one number"] = shown(below(c, MLP, ONE_NUMBER), 3, "+")
    return Row(cells, [r for name in GENERATORS for r in c.at_best.get(name, [])])


def sentence(found: Sequence[Comparison]) -> str:
    """In how many settings one number a layer is ahead of LoRA, and the MLP of one number."""
    told = [
        counted(found, ONE_NUMBER, NOTHING, "one learned number a layer is ahead of LoRA"),
        counted(found, MLP, ONE_NUMBER, "the MLP is ahead of one number a layer"),
    ]
    return f"By the loss, each at its own best rate, {'; '.join(told)}."


def counted(found: Sequence[Comparison], name: str, other: str, claim: str) -> str:
    """The claim with the settings in which it holds, in which its reverse, and each one's gain."""
    told = {1: [], -1: [], 0: []}
    for c in found:
        gains = below(c, name, other)
        if len(gains) > 1:
            told[ahead(gains)].append(f"{c.scope.column} {shown(gains, 3, '+')}")
    listed = [text for texts in told.values() for text in texts]
    if not listed:
        return f"whether {claim} needs more seeds"
    return (
        f"{claim} in {len(told[1])} of {len(listed)} settings, behind in {len(told[-1])}, and in "
        f"{len(told[0])} the seeds do not tell [{', '.join(listed)}]"
    )
