"""The first screen: does it help, what to use at which rate, and the gains over all settings."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from matplotlib.figure import Figure

from oplora.harness.runs import Record
from oplora.report import rules
from oplora.report.comparison import Comparison
from oplora.report.page import Part, ReportFigure, Row, Statement, Table
from oplora.report.statistics import ahead, mean_interval, shown
from oplora.report.style import INK, style
from oplora.report.titles import Scope, method, title

FOREST = (
    "Gain of OP over its plain counterpart in percent of the latter's score, each at its own best "
    "rate: mean and 95% interval over seeds (of which there are n); hollow: the paper's gain; an "
    "arrow: beyond the axis. Right of zero OP is ahead."
)
WHICH = (
    "Which learning rate, and what it costs: best rates of both by validation, OP's over the plain "
    "one's, the gain (mean ± 95% interval over seeds, positive where OP is ahead), least peak "
    "memory and shortest training time of the runs."
)
OTHER_START = {f"{method}_text": base for method, base in rules.PAIRS.items()}
CLIP = 15.0  # percent: what lies beyond is drawn as an arrow


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Of a method over another in one setting, by one score."""

    scope: Scope  # with the score's unit
    methods: tuple[str, str]  # the one that should be ahead, and the other
    values: Sequence[float]  # by seed; positive: ahead
    level: float  # the other's mean score
    digits: int
    rates: tuple[float, float]
    cited: float | None = None  # the paper's gain
    costs: Sequence[tuple[float, float]] = ()  # of both: bytes, seconds
    runs: Sequence[Record] = ()

    @property
    def interval(self) -> tuple[float, float]:
        mean, half = mean_interval(self.values)
        return mean - half, mean + half

    @property
    def ahead(self) -> int:
        """By the seeds: 1, -1 where it is behind, 0 where they do not tell."""
        return ahead(self.values)

    @property
    def text(self) -> str:
        return shown(self.values, self.digits, "+")


def gains_of(c: Comparison) -> list[Gain]:
    """Of each of the paper's pairs that shares two seeds, if the gate of it holds."""
    found = []
    for pair in (rules.PAIRS | OTHER_START).items():
        values = c.advantage(*pair)
        if len(values) > 1 and not c.unfit:
            gain = Gain(
                scope=c.scope.of(c.score.unit),
                methods=pair,
                values=values,
                level=fmean(c.scores(pair[1]).values()),
                digits=c.score.digits,
                rates=tuple(c.at_best[m][0].config["lr"] for m in pair),
                cited=rules.cited_gain(c, *pair),
                costs=[_cost(c.at_best[m]) for m in pair],
                runs=[r for m in pair for r in c.at_best[m]],
            )
            found.append(gain)
    return found


def _cost(runs: Sequence[Record]) -> tuple[float, float]:
    keys = ("peak_memory_bytes", "train_seconds")
    return tuple(min(r.metrics[key] for r in runs) for key in keys)


def parts(gains: Sequence[Gain]) -> list[Part]:
    """Three sentences, the forest plot and the table of rates; nothing without gains."""
    if not gains:
        return []
    first = of_the_first_pair(gains)
    starts = [gain for gain in gains if gain.methods[0] in OTHER_START]
    others = [gain for gain in gains if gain not in first and gain not in starts]
    tables = [
        which(name, caption, found)
        for name, caption, found in (
            ("which", WHICH, first),
            ("which_others", f"The other adapters. {WHICH}", others),
            ("which_start", f"With the text's start. {WHICH}", starts),
        )
        if found
    ]
    return [Statement("answer", answer(gains)), forest(gains), *tables]


def of_the_first_pair(gains: Sequence[Gain]) -> list[Gain]:
    """Of LoRA's family, matrix factorization among it, from the author's start."""
    family = method(next(iter(rules.PAIRS))).family
    kin = [gain for gain in gains if method(gain.methods[0]).family == family]
    return [gain for gain in kin if gain.methods[0] not in OTHER_START]


