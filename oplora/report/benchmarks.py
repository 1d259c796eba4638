"""Speed and memory: what scripts/benchmark.py measured, against the aims."""

import json
from pathlib import Path

from oplora.report.page import Row, Section, Statement, Table
from oplora.report.tables import cited
from oplora.report.titles import title

IN_GRAPH = {  # the benchmark's own forms of OP-LoRA, with the MLPs as modules of the model
    "oplora_in_graph_fused": "OP-LoRA in the graph, fused AdamW",
    "oplora_in_graph_foreach": "OP-LoRA in the graph, foreach AdamW",
}
BATCHED = {
    "matrix_factorization.json": "Matrix factorization",
    "rotated_mnist.json": "Rotated MNIST",
}
STEP_AIMS = {8: 1.05, 32: 1.15}  # OP-LoRA's step over LoRA's on SmolLM2, by rank
SCALE_AIM = 1.02  # of the learned scale's step
COST_RANK = 32  # of the paper's table of costs


def section(folder: Path) -> Section | None:
    """Tables of training_step.json and other files in `folder`; None without the first."""
    measured = _read(folder / "training_step.json")
    if measured is None:
        return None
    parts = [hardware(measured)]
    for case in measured["cases"]:
        name = f"benchmark_{case['model']}_r{case['rank']}"
        caption = (
            f"Training step of {case['model']} at rank {case['rank']}: medians with the range of "
            f"{measured['rounds']} interleaved rounds; memory at most, in a process of its own."
        )
        parts.append(Table(name, caption, method_table(case)))
    parts.insert(1, memory(measured["cases"], _read(folder / "full_size_step.json")))
    parts[2:2] = [costs(case) for case in measured["cases"] if case["rank"] == COST_RANK]
    aims = aim_table(measured["cases"], _read(folder / "optimizer_step.json"))
    parts.append(Table("benchmark_aims", "The aims.", aims, text=True))
    if sweep := _read(folder / "shapes.json"):
        parts.append(linear_cost(sweep))
    if step := _read(folder / "full_size_step.json"):
        parts.append(
            f"One step of SDXL's U-Net at its real size ({step['unet_parameters']:,} parameters, "
            f"bfloat16, {step['resolution']} pixels) with OP-LoRA at width {step['mlp_width']} "
            f"({step['mlp_parameters']:,} MLP parameters) on a machine without a GPU: "
            f"{step['peak_memory_gib']:.1f} GiB at most."
        )
    if found := _read(folder / "runlora.json"):
        parts.append(orders(found))
    if saved := _read(folder / "state_file.json"):
        parts.append(Statement("state_file", state_file(saved)))
    for file, what in BATCHED.items():
        if study := _read(folder / file):
            parts.append(
                f"{what} trains all {study['members']} runs of a method in one batch, "
                f"{study['study_ratio']:.1f} times as fast as one after the other."
            )
    return Section("Speed and memory", parts)


def memory(cases: list[dict], full_size: dict | None) -> Table:
    """Of LoRA's and OP-LoRA's forms by model and rank."""
    forms, rows = ("lora", "oplora", "oplora_lite", "scale"), []
    for case in cases:
        peaks = {m: case["methods"][m]["peak_memory_bytes"] for m in forms if m in case["methods"]}
        cells = {"model": case["model"], "rank": case["rank"]}
        rows.append(Row(cells | {title(m): f"{peak / 1e9:.2f}" for m, peak in peaks.items()}))
    if full_size:
        peak = f"{full_size['peak_memory_bytes'] / 1e9:.2f}"
        rows.append(Row({"model": "SDXL's U-Net, real size", title("oplora"): peak}))
    return Table("memory", "Peak memory of a training step, GB.", rows)


def costs(case: dict) -> Table:
    """Memory and time of a step over LoRA's, beside the paper's of a whole training."""
    paper = cited("costs.yaml")
    lora, cited_lora = case["methods"]["lora"], paper["rows"]["lora"]
    rows = []
    for method, row in case["methods"].items():
        if method in IN_GRAPH:
            continue
        cells = {
            "method": title(method),
            "memory over LoRA's": f"{row['peak_memory_bytes'] / lora['peak_memory_bytes']:.2f}",
            "step over LoRA's": f"{row['step_over_lora']['median']:.2f}",
        }
        told = paper["rows"].get(method, [None, None])
        for column, value, of_lora in zip(paper["columns"], told, cited_lora, strict=True):
            ratio = f"{value:g} ({value / of_lora:.2f})" if value else None
            cells[f"paper: {column} (over LoRA's)"] = ratio
        rows.append(Row(cells))
    caption = (
        f"What a method costs: a training step of {case['model']} at rank {case['rank']}. "
        f"Cited beside it: {paper['source']}."
    )
    return Table(f"costs_{case['model']}", caption, rows)


def state_file(saved: dict) -> str:
    of = {name: f"{size:.0f}" for name, size in saved["bytes_per_value"].items()}
    return (
        f"A saved optimizer state takes {of['oplora']} bytes per adapter value at width "
        f"{saved['mlp_width']} (the rows of W2 that are kept, and both moments), "
        f"{of['oplora_dcp']} in torch.distributed.checkpoint's layout, which has all rows; Lite's "
        f"takes {of['oplora_lite']}, the learned scale's {of['scale']}, and AdamW's on the adapter "
        f"alone {of['adamw']}."
    )


def hardware(measured: dict) -> str:
    """What the numbers were measured on."""
    facts = measured["environment"]
    return (
        f"Measured in one run on {facts['gpu'] or facts['cpu']}, {measured['threads']} threads, "
        f"torch {facts['versions']['torch']}, code revision {str(facts['revision'])[:10]}."
    )


