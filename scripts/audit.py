"""Re-derive the report's headline numbers from the raw runs, without any of the report's code.

Every learning rate that a sweep chose, every method's score with its interval, every gain of the
first screen and every price of not tuning is computed here once more, with pandas alone, and
compared with the tables as they are written. Exit code 1 and a line per difference, if there are
any.
"""

import argparse
import json
import sys
from pathlib import Path

import pandas
import yaml
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "results" / "published"
PAIRS = (("oplora", "lora"), ("opdora", "dora"), ("opvera", "vera"),
         ("oplora_text", "lora"), ("opdora_text", "dora"))  # fmt: skip
SCORES = {  # experiment → column of its table of results: metric, factor, digits, is higher better?
    "commonsense": {
        "average": ("accuracy", 100, 1, True),
        "held-out NLL": ("held_out_nll", 1, 3, False),
    },
    "vl_bart": {"average without captions": ("average_without_captions", 100, 1, True)},
    "llava_cars": {"top-1": ("accuracy", 100, 1, True)},
    "glue": {"score": ("score", 100, 1, True), "test loss": ("test_loss", 1, 3, False)},
    "subjects": {"EfficientNet": ("efficientnet", 1, 3, True)},
    "sdxl": {"mmd_efficientnet": ("images.mmd_efficientnet", 1, 2, False)},
}
KEYS = ["experiment", "preset", "variant"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="?", type=Path, default=PUBLISHED, help="default: published")
    parser.add_argument("tables", nargs="?", type=Path, help="default: RUNS/report/tables")
    given = parser.parse_args(arguments)
    runs, tables = given.runs, given.tables or given.runs / "report" / "tables"
    every = read(runs)
    checks, gains = factorizations(every), []
    swept: dict[str, list[pandas.DataFrame]] = {}  # preset → one for each setting
    tuned = every[every["experiment"].isin(SCORES) & ~every["variant"].str.endswith("_control")]
    for (experiment, preset, variant), group in tuned.groupby(KEYS):
        name = "_".join(filter(None, (experiment, preset, variant)))
        sweep = group
        if experiment == "sdxl":  # all styles take the rates that were chosen on one of them
            same = (every["experiment"] == "sdxl") & (every["preset"] == preset)
            sweep = every[same & (every["measure"] == False)]  # noqa: E712
        own_sweep = set(sweep["variant"]) == {variant}
        sweep = usual(sweep[sweep["fine_tune"] != False])  # noqa: E712
        best = chosen(sweep)
        if own_sweep:
            base = group[group["fine_tune"] == False]  # noqa: E712
            swept.setdefault(preset, []).append(pandas.concat([sweep, base]))
        checks += [(f"{name}_rates" if experiment != "sdxl" else f"sdxl_{preset}_rates", m, rate)
                   for m, rate in best.items()]  # fmt: skip
        final = usual(group[group["fine_tune"] != False])  # noqa: E712
        final = final[final["scored"]]
        final = final[final["lr"] == final["method"].map(best).fillna(final["lr"])]
        for column, (metric, factor, digits, higher) in SCORES[experiment].items():
            if metric not in final or final[metric].isna().all():
                continue
            by_method = {m: factor * rows.set_index("seed")[metric].dropna()
                         for m, rows in final.groupby("method")}  # fmt: skip
            checks += [(name, m, column, told(s, digits)) for m, s in by_method.items()]
            if gate(group, metric, by_method):
                gains += [
                    (f"{title(base)} → {title(method)}", f"{best[base]:g} → {best[method]:g}",
                     told(difference, digits, sign="+"))
                    for method, base in PAIRS if {method, base} <= set(by_method)
                    and len(difference := ((1 if higher else -1)
                            * (by_method[method] - by_method[base])).dropna()) > 1
                ]  # fmt: skip
    for preset, settings in swept.items():
        checks += price_checks(f"price_{preset}_one_rate", settings, "loss")
        checks += price_checks(f"price_{preset}_training", settings, "train_end")
    digits = digit_checks(every)
    checks, gains = checks + digits[0], gains + digits[1]
    differences = compared(tables, checks, gains + factorization_gains(every))
    print(
        "\n".join(differences) or f"{len(checks) + len(gains)} numbers of {len(every)} runs agree"
    )
    return bool(differences)