def answer(gains: Sequence[Gain]) -> str:
    """Does it help; what to use; at which rate: of LoRA's family where there are several."""
    pair, other = next(iter(rules.PAIRS.items())), next(iter(OTHER_START))
    name, base = map(title, pair)
    starts = [g for g in gains if g.methods[0] == other]
    gains = of_the_first_pair(gains) or gains
    better, worse, unclear = standing(gains)
    text = f"At its own best learning rate {name} beats {base} in {len(better)} of {len(gains)} "
    text += "comparisons" + (f" [{'; '.join(better)}]" if better else "")
    text += f", is behind in {len(worse)}" + (f" [{'; '.join(worse)}]" if worse else "")
    text += f", and in {len(unclear)} the seeds do not tell"
    if starts:
        won, lost, _ = standing(starts)
        text += f"; with the text's start it is ahead in {len(won)} of {len(starts)}"
        text += (f" [{'; '.join(won)}]" if won else "") + f" and behind in {len(lost)}"
    text += ".\n\nWhat to use: "
    if 2 * len(better) > len(gains):
        text += f"{name}, which is worth its memory in most of them."
    else:
        text += f"{base} with a tuned rate, which does as well in most of them"
        text += f"; {name} is worth a trial on data like that where it is ahead." * bool(better)
        text += "." * (not better)
    tuned = [gain for gain in gains if gain.costs] or gains
    ratios = sorted(gain.rates[0] / gain.rates[1] for gain in tuned)
    text += f"\n\nWhich rate: in fine-tuning {name}'s best is {ratios[0]:.1g}"
    text += f" to {ratios[-1]:.1g}" * (ratios[0] < ratios[-1]) + f" times {base}'s; begin there."
    return text


def standing(gains: Sequence[Gain]) -> tuple[list[str], list[str], list[str]]:
    """Gains in words: where it is ahead, where behind, and where the seeds do not tell."""
    told = {1: [], -1: [], 0: []}
    for gain in gains:
        told[gain.ahead].append(f"{gain.scope.short} {gain.text}")
    return told[1], told[-1], told[0]


def forest(gains: Sequence[Gain]) -> ReportFigure:
    figure = Figure(figsize=(9, 0.8 + 0.36 * len(gains)))
    axis = figure.subplots()
    ends = [abs(_percent(gain)(end)) for gain in gains for end in gain.interval]
    edge = min(CLIP, 1.1 * max(ends, default=1)) or 1.0
    for y, gain in enumerate(gains):
        percent, look = _percent(gain), style(gain.methods[0])
        low, high = map(percent, gain.interval)
        axis.plot([max(low, -edge), min(high, edge)], [y, y], color=look.color, lw=1.5)
        shown = [("full", percent(mean_interval(gain.values)[0]))]
        if gain.cited is not None:
            shown.append(("none", percent(gain.cited)))
        for fill, x in shown:
            marker = look.marker if abs(x) <= edge else "<" if x < 0 else ">"
            at = max(-edge, min(edge, x))
            axis.plot(at, y, marker, color=look.color, fillstyle=fill, ms=7)
            if abs(x) > edge:
                axis.annotate(f"{x:+.0f}%", (at, y), (-7, 1.5), textcoords="offset points",
                              ha="right", va="bottom", fontsize=8)  # fmt: skip
        text = f"{gain.text} {gain.scope.unit}"
        axis.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axis.axvline(0, color=INK, lw=0.8)
    axis.set_xlim(-1.02 * edge, 1.02 * edge)
    labels = [f"{gain.scope.column}: {title(gain.methods[0])}" for gain in gains]
    axis.set_yticks(range(len(gains)), labels)
    axis.invert_yaxis()
    axis.set_xlabel("gain, % of the plain counterpart's score")
    axis.spines[["top", "right", "left"]].set_visible(False)
    ahead = sum(gain.ahead > 0 for gain in gains)
    finding = f"{ahead} of {len(gains)} intervals lie above zero."
    return ReportFigure("forest", f"{finding} {FOREST}", figure)


def _percent(gain: Gain):
    return lambda value: 100 * value / abs(gain.level)


def which(name: str, caption: str, gains: Iterable[Gain]) -> Table:
    """Which learning rate, per setting."""
    rows = []
    for gain in gains:
        mine, theirs = gain.rates
        cells = {
            "setting": gain.scope.short,
            "methods": " → ".join(map(title, reversed(gain.methods))),
            "best rate": f"{theirs:g} → {mine:g}",
            "ratio": f"{mine / theirs:.2g}",
            "gain": gain.text,
        }
        if gain.costs:
            (bytes_, seconds), (their_bytes, their_seconds) = gain.costs
            cells["memory, GB"] = f"{their_bytes / 1e9:.2f} → {bytes_ / 1e9:.2f}"
            cells["time, s"] = f"{their_seconds:.0f} → {seconds:.0f}"
        rows.append(Row(cells, gain.runs))
    return Table(name, caption, rows, details=["methods"])
