"""The rate explorer: every swept run as a dot, in Vega-Lite, which the page carries with it."""

import base64
import gzip
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import altair
import pandas
import vl_convert

from oplora.report.comparison import Comparison
from oplora.report.figures import reach
from oplora.report.page import Script
from oplora.report.style import DASHES, INK, MARKERS, style
from oplora.report.titles import in_order, method_of, title

CAPTION = (
    "Rate explorer: what the rates are chosen by and, where runs were scored, the test's results, "
    "by learning rate. Dots: seeds; line and band: mean and range. Choose a setting and metric; a "
    "click on a name in the legend (shift: several) shows it alone; a click on a dot opens its run."
)
HERE = Path(__file__).parent
VEGA_DASHES = {"-": [1, 0], "--": [6, 3], ":": [2, 2]}


def values(root: Path, comparisons: Sequence[Comparison]) -> pandas.DataFrame:
    """A row per run and metric: its setting, method, rate, seed, value and folder."""
    rows = []
    for c in comparisons:
        metrics = (("validation loss", c.loss, False), (c.score.unit, c.score, c.score.higher))
        for metric, value, higher in metrics:
            own = metric == c.score.unit or c.swept_elsewhere
            runs = [r for r in (c.records if own else c.sweep_runs) if "diverged" not in r.metrics]
            known = [(r, number) for r in runs if (number := value(r)) is not None]
            limit = reach([number for _, number in known], higher) if known else 0
            for r, number in known:
                at = (method_of(r), r.config["lr"], r.config["seed"], number)
                astray = number < limit if higher else number > limit
                name = r.path.relative_to(root).as_posix()
                rows.append((f"{c.scope}: {metric}", *at, name, astray))
    names = ["shown", "method", "rate", "seed", "value", "run", "astray"]
    return pandas.DataFrame(rows, columns=names).drop_duplicates(names[:5])


def explorer(root: Path, comparisons: Sequence[Comparison]) -> Script | None:
    """None where nothing was swept."""
    frame = values(root, comparisons)
    return None if frame.empty else Script("explorer", CAPTION, partial(code, frame))


def code(frame: pandas.DataFrame) -> str:
    """Bundle, specification and data, packed, as the bundle is large."""
    names = in_order(frame["method"])
    frame = frame.assign(method=frame["method"].map(title))
    shown = frame.groupby("shown", sort=False)["rate"].nunique()
    spec = chart(shown.sort_values(ascending=False, kind="stable").index.tolist(), names).to_dict()
    spec["datasets"] = {"runs": frame.to_dict("records")}
    script = "\n".join(
        (
            vl_convert.javascript_bundle(),
            f"const spec = {json.dumps(spec, sort_keys=True, separators=(',', ':'))};",
            (HERE / "explorer.js").read_text(encoding="utf-8"),
        )
    )
    packed = base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode()
    return (
        f'<div id="vega"></div><script type="text/plain" id="packed">{packed}</script>'
        f'<script type="module">\n{(HERE / "unpack.js").read_text(encoding="utf-8")}</script>'
    )


def chart(shown: list[str], names: list[str]) -> altair.LayerChart:
    """For these settings, of which the first is shown, and methods; the data is named "runs"."""
    looks, titles = [style(name) for name in names], [title(name) for name in names]

    def by(channel: type, look: list) -> altair.SchemaBase:
        return channel("method:N", title=None).scale(domain=titles, range=look)

    setting = altair.param(
        name="setting",
        value=shown[0],
        bind=altair.binding_select(options=shown, name="setting and metric "),
    )
    astray = altair.param(
        name="all", value=False, bind=altair.binding_checkbox(name="what went astray, too ")
    )
    alone = altair.selection_point("alone", fields=["method"], bind="legend")
    base = (
        altair.Chart(altair.NamedData("runs"))
        .transform_filter("datum.shown == setting && (all || !datum.astray)")
        .encode(
            altair.X("rate:Q", title="learning rate").scale(type="log"),
            by(altair.Color, [look.color for look in looks]),
            opacity=altair.when(alone).then(altair.value(1)).otherwise(altair.value(0.06)),
        )
    )

    def height(aggregate: str) -> altair.Y:
        return altair.Y(aggregate, title="value").scale(zero=False)

    band = base.mark_area(fillOpacity=0.15).encode(height("min(value):Q"), y2="max(value):Q")
    dashes = [VEGA_DASHES[DASHES[look.kind]] for look in looks]
    line = base.mark_line().encode(height("mean(value):Q"), by(altair.StrokeDash, dashes))
    dots = base.mark_point(filled=True, size=60, cursor="pointer").encode(
        height("value:Q"),
        by(altair.Shape, [MARKERS[look.marker] for look in looks]),
        tooltip=["method:N", "rate:Q", "seed:Q", "value:Q", "run:N"],
    )
    config = {"background": "transparent", "axis": {"labelColor": INK, "titleColor": INK},
              "legend": {"labelColor": INK, "labelLimit": 0}, "view": {"stroke": None}}  # fmt: skip
    return (
        altair.layer(band, line, dots)
        .add_params(setting, astray, alone)
        .properties(width=620, height=340)
        .configure(**config)
    )