def read(runs: Path) -> pandas.DataFrame:
    """A row per finished run: what identifies it, its loss and its metrics by dotted names."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    rows = []
    for path in sorted(runs.rglob("metrics.json")):
        metrics = json.loads(path.read_text(encoding="utf-8"))
        config = yaml.load((path.parent / "config.yaml").read_text(encoding="utf-8"), loader)
        experiment, curve = config["experiment"], metrics.get("validation_loss")
        variant = ""
        if experiment == "commonsense":
            variant = config["model"]["dtype"]
        elif experiment == "sdxl":
            variant = config["dataset"]["name"]
        elif experiment == "glue":
            variant = config["task"]["name"]
        kept = ("experiment", "preset", "lr", "seed", "rank", "mlp_width", "direct_lr", "measure",
                "fine_tune", "rates")  # fmt: skip
        row = {key: config.get(key) for key in kept} | {"variant": variant}
        row |= {"method": config["method"]["name"], "widths": config.get("widths") or {}}
        optimizer = config.get("optimizer") or {}
        row["optimizer"] = optimizer.get("name")
        kind = optimizer.get("_target_", "AdamW").rsplit(".", 1)[-1]
        row["method"] += "" if kind == "AdamW" else f"+{kind}"
        row["loss"] = metrics.get("validation_nll") or (curve[-1][1] if curve else None)
        logged = [loss for _, loss in metrics.get("train_loss") or ()]
        if logged:
            last = logged[-max(1, len(logged) // 5) :]
            row |= {"train_end": sum(last) / len(last), "train_first": logged[0]}
        if "diverged" in metrics and experiment in SCORES:
            row |= {"loss": float("inf"), "train_end": float("inf")}
        row |= pandas.json_normalize(metrics).to_dict("records")[0]
        names = [metric for metric, *_ in SCORES.get(experiment, {}).values()]
        row["scored"] = any(row.get(metric) is not None for metric in names)
        rows.append(row)
    return pandas.DataFrame(rows)


def usual(runs: pandas.DataFrame) -> pandas.DataFrame:
    """Those of the rank at which most methods were run, of the usual width and the usual rate of
    what is trained besides the adapters."""
    if runs["direct_lr"].notna().any():
        runs = runs[runs["direct_lr"].isna() | (runs["direct_lr"] == mode(runs["direct_lr"]))]
    runs = runs[runs["rank"] == mode(runs.drop_duplicates(["method", "rank"])["rank"])]
    widths = runs.groupby("method")["mlp_width"].agg(mode)
    given = [w.get(m, w.get("default", widths[m])) for m, w in zip(runs["method"], runs["widths"],
                                                                    strict=True)]  # fmt: skip
    return runs[runs["mlp_width"] == given]


def mode(values: pandas.Series) -> float:
    return values.dropna().value_counts(sort=True).index[0]


def by_seed(runs: pandas.DataFrame, loss: str) -> dict[str, pandas.DataFrame]:
    """Method → its loss by rate and seed, of the rates that have its usual seed."""
    tables = {method: rows.pivot_table(loss, "lr", "seed", aggfunc="last")
              for method, rows in runs.dropna(subset=loss).groupby("method")}  # fmt: skip
    return {m: t[t[t.notna().sum().idxmax()].notna()] for m, t in tables.items()}


def adapter_losses(runs: pandas.DataFrame, loss: str) -> dict[str, pandas.Series]:
    """Method → its mean loss by rate, over the seeds that all its rates have."""
    tables = by_seed(runs[runs["method"] != "full"], loss)
    return {method: table.dropna(axis=1).mean(axis=1) for method, table in tables.items()}


def price_checks(name: str, settings: list[pandas.DataFrame], loss: str) -> list[tuple]:
    """What each method misses of every setting's gain at its one best rate for all."""
    missed: dict[str, list[pandas.Series]] = {}
    for runs in settings:
        tuned = runs[runs["fine_tune"] != False]  # noqa: E712
        untrained = runs.loc[runs["fine_tune"] == False, "loss"].mean()  # noqa: E712
        losses = adapter_losses(tuned, "loss")
        if not min(map(min, losses.values()), default=float("inf")) <= 0.99 * untrained:
            continue  # its base model's loss is not known, or nothing was learned
        if loss == "train_end":
            losses = adapter_losses(tuned, loss)
            lowest = tuned[tuned["loss"] < float("inf")].sort_values("lr").groupby("method")
            untrained = lowest["train_first"].first().max()
        best = min(map(min, losses.values()))
        for method, values in losses.items():
            missed.setdefault(method, []).append((values - best) / (untrained - best))
    found = []
    for method, each in missed.items():
        table = pandas.concat(each, axis=1, join="inner")
        if len(each) > 1 and len(table):
            at = table.loc[table.mean(axis=1).idxmin()]
            cells = {"rate": f"{at.name:g}", "mean": f"{at.mean():.0%}", "worst": f"{at.max():.0%}"}
            found += [(name, method, column, text) for column, text in cells.items()]
    return found


