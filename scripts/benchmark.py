"""Speed and memory against the alternatives, as ratios measured side by side in one run.

python scripts/benchmark.py [training_step optimizer_step shapes …]     default: all
Writes results/benchmarks/<name>.json, on a GPU <name>_cuda.json. Run it on an idle machine.
"""

import argparse
import io
import json
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy
import torch
from benchmark_batches import matrix_factorization, rotated_mnist
from benchmark_runlora import runlora
from benchmark_training import (
    DEVICE,
    METHODS,
    WORKLOADS,
    peak_memory,
    prepare,
    seconds,
    spread,
    timed_step,
)
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from tqdm import tqdm

import oplora
from oplora.harness.runs import environment, write_atomically
from oplora.mlp import AdapterMLP
from oplora.optimizer import OPOptimizer

ROUNDS = 5  # their range is a 94% interval of the median
COST = ["lora", "oplora", "oplora_lite", "riemannian", "op_scaled", "lora_pro", "dora"]
CASES = [  # workload, rank, methods
    ("smollm2", 8, list(METHODS)),
    ("smollm2", 32, [*COST, "oplora_in_graph_fused", "lora_rite", "scale"]),
    ("tiny_sdxl", 4, list(METHODS)),
]
AT_REAL_SIZE = ["lora", "oplora", "oplora_lite", "oplora_in_graph_fused", "dora"]
if DEVICE == "cuda":
    llama = [*COST, "oplora_in_graph_fused"]
    CASES += [("llama_7b", 32, llama), ("sdxl", 4, [*AT_REAL_SIZE, "opdora"])]


def training_step() -> dict:
    """Forward and backward, optimizer step and peak memory of every method, interleaved."""
    return {"rounds": ROUNDS, "cases": [_case(*case) for case in CASES]}


def _case(workload: str, rank: int, names: list[str]) -> dict:
    with ThreadPoolExecutor(2) as pool:  # of processes that measure their own memory
        found = pool.map(partial(peak_memory, workload, rank), names)
        bar = tqdm(found, f"{workload}, rank {rank}: memory", len(names))
        rows = {name: {"peak_memory_bytes": peak} for name, peak in zip(names, bar, strict=True)}
    loaded = WORKLOADS[workload]()
    subjects = {name: prepare(loaded, rank, name) for name in names}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    triads = []
    for repetition in tqdm(range(ROUNDS + 1), desc=f"{workload}, rank {rank}: seconds"):
        triads.append(triad())
        for name in [*names[repetition:], *names[:repetition]]:  # the first finds colder caches
            found = timed_step(*subjects[name])
            if repetition:  # the first allocates the optimizer's state
                times[name].append(found)
    optimizer = subjects["oplora"][1]
    limit = traffic_bytes(optimizer) / statistics.median(triads)
    steps = {name: [sum(pair) for pair in pairs] for name, pairs in times.items()}
    for name, row in rows.items():
        graph, update = zip(*times[name], strict=True)
        ratios = [a / b for a, b in zip(steps[name], steps["lora"], strict=True)]
        row["forward_backward_seconds"] = spread(graph)
        row["optimizer_seconds"] = spread(update)
        row["step_over_lora"] = spread(ratios)
    return {
        "model": workload,
        "rank": rank,
        "adapter_parameters": optimizer.adapter_parameters,
        "mlp_parameters": optimizer.mlp_parameters,
        "triad_bytes_per_second": spread(triads),
        "oplora_traffic_bytes": traffic_bytes(optimizer),
        "oplora_optimizer_over_limit": rows["oplora"]["optimizer_seconds"]["median"] / limit,
        "methods": rows,
    }


def traffic_bytes(optimizer: OPOptimizer) -> int:
    """What an exact step of OPAdamW reads and writes at least, without weight decay, in fp32.

    Per value of an active row of W2: 4 bytes for dL/dh, 24 to read and write it and both
    moments; what is predicted comes from the cache. Per adapter value: the gradient, b2 and its
    moments, and the tensor, which is compared with what was written into it and written again:
    44 bytes.
    """
    active = sum(
        n * p for s in optimizer.stacks for n, p in zip(s.rows.active, s.tensors.sizes, strict=True)
    )
    return 28 * active + 44 * optimizer.adapter_parameters


def triad(values: int = 40_000_000) -> float:
    """Bytes per second of a = b + 3 c (STREAM's triad), by its rule of 12 bytes a value."""
    if not _TRIAD:
        _TRIAD.extend(torch.ones(values, device=DEVICE) for _ in range(3))
    a, b, c = _TRIAD
    return 12 * values / min(seconds(lambda: torch.add(b, c, alpha=3.0, out=a)) for _ in range(3))


_TRIAD: list[torch.Tensor] = []


def optimizer_step() -> dict:
    """One optimizer step of OP-LoRA: ours, the generic form and the MLPs in the graph.

    30 layers of 576 → 576 adapters of rank 8 at width 32, fp32; interleaved, medians of 15. Of
    the MLPs in the graph also their forward and backward, which ours does in the step.
    """
    forms = {
        "lora_adamw_fused": _in_optimizer(
            lambda blocks: torch.optim.AdamW([t for b in blocks for t in b], fused=True)
        ),
        "op_adamw": _in_optimizer(partial(oplora.OPAdamW, start="paper", weight_decay=0.0)),
        "op_generic_adamw_fused": _in_optimizer(
            partial(
                oplora.OPOptimizer,
                optimizer_cls=torch.optim.AdamW,
                fused=True,
                start="paper",
                weight_decay=0.0,
            )
        ),
        "in_graph_adamw_fused": _in_graph(fused=True),
        "in_graph_adamw_foreach": _in_graph(foreach=True),
    }
    times: dict[str, list[float]] = {name: [] for name in forms}
    for repetition in tqdm(range(18), desc="optimizer step"):
        for name, step in forms.items():
            found = seconds(step)
            if repetition >= 3:  # warm-up
                times[name].append(found)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "adapter_parameters": sum(t.numel() for block in _adapters() for t in block),
        "milliseconds": {name: round(1e3 * value, 2) for name, value in medians.items()},
        "ratio_to_op_adamw": {
            name: round(value / medians["op_adamw"], 2) for name, value in medians.items()
        },
    }


