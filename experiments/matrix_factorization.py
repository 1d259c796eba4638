"""Matrix factorization (section 4.1, Figures 2-4): all learning rates and seeds of a method."""

import time

import numpy
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from oplora.harness.entry import experiment
from oplora.harness.runs import open_run, peak_memory_bytes
from oplora.studies.matrix_factorization.factorization import factorize


@experiment("matrix_factorization")
def main(cfg: DictConfig) -> None:
    torch.set_num_threads(cfg.runtime.threads)
    torch.set_flush_denormal(True)
    if "factorization" not in cfg.method:
        raise ValueError(
            f"method={cfg.method.name} is an adapter: choose mf, opmf, opmf_text, mf_matched, "
            "mf_mlp_start or mf_matched_mlp_start"
        )
    problem, rule = instantiate(cfg.problem), instantiate(cfg.optimizer.rule)
    ours = OmegaConf.is_interpolation(cfg, "rates")
    if ours and cfg.problem.loss == "frobenius" and rule.func.follows_scale:
        # the grids are of the mean: the sum's gradient is that many times as large
        cfg.rates = [rate / (cfg.problem.rows * cfg.problem.columns) for rate in cfg.rates]
    config = OmegaConf.to_container(cfg, resolve=True)
    if not isinstance(config["seeds"], list) or not isinstance(config["rates"], list):
        raise ValueError(f"seeds={cfg.seeds} and rates={cfg.rates} must be lists, as in [0,1]")
    with open_run(config) as run:
        if run.finished:
            print(f"{run.path} is finished already")
            return
        start = time.perf_counter()
        metrics, curves = factorize(
            problem,
            config["seeds"],
            config["rates"],
            method=cfg.method.factorization,
            initial_A=cfg.method.initial_A,
            rule=rule,
            progress=cfg.run_name,
            **cfg.mlp,
        )
        metrics["train_seconds"] = round(time.perf_counter() - start, 1)
        arrays = {name: value.numpy() for name, value in curves.items()}
        numpy.savez_compressed(run.path / "curves.npz", **arrays)
        run.finish(metrics | {"peak_memory_bytes": peak_memory_bytes()})
        print(f"{run.path}: {metrics['train_seconds']} s")


if __name__ == "__main__":
    main()