def chosen(sweep: pandas.DataFrame) -> dict[str, float]:
    """Method → the rate of the lowest mean loss, over the seeds that all its rates have.

    If it and others were run with more seeds, over those that these share.
    """
    best = {}
    for method, table in by_seed(sweep, "loss").items():
        shared = table.dropna(axis=1)
        best[method] = float(shared.mean(axis=1).idxmin())
        more = table[table.notna().sum(axis=1) > shared.shape[1]]
        if best[method] in more.index and more.dropna(axis=1).shape[1] > shared.shape[1]:
            best[method] = float(more.dropna(axis=1).mean(axis=1).idxmin())
    return best


def told(values: pandas.Series, digits: int, sign: str = "") -> str:
    """Mean ± 95% t-interval (number of seeds)."""
    n, mean = len(values), values.mean()
    if n == 1:
        return f"{mean:{sign}.{digits}f} (1)"
    half = round(stats.t.ppf(0.975, n - 1), 3) * values.std() / n**0.5
    return f"{mean:{sign}.{digits}f} ± {half:.{digits}f} ({n})"


def gate(group: pandas.DataFrame, metric: str, by_method: dict[str, pandas.Series]) -> bool:
    """Can this base model tell methods apart? Asked of generated images alone."""
    if not metric.startswith("images."):
        return True
    name = metric.removeprefix("images.")
    for _, base in group[group["fine_tune"] == False].iterrows():  # noqa: E712
        if f"yardsticks.base.{name}" in base:
            own, other = base[f"yardsticks.base.{name}"], base[f"yardsticks.gap.{name}"]
            if not own < other:
                return False
        moved = group[group["method"].isin({"full", "lora"} & set(by_method)) & group["lr"].notna()]
        moved = moved[(moved["fine_tune"] != False) & moved[metric].isin(  # noqa: E712
            pandas.concat([by_method[m] for m in ("full", "lora") if m in by_method]))]  # fmt: skip
        if not (moved[f"{metric}_high"] < base[f"{metric}_low"]).all():
            return False
    return True


def studies(every: pandas.DataFrame) -> dict[tuple[str, str], pandas.DataFrame]:
    """(optimizer, method) → final errors, a row per rate and a column per seed."""
    runs = every[every["experiment"] == "matrix_factorization"]
    return {
        (r["optimizer"], r["method"]): pandas.DataFrame(
            r["final_mse"], index=r["rates"], dtype=float
        ).fillna(float("inf"))
        for _, r in runs.iterrows()
    }


def factorizations(every: pandas.DataFrame) -> list[tuple]:
    found = []
    for (optimizer, method), errors in studies(every).items():
        best = errors.median(axis=1).idxmin()
        at = errors.loc[best]
        kept = at[at < float("inf")]
        text = f"{kept.median():.4f} [{kept.min():.4f}, {kept.max():.4f}]"
        lost = len(at) - len(kept)
        text += f", {lost} of {len(at)} diverged" if lost else ""
        found.append(("mf_summary", method, "MSE at best rate", text, f"{best:g}", optimizer))
    return found


