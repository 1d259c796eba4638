"""Rotated MNIST (the second text's Figure 2, Table 5): all learning rates and seeds of a method."""

import copy
import time
from functools import partial

import numpy
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from oplora.harness.entry import experiment
from oplora.harness.methods import apply_method
from oplora.harness.runs import open_run, peak_memory_bytes
from oplora.studies.rotated_mnist import measures
from oplora.studies.rotated_mnist.digits import rotated
from oplora.studies.rotated_mnist.network import pretrained
from oplora.studies.rotated_mnist.training import Member, adapt

FACTORIES = (  # of the optimizers that the batch can follow
    "oplora.peft.create_plain_optimizer",
    "oplora.create_oplora_optimizer",
    "oplora.generators.create_generator_optimizer",
)


@experiment("rotated_mnist")
def main(cfg: DictConfig) -> None:
    torch.set_num_threads(cfg.runtime.threads)
    torch.set_flush_denormal(True)
    check(cfg)
    config = OmegaConf.to_container(cfg, resolve=True)
    rates, seeds = config["rates"], config["seeds"]
    with open_run(config) as run:
        if run.finished:
            print(f"{run.path} is finished already")
            return
        upright = instantiate(cfg.data)
        network = pretrained(*upright["train"], **cfg.pretraining)
        digits = {
            side: (rotated(images, cfg.rotation.largest, cfg.rotation.seed + i), labels)
            for i, (side, (images, labels)) in enumerate(upright.items())
        }
        members, direct = zip(*(starts(cfg, network, seed) for seed in seeds), strict=True)
        layers = members[0].layers
        train = partial(
            adapt,
            rates=rates,
            images=digits["train"][0],
            labels=digits["train"][1],
            optimizer=instantiate(cfg.optimizer),
            progress=cfg.run_name,
            **cfg.training,
        )
        begin = time.perf_counter()
        trained = train(members, seeds=seeds)
        seconds = round(time.perf_counter() - begin, 1)
        metrics = measures.final(trained, layers, digits)
        at = measures.chosen(rates, metrics["final_loss"], cfg.low)
        pieces = trained.losses.split(cfg.log_every, -1)
        arrays = {"loss": torch.stack([piece.mean(-1) for piece in pieces], -1)}
        if measures.has_hessian(layers):
            arrays |= measures.curvature(layers, trained, at, digits["train"], **cfg.curvature)
            conditions = measures.conditions(
                layers, trained, at[0], digits["train"], **cfg.condition_numbers
            )
            metrics |= {"condition_numbers": conditions}
        if not members[0].is_direct:  # beside the same adapter, trained directly
            other = train(direct[:1], seeds=seeds[:1])
            its_rates = measures.chosen(rates, measures.final(other, layers, digits)["final_loss"])
            runs = [(trained, at), (other, [its_rates[0], at[1]])]
            arrays |= measures.surfaces(layers, runs, digits["train"], **cfg.surface)
            metrics |= {"direct_best_rate": rates[its_rates[0]]}
        numpy.savez_compressed(
            run.path / "curves.npz", **{name: value.numpy() for name, value in arrays.items()}
        )
        run.finish(
            {name: measures.lists(value) for name, value in metrics.items()}
            | {
                "best_rate": rates[at[0]],
                "low_rate": rates[at[1]],
                "adapter_parameters": sum(theta.shape[-1] for theta in trained.thetas),
                "trained_parameters": trained.trained_parameters,
                "train_images": len(digits["train"][0]),
                "test_images": len(digits["test"][0]),
                "train_seconds": seconds,
                "peak_memory_bytes": peak_memory_bytes(),
            }
        )
        print(f"{run.path}: {seconds} s")


def check(cfg: DictConfig) -> None:
    """ValueError, before anything is loaded, for what this experiment cannot run."""
    if (factory := cfg.method.create_optimizer.create.path) not in FACTORIES:
        raise ValueError(
            f"method={cfg.method.name} trains by {factory}, which the batch cannot follow: choose "
            "lora, dora, oplora, opdora, oplora_text, or one of the generators"
        )
    if cfg.optimizer._target_ != "torch.optim.AdamW":
        raise ValueError(f"{cfg.optimizer._target_} has no batched form: use optimizer=adamw")
    for name, kinds in (("rates", int | float), ("seeds", int)):
        values = cfg[name]
        if not isinstance(values, ListConfig) or not all(
            isinstance(value, kinds) and value >= 0 for value in values
        ):
            raise ValueError(f"{name}={values} must be a list of numbers from 0, as in [0,1]")


def starts(cfg: DictConfig, network: nn.Module, seed: int) -> tuple[Member, Member]:
    """How the method starts with this seed, and how its adapter does where it is trained itself."""
    of_seed = OmegaConf.merge(cfg, {"seed": seed})
    torch.manual_seed(seed)
    model, create_optimizer = apply_method(copy.deepcopy(network), of_seed.method)
    direct = Member.direct(model)
    return Member.of(model, create_optimizer(model)), direct


if __name__ == "__main__":
    main()
