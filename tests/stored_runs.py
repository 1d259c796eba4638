"""Made-up runs of every experiment on disk, as the report finds them."""

import json

import numpy
import yaml
from PIL import Image

RATES = [0.01, 0.1, 1.0, 10.0, 100.0]
MNIST_RATES = [0.001, 0.01, 0.1, 1.0, 10.0, 100.0]
SVD = 0.06
USUAL = {"default": 32, "opdora": 4}
MAIN = "average_without_captions"


def write(path, config, metrics, environment):
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    facts = {"cpu": "test", "versions": {"torch": "1"}, "revision": "abc", **environment}
    (path / "environment.json").write_text(json.dumps(facts))
    (path / "metrics.json").write_text(json.dumps(metrics))
    return path


def store_mf(folder, method, finals, optimizer="sgd", **environment):
    """A run with one final error per rate (None: diverged) at three seeds, and plain curves."""
    path = folder / f"{method}-{optimizer}"
    path.mkdir(parents=True)
    problem = dict(rows=100, columns=100, rank=8, condition_number=None, loss="mse", steps=1000)
    config = {
        "experiment": "matrix_factorization",
        "preset": "paper",
        "method": {"name": method},
        "optimizer": {"name": optimizer},
        "problem": {**problem, "log_every": 10},
        "rates": RATES,
    }
    metrics = {
        "final_mse": [[f, f, f] for f in finals],
        "diverged": [[f is None] * 3 for f in finals],
        "svd_mse": [SVD] * 3,
        "svd_effective_rank": [4.5] * 3,
        "trained_parameters": 1600,
        "gradient_peaks": {
            whose: {"first": ones, "highest": [[3.0] * 3] * len(finals), "lowest_after": ones}
            for ones in [[[1.0] * 3] * len(finals)]
            for whose in ("adapter", "trained")
        },
    }
    time = numpy.linspace(0, 1, 101)
    mse = numpy.array(
        [[(f or numpy.nan) + 0.3 * (1 - time) ** 9 for _ in range(3)] for f in finals]
    )
    curves = {name: mse for name in ("mse", "gradient_norm", "gradient_cosine", "effective_rank")}
    numpy.savez(path / "curves.npz", **curves, step_multiplier=mse + 1, hidden_l1=mse)
    return write(path, config, metrics, environment)


def store_mnist(folder, method, losses, projection=0.1, conditions=None, **environment):
    """A batched run with one loss per rate (None: diverged) at three seeds, which differ by 0.1."""
    path = folder / f"{method}-mnist"
    path.mkdir(parents=True)
    config = {
        "experiment": "rotated_mnist", "preset": "small", "method": {"name": method}, "rank": 4,
        "mlp_width": 32, "pretraining": {"hidden": 512}, "rates": MNIST_RATES, "seeds": [0, 1, 2],
    }  # fmt: skip
    shifts = (0.0, 0.1, -0.1)
    final = [[None if f is None else f + shift for shift in shifts] for f in losses]
    best = min((f, rate) for f, rate in zip(losses, MNIST_RATES) if f is not None)[1]
    metrics = {
        "final_loss": final,
        "test_accuracy": [[None if f is None else 1 - f / 8 for f in row] for row in final],
        "diverged": [[f is None for f in row] for row in final],
        "base_loss": 8.0, "best_rate": best, "low_rate": MNIST_RATES[1], "direct_best_rate": best,
        "adapter_parameters": 10, "trained_parameters": 10 if method == "lora" else 320,
        "train_images": 9000, "test_images": 1000, "train_seconds": 30.0,
        "peak_memory_bytes": 10**9,
    }  # fmt: skip
    if conditions:
        metrics["condition_numbers"] = conditions
    ends = projection + numpy.array(shifts)[:, None] / 100
    arrays = {
        name: numpy.stack([ends * numpy.ones(4)] * 2)
        for name in ("projection", "gradient_norm", "top_eigenvalue")
    }
    line = numpy.linspace(-1, 1, 4)
    for which in ("best", "low"):
        arrays |= {f"{which}_x": line, f"{which}_y": line, f"{which}_explained": numpy.array(0.9)}
        arrays[f"{which}_loss"] = 1 + line[:, None] ** 2 + line**2
        arrays[f"{which}_paths"] = numpy.zeros((2, 3, 2))
    numpy.savez(path / "curves.npz", curvature_steps=numpy.arange(4), **arrays)
    return write(path, config, metrics, environment)


def store_commonsense(
    folder,
    method,
    lr,
    seed,
    validation,
    nll=None,
    preset="small",
    dtype="float32",
    **environment,
):
    path = folder / f"{preset}-{dtype}-{method}-{lr}-{seed}-{nll is not None}"
    path.mkdir(parents=True)
    config = {
        "experiment": "commonsense", "preset": preset, "method": {"name": method}, "lr": lr,
        "seed": seed, "rank": 8, "mlp_width": 32, "model": {"dtype": dtype},
        "score_test": nll is not None,
    }  # fmt: skip
    mlp = 320 * method.startswith("op")
    metrics = {
        "validation_nll": validation, "validation_loss": [[10, 4.0], [20, validation]],
        "trained_parameters": mlp or 10, "adapter_parameters": 10, "train_seconds": 5.0,
        "mlp_parameters": mlp, "peak_memory_bytes": 2_000_000_000,
    }  # fmt: skip
    if nll is not None:
        metrics |= {"held_out_nll": nll, "accuracy": 0.5, "accuracy_piqa": 0.5}
        rows = [
            {"id": f"i{k}", "task": "piqa", "answer": 0, "correct": k % 2 == 0,
             "logprobs": [-nll * (k + 1), -9.0], "tokens": [k + 1, 2]}
            for k in range(4)
        ]  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (path / "predictions.jsonl").write_text(text)
    return write(path, config, metrics, environment)