def method_table(case: dict) -> list[Row]:
    """One row per method; memory beyond LoRA's."""
    lora = case["methods"]["lora"]["peak_memory_bytes"]
    return [
        Row(
            {
                "method": IN_GRAPH.get(method) or title(method),
                "forward and backward, s": _range(row["forward_backward_seconds"]),
                "optimizer, s": _range(row["optimizer_seconds"]),
                "step over LoRA's": _range(row["step_over_lora"]),
                "peak memory, GB": f"{row['peak_memory_bytes'] / 1e9:.2f}",
                "beyond LoRA, GB": f"{(row['peak_memory_bytes'] - lora) / 1e9:+.2f}",
            }
        )
        for method, row in case["methods"].items()
    ]


def aim_table(cases: list[dict], steps: dict | None = None) -> list[Row]:
    """Every aim, what was measured, and whether it was reached; SmolLM2 alone.

    steps: optimizer_step.json, where the MLPs in the graph are timed without a model around them,
    whose own forward and backward pass vary by more than the MLPs take.
    """
    found = [aim for case in cases if case["model"] == "smollm2" for aim in _aims(case)]
    for form in ("fused", "foreach") if steps else ():
        aim = f"the MLPs' own part of a step at most 1/4 of {IN_GRAPH[f'oplora_in_graph_{form}']}"
        found.append((8, aim, 1 / steps["ratio_to_op_adamw"][f"in_graph_adamw_{form}"], 0.25))
    rows = []
    for rank, aim, value, bound in found:
        verdict = "reached" if value <= bound else "missed"
        cells = {"rank": rank, "aim": aim, "measured": f"{value:.3f}", "verdict": verdict}
        rows.append(Row(cells))
    return rows


def _aims(case: dict) -> list[tuple[int, str, float, float]]:
    """(rank, aim, measured, at most) of one model and rank."""
    methods, rank = case["methods"], case["rank"]
    step = {m: row["step_over_lora"]["median"] for m, row in methods.items()}
    memory = {m: row["peak_memory_bytes"] for m, row in methods.items()}
    naive = min(memory[m] for m in methods if m in IN_GRAPH) - memory["lora"]
    bandwidth = "what its memory traffic takes at the bandwidth of STREAM's triad"
    return [
        (rank, f"step at most {STEP_AIMS[rank]} of LoRA's", step["oplora"], STEP_AIMS[rank]),
        (rank, "memory beyond LoRA's at most 0.55 of the MLPs' in the graph",
         (memory["oplora"] - memory["lora"]) / naive, 0.55),
        (rank, f"optimizer step at most 1.5 of {bandwidth}",
         case["oplora_optimizer_over_limit"], 1.5),
        *((rank, f"step below {title(m)}'s", step["oplora"] / step[m], 1.0)
          for m in ("lora_pro", "lora_rite")),
        *((rank, f"{title(m)}: step at most {SCALE_AIM} of LoRA's", step[m], SCALE_AIM)
          for m in ("scale",) if m in step),
    ]  # fmt: skip


def linear_cost(sweep: dict) -> Table:
    """The sweep over widths and adapter sizes, and the line through it."""
    fit, rows = sweep["fit"], []
    for case in sweep["cases"]:
        line = (
            fit["seconds"]
            + fit["seconds_per_adapter_value"] * case["adapter_parameters"]
            + fit["seconds_per_active_W2_value"] * case["active_W2_values"]
        )
        cells = {
            "MLP width": case["width"],
            "adapter values": case["adapter_parameters"],
            "values in active rows of W2": case["active_W2_values"],
            "seconds": _range(case["seconds"], 4),
            "line": f"{line:.4f}",
        }
        rows.append(Row(cells))
    caption = (
        "OP-LoRA's optimizer step over MLP widths and adapter sizes, and a line in the adapter's "
        f"values and the values in active rows of W2: R² {sweep['r_squared']:.3f}, largest "
        f"deviation {sweep['largest_relative_residual']:.0%}."
    )
    return Table("benchmark_shapes", caption, rows)


def orders(found: dict) -> Table:
    """PEFT's LoRA layer against RunLoRA's cheapest order, and a transformer layer's sum."""
    rows, told = [], []
    for model in found["models"]:
        for layer in model["layers"]:
            order = ", ".join(f"{name} {way}" for name, way in layer["order"].items())
            cells = {
                "model": model["model"],
                "layer": f"{layer['d_in']} → {layer['d_out']}",
                "order": order,
                "PEFT's over RunLoRA's": _range(layer["peft_over_runlora"], 2),
            }
            rows.append(Row(cells))
        ratio = model["peft_over_runlora"]
        cells = {"model": model["model"], "layer": "all adapted of a transformer layer"}
        rows.append(Row(cells | {"PEFT's over RunLoRA's": _range(ratio, 2)}))
        told.append(
            f"{1 - 1 / ratio['median']:.0%} of {model['model']}'s "
            f"({model['rows']} × {model['tokens']} tokens, rank {model['rank']})"
        )
    caption = (
        "RunLoRA's orders of the products in a LoRA layer, forward and backward in float32: "
        f"medians with the range of {found['rounds']} rounds in turn with PEFT's layer. "
        f"That of the fewest multiplications saves {' and '.join(told)}. "
        "rank: through A and B; merged, full: W + s B A, dW is formed."
    )
    return Table("benchmark_runlora", caption, rows)


def _range(spread: dict[str, float], digits: int = 3) -> str:
    return "{median:.{d}f} [{low:.{d}f}, {high:.{d}f}]".format(**spread, d=digits)


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
