"""Studies whose rates and seeds are one batch, against a loop of single runs.

Used by scripts/benchmark.py.
"""

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from benchmark_training import seconds
from peft import LoraConfig, get_peft_model
from tqdm import tqdm

import oplora
from oplora.peft import create_plain_optimizer
from oplora.studies.matrix_factorization.factorization import (
    SGD,
    Adam,
    Momentum,
    Problem,
    factorize,
)
from oplora.studies.rotated_mnist.network import network
from oplora.studies.rotated_mnist.training import Member, adapt, alone


def matrix_factorization() -> dict:
    """The batch of all rates and seeds against a loop of single runs of the same program.

    A sample of the loop's runs is timed between pieces of the batch's time and scaled up to all
    of them; both with one thread and the full logging.
    """
    torch.set_num_threads(1)
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
        batch = seconds(partial(factorize, problem, seeds, scaled, **options))
        singles = [
            seconds(partial(factorize, problem, [0], [scaled[i]], **options)) for i in sample
        ]
        again = seconds(partial(factorize, problem, seeds, scaled, **options))
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


def rotated_mnist() -> dict:
    """The batch of all rates and seeds against a loop of single PEFT runs with their optimizers.

    Images are noise, which costs as much. Two runs of the loop are timed around the batch and
    scaled up to all. Processor time of one thread: a single run is too short to meet whatever else
    the machine does, the batch is not.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    images, labels = torch.rand(128 * 30, 784), torch.randint(10, (128 * 30,))
    base, training = network(512), dict(epochs=1, batch_size=128)
    seeds, rates = list(range(10)), [10 ** (k / 2) for k in range(-12, 1)]
    rows, totals = [], {"batch": 0.0, "loop": 0.0}
    for method, create in (
        ("lora", create_plain_optimizer),
        ("dora", create_plain_optimizer),
        ("oplora", oplora.create_oplora_optimizer),
    ):

        def start(create=create, dora=method == "dora"):
            adapter = LoraConfig(r=4, target_modules=["hidden", "output"], use_dora=dora)
            model = get_peft_model(copy.deepcopy(base), adapter)
            return model, create(model, torch.optim.AdamW, lr=1e-3, weight_decay=0.0)

        members = [Member.of(*start()) for _ in seeds]
        batch = partial(
            adapt, members, rates, seeds, images, labels, points=1,
            optimizer=partial(torch.optim.AdamW, weight_decay=0.0), **training,
        )  # fmt: skip
        singles = [partial(alone, *start(), 0, images, labels, **training) for _ in range(2)]
        first, batched, last = map(processor_seconds, (singles[0], batch, singles[1]))
        loop = (first + last) / 2 * len(rates) * len(seeds)
        totals["batch"] += batched
        totals["loop"] += loop
        rows.append(
            {
                "method": method,
                "batch_seconds": round(batched, 2),
                "loop_seconds": round(loop, 2),
                "ratio": round(loop / batched, 2),
            }
        )
    return {
        "members": len(rates) * len(seeds),
        "steps": 30,
        "cases": rows,
        "study_ratio": round(totals["loop"] / totals["batch"], 2),
    }


def processor_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start
