"""Speed against the alternatives, as ratios measured side by side in one run.

python scripts/benchmark.py [matrix_factorization optimizer_step …]     default: all
Writes results/benchmarks/<name>.json. Run it on an otherwise idle machine.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import oplora
from oplora.factorization import SGD, Adam, Momentum, Problem, factorize
from oplora.runs import environment, write_atomically


def matrix_factorization() -> dict:
    """The batch of all rates and seeds against a loop of single runs of the same program.

    A sample of the loop's runs is timed between pieces of the batch's time and scaled up to all
    of them; both with one thread and the full logging.
    """
    torch.set_flush_denormal(True)
    problem = Problem(steps=100)
    seeds, rates = list(range(10)), [10 ** (k / 3) for k in range(-6, 10)]
    sample = range(0, len(rates), 4)
    rows, totals = [], {"batch": 0.0, "loop": 0.0}
    cases = [
        (method, rule)
        for method in ("plain", "predicted", "matched")
        for rule in (SGD, Momentum, Adam)
    ]
    for method, rule in tqdm(cases, desc="matrix factorization"):
        options = dict(method=method, rule=rule, width=32, z_dim=128)
        factor = 0.01 if rule is Adam else 1.0
        scaled = [rate * factor for rate in rates]
        batch = _seconds(partial(factorize, problem, seeds, scaled, **options))
        singles = [
            _seconds(partial(factorize, problem, [0], [scaled[i]], **options)) for i in sample
        ]
        again = _seconds(partial(factorize, problem, seeds, scaled, **options))
        batch = (batch + again) / 2
        loop = statistics.mean(singles) * len(rates) * len(seeds)
        totals["batch"] += batch
        totals["loop"] += loop
        rows.append(
            {
                "method": method,
                "optimizer": rule.__name__,
                "batch_seconds": round(batch, 2),
                "loop_seconds": round(loop, 2),
                "ratio": round(loop / batch, 2),
            }
        )
    return {
        "members": len(rates) * len(seeds),
        "steps": problem.steps,
        "cases": rows,
        "study_ratio": round(totals["loop"] / totals["batch"], 2),
    }


def optimizer_step() -> dict:
    """One optimizer step of OP-LoRA: ours, the generic form and the MLPs in the graph.

    30 layers of 576 → 576 adapters of rank 8 at width 32, fp32; interleaved, medians of 15.
    """
    generator = torch.Generator().manual_seed(0)

    def adapters():
        return [
            [
                torch.nn.Parameter(torch.randn(8, 576, generator=generator)),
                torch.nn.Parameter(torch.zeros(576, 8)),
            ]
            for _ in range(30)
        ]

    def in_optimizer(make):
        blocks = adapters()
        optimizer = make(blocks)
        grads = [[torch.randn_like(t) for t in block] for block in blocks]

        def step():
            for block, gradient in zip(blocks, grads, strict=True):
                for tensor, g in zip(block, gradient, strict=True):
                    tensor.grad = g
            optimizer.step()

        return step

    def in_graph(**options):
        blocks = adapters()
        mlps = [oplora.AdapterMLP(block) for block in blocks]
        optimizer = torch.optim.AdamW([p for m in mlps for p in m.parameters()], **options)
        grads = [[torch.randn_like(t) for t in block] for block in blocks]

        def step():
            optimizer.zero_grad()
            for mlp, gradient in zip(mlps, grads, strict=True):
                torch.autograd.backward(mlp(), gradient)
            optimizer.step()

        return step

    forms = {
        "lora_adamw_fused": in_optimizer(
            lambda blocks: torch.optim.AdamW([t for b in blocks for t in b], fused=True)
        ),
        "op_adamw": in_optimizer(lambda blocks: oplora.OPAdamW(blocks, start="paper")),
        "op_generic_adamw_fused": in_optimizer(
            lambda blocks: oplora.OPOptimizer(blocks, torch.optim.AdamW, fused=True, start="paper")
        ),
        "in_graph_adamw_fused": in_graph(fused=True),
        "in_graph_adamw_foreach": in_graph(foreach=True),
    }
    times: dict[str, list[float]] = {name: [] for name in forms}
    for repetition in tqdm(range(18), desc="optimizer step"):
        for name, step in forms.items():
            seconds = _seconds(step)
            if repetition >= 3:  # warm-up
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "adapter_parameters": sum(t.numel() for block in adapters() for t in block),
        "milliseconds": {name: round(1e3 * value, 2) for name, value in medians.items()},
        "ratio_to_op_adamw": {
            name: round(value / medians["op_adamw"], 2) for name, value in medians.items()
        },
    }


def _seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


BENCHMARKS = {f.__name__: f for f in (matrix_factorization, optimizer_step)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(BENCHMARKS):
        parser.error(f"unknown: {', '.join(unknown)}; choose of {', '.join(BENCHMARKS)}")
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or BENCHMARKS:
        result = {"threads": arguments.threads, **BENCHMARKS[name](), "environment": environment()}
        text = json.dumps(result, indent=1)
        write_atomically(arguments.out / f"{name}.json", text + "\n")
        result.pop("environment")
        print(json.dumps({name: result}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