def store_vl_bart(
    folder, method, lr, seed, loss, accuracy=None, width=None, preset="small", **environment
):
    """A run whose three accuracies are `accuracy`, on two items a task."""
    width = width or USUAL.get(method, 32)
    path = folder / f"{preset}-{method}-{lr}-{seed}-{width}-{accuracy is not None}"
    path.mkdir(parents=True)
    config = {
        "experiment": "vl_bart", "preset": preset, "method": {"name": method}, "lr": lr,
        "seed": seed, "rank": 8, "mlp_width": width, "widths": USUAL,
        "score_test": accuracy is not None,
    }  # fmt: skip
    epochs = [[0, {MAIN: 0.25}], [1, {MAIN: 0.5 + seed / 100}]]
    mlp = 320 * method.startswith("op")
    metrics = {
        "validation_loss": [[5, 1.0], [10, loss]], "epochs": epochs, "adapter_parameters": 10,
        "mlp_parameters": mlp, "trained_parameters": 40 + (mlp or 10),
        "train_seconds": 5.0, "peak_memory_bytes": 2_000_000_000,
    }  # fmt: skip
    if accuracy is not None:
        names = ("vqa_accuracy", "gqa_accuracy", "nlvr_accuracy", MAIN)
        metrics |= dict.fromkeys(names, accuracy)
        metrics |= {"cider": 1.2, "average": (3 * accuracy + 1.2) / 4}
        rows = [
            {"id": f"{task}/{n}", "task": task, "prediction": "x", "score": accuracy}
            for task in ("vqa", "gqa", "nlvr") for n in range(2)
        ] + [{"id": "caption/0", "task": "caption", "prediction": "a circle"}]  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (path / "predictions.jsonl").write_text(text)
    return write(path, config, metrics, environment)


def distance(value):
    return {"mmd": value, "mmd_low": value - 0.1, "mmd_high": value + 0.1}


def store_sdxl(
    folder,
    method,
    lr,
    seed,
    loss,
    value=None,
    rank=4,
    dataset="fluent",
    fine_tune=True,
    preset="small",
    **environment,
):
    path = folder / f"{dataset}-{method}-{rank}-{lr}-{seed}-{value is not None}-{fine_tune}"
    path.mkdir(parents=True)
    config = {
        "experiment": "sdxl", "preset": preset, "method": {"name": method}, "lr": lr,
        "seed": seed, "rank": rank, "mlp_width": 32, "dataset": {"name": dataset},
        "distance": {"name": "mmd"}, "fine_tune": fine_tune,
        "measure": value is not None,
    }  # fmt: skip
    metrics = {}
    if fine_tune:
        mlp = 32 * rank * method.startswith("op")
        metrics |= {
            "validation_loss": [[10, 1.0], [20, loss]], "trained_parameters": mlp or rank,
            "adapter_parameters": rank, "mlp_parameters": mlp,
            "train_seconds": 5.0, "peak_memory_bytes": 2_000_000_000,
        }  # fmt: skip
    if value is not None:
        metrics |= {"images": distance(value), "captions": ["a cat"]}
        metrics |= {"snapshots": {"100": distance(value), "50": distance(value + 1)}}
        for name in ("samples", "reference"):
            Image.new("RGB", (8, 8)).save(path / f"{name}.png")
    if not fine_tune:
        own = {"floor": 0.02, "gap": distance(0.5), "base": distance(0.3)}
        metrics["yardsticks"] = own
    return write(path, config, metrics, environment)


def store_glue(
    folder, task, method, lr, seed, loss, score=None, preset="small", fine_tune=True, **environment
):
    """A run whose first rows of ten are right; of STS-B all predictions are off by `loss`."""
    path = folder / f"{preset}-{task}-{method}-{lr}-{seed}-{score is not None}-{fine_tune}"
    path.mkdir(parents=True)
    metrics_of = {"cola": ("matthews", "accuracy"), "mrpc": ("accuracy", "f1"),
                  "stsb": ("pearson", "spearman")}.get(task, ("accuracy",))  # fmt: skip
    config = {
        "experiment": "glue", "preset": preset, "method": {"name": method}, "lr": lr, "seed": seed,
        "rank": 8, "mlp_width": 32, "direct_lr": 1e-3, "fine_tune": fine_tune,
        "score_test": score is not None,
        "task": {"name": task, "metrics": {name: {} for name in metrics_of}},
    }  # fmt: skip
    metrics = {"peak_memory_bytes": 2_000_000_000}
    if fine_tune:
        mlp = 320 * method.startswith("op")
        metrics |= {
            "validation_loss": [[10, 0.7], [20, loss]], "adapter_parameters": 10,
            "mlp_parameters": mlp, "trained_parameters": 40 + (mlp or 10), "train_seconds": 5.0,
        }  # fmt: skip
    else:
        metrics["validation_loss"] = [[0, loss]]
    if score is not None:
        metrics |= {"score": score, "test_loss": loss, **dict.fromkeys(metrics_of, score)}
        metrics |= {} if task == "stsb" else {"majority": 0.6}
        right = [n < 10 * score for n in range(10)]
        rows = [
            {"id": f"{task}/{n}", "label": n / 2, "prediction": n / 2 + loss, "loss": loss}
            if task == "stsb"
            else {"id": f"{task}/{n}", "label": 1, "prediction": int(right[n]), "loss": loss}
            for n in range(10)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (path / "predictions.jsonl").write_text(text)
    return write(path, config, metrics, environment)