def factorization_gains(every: pandas.DataFrame) -> list[tuple[str, str, str]]:
    found, errors = [], studies(every)
    for optimizer in {name for name, _ in errors}:
        both = [errors.get((optimizer, method)) for method in ("mf", "opmf")]
        if any(each is None for each in both):
            continue
        best = [each.median(axis=1).idxmin() for each in both]
        values = both[0].loc[best[0]] - both[1].loc[best[1]]
        values = values[values.abs() < float("inf")]
        found.append(
            ("MF → OP-MF", f"{best[0]:g} → {best[1]:g}", told(values, 5, sign="+"))
        )  # fmt: skip
    return found


def digit_checks(every: pandas.DataFrame) -> tuple[list[tuple], list[tuple[str, str, str]]]:
    """Rotated MNIST: losses at each method's best rate, and gains by seed."""
    checks, gains = [], []
    for preset, runs in every[every["experiment"] == "rotated_mnist"].groupby("preset"):
        at, rate = {}, {}
        for _, r in runs.iterrows():
            losses = pandas.DataFrame(r["final_loss"], index=r["rates"], dtype=float)
            losses = losses.mask(pandas.DataFrame(r["diverged"], index=r["rates"])).fillna(
                float("inf")
            )
            rate[r["method"]] = losses.mean(axis=1).idxmin()
            at[r["method"]] = losses.loc[rate[r["method"]]]
        checks += [
            (f"rotated_mnist_{preset}", m, "training loss", told(losses, 3))
            for m, losses in at.items()
        ]
        gains += [
            (f"{title(base)} → {title(method)}", f"{rate[base]:g} → {rate[method]:g}",
             told(at[base] - at[method], 3, sign="+"))
            for method, base in PAIRS if {method, base} <= set(at)
        ]  # fmt: skip
    return checks, gains


def title(method: str) -> str:
    name, _, optimizer = method.partition("+")
    path = ROOT / "configs" / "method" / f"{name}.yaml"
    found = yaml.safe_load(path.read_text(encoding="utf-8"))["title"] if path.exists() else name
    return f"{found}, {optimizer}" if optimizer else found


def compared(tables: Path, checks: list[tuple], gains: list[tuple[str, str, str]]) -> list[str]:
    """A line per number that the tables tell otherwise."""
    found = []
    for name, method, *expected in checks:
        rows = pandas.read_csv(tables / f"{name}.csv", dtype=str)
        rows = rows[rows["method"].str.removesuffix("†") == title(method)]
        if len(expected) == 1:  # a chosen rate: starred
            starred = [c for c in rows if str(rows[c].iloc[0] if len(rows) else "").find("*") >= 0]
            cells, wanted = starred, [f"{expected[0]:g}"]
        elif len(expected) == 2:
            cells, wanted = rows[expected[0]].tolist(), expected[1:]
        else:
            column, text, rate, optimizer = expected
            names = {"sgd": "SGD", "momentum": "SGD with momentum", "adam": "Adam"}
            rows = rows[rows["optimizer"] == names[optimizer]]
            cells, wanted = rows[["best rate", column]].to_numpy().ravel().tolist(), [rate, text]
        if cells != wanted:
            found.append(f"{name}, {method}: the table has {cells}, the runs give {wanted}")
    columns = ["methods", "best rate", "gain"]
    files = [path for path in tables.glob("which*.csv") if not path.stem.endswith(".runs")]
    shown = [pandas.read_csv(file, dtype=str) for file in files]
    shown = sorted(map(tuple, pandas.concat(shown)[columns].to_numpy()))
    if shown != sorted(gains):
        missing, other = sorted(set(gains) - set(shown)), sorted(set(shown) - set(gains))
        found.append(f"which: the table has {other}, the runs give {missing}")
    return found


if __name__ == "__main__":
    sys.exit(main())