def _adapters(count: int = 30, columns: int = 576, rank: int = 8) -> list[list[torch.nn.Parameter]]:
    shapes = [(rank, columns), (columns, rank)]
    draws = [torch.randn(shapes[0], device=DEVICE) for _ in range(count)]
    zeros = [torch.zeros(shapes[1], device=DEVICE) for _ in range(count)]
    return [[torch.nn.Parameter(t) for t in pair] for pair in zip(draws, zeros, strict=True)]


def _in_optimizer(make: Callable, **sizes: int) -> Callable[[], None]:
    """A step of the optimizer that `make` builds of blocks with random gradients."""
    blocks = _adapters(**sizes)
    optimizer = make(blocks)
    for block in blocks:
        for tensor in block:
            tensor.grad = torch.randn_like(tensor)
    return optimizer.step


def _in_graph(**options) -> Callable[[], None]:
    blocks = _adapters()
    mlps = [AdapterMLP(block).to(DEVICE) for block in blocks]
    parameters = [p for mlp in mlps for p in mlp.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, **options)
    grads = [[torch.randn_like(t) for t in block] for block in blocks]

    def step():
        optimizer.zero_grad()
        for mlp, gradient in zip(mlps, grads, strict=True):
            torch.autograd.backward(mlp(), gradient)
        optimizer.step()

    return step


def state_file() -> dict:
    """Bytes of a saved optimizer state per adapter value: 8 adapters of rank 16 at 1024 → 1024.

    By form, after three steps; the last one is what torch.distributed.checkpoint is given.
    """
    forms = {
        "adamw": lambda blocks: torch.optim.AdamW([t for b in blocks for t in b]),
        "scale": oplora.ScaleAdamW,
        "oplora": partial(oplora.OPAdamW, start="paper"),
        "oplora_lite": partial(oplora.OPAdamW, start="paper", lite=True),
    }
    values, found = 0, {}
    for name, make in forms.items():
        blocks = _adapters(count=8, columns=1024, rank=16)
        optimizer = make(blocks)
        for _ in range(3):
            for tensor in (t for block in blocks for t in block):
                tensor.grad = torch.randn_like(tensor)
            optimizer.step()
        values = sum(t.numel() for block in blocks for t in block)
        found[name] = _saved(optimizer.state_dict())
        if name == "oplora":
            model = torch.nn.ParameterList(t for block in blocks for t in block)
            found["oplora_dcp"] = _saved(get_optimizer_state_dict(model, optimizer))
    per_value = {name: round(size / values, 1) for name, size in found.items()}
    return {"adapter_values": values, "mlp_width": 32, "bytes_per_value": per_value}


def _saved(state: dict) -> int:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.tell()


def shapes() -> dict:
    """OPAdamW's step over MLP widths and adapter sizes, and the line through them.

    8 adapters of rank 8, median of 7 steps after 2.
    """
    cases = []
    grid = [(width, columns) for width in (8, 16, 32, 64) for columns in (2048, 4096, 8192)]
    for width, columns in tqdm(grid, desc="shapes"):
        make = partial(oplora.OPAdamW, start="paper", weight_decay=0.0, mlp_width=width)
        step = _in_optimizer(make, count=8, columns=columns)
        found = [seconds(step) for _ in range(9)][2:]
        (stack,) = step.__self__.stacks
        active = sum(n * p for n, p in zip(stack.rows.active, stack.tensors.sizes, strict=True))
        cases.append(
            {
                "width": width,
                "adapter_parameters": sum(stack.tensors.sizes),
                "active_W2_values": active,
                "seconds": spread(found),
            }
        )
    values = numpy.array([[1, c["adapter_parameters"], c["active_W2_values"]] for c in cases])
    times = numpy.array([c["seconds"]["median"] for c in cases])
    # relative residuals: small cases count as much as large ones
    fit, *_ = numpy.linalg.lstsq(values / times[:, None], numpy.ones(len(times)), rcond=None)
    residuals = values @ fit / times - 1
    names = ("seconds", "seconds_per_adapter_value", "seconds_per_active_W2_value")
    return {
        "cases": cases,
        "fit": dict(zip(names, fit.tolist(), strict=True)),
        "largest_relative_residual": float(abs(residuals).max()),
        "r_squared": float(
            1 - ((values @ fit - times) ** 2).sum() / ((times - times.mean()) ** 2).sum()
        ),
    }


BENCHMARKS = {
    f.__name__: f
    for f in (
        training_step,
        optimizer_step,
        shapes,
        state_file,
        runlora,
        matrix_factorization,
        rotated_mnist,
    )
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--threads", type=int, default=cores, help="default: all cores")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(BENCHMARKS):
        parser.error(f"unknown: {', '.join(unknown)}; choose of {', '.join(BENCHMARKS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or BENCHMARKS:
        torch.set_num_threads(arguments.threads)
        result = BENCHMARKS[name]()
        result = {"threads": torch.get_num_threads(), **result, "environment": environment()}
        text = json.dumps(result, indent=1)
        suffix = "" if DEVICE == "cpu" else f"_{DEVICE}"
        write_atomically(arguments.out / f"{name}{suffix}.json", text + "\n")
        result.pop("environment")
        print(json.dumps({name: result}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
