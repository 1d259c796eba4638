"""Every method of configs/method on every family of models; a new one needs no edit here."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from tiny_models import FAMILIES

import oplora
from oplora.harness.dry_run import mlp_of
from oplora.harness.methods import apply_method

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PROMPTS = ("prompt", "residual_prompt", "opprompt")  # of language models alone: test_prompt.py
# Methods of the matrix factorization study have no adapter.
METHODS = sorted(
    path.stem
    for path in (CONFIGS / "method").glob("*.yaml")
    if "factorization:" not in path.read_text() and path.stem not in PROMPTS
)
# Methods of which PEFT's part works on a PeftModel alone; diffusers models are adapted in place.
NEEDS_PEFT_MODEL = ("lorafa", "adalora", "vera", "opvera", "eva", "opeva", "rosa")

ConfigStore.instance().store(
    "any_experiment",
    dict(
        defaults=[{"optimizer": "adamw"}, {"method": "lora"}, "_self_"],
        rank=4,
        alpha=8,
        dropout=0.0,
        target_modules=["q_proj"],
        lr=1e-3,
        weight_decay=0.01,
        mlp_width=8,
        seed=0,
        total_steps=10,
    ),
)


def method(name, family=FAMILIES["decoder"], **choices):
    overrides = [f"{group}={choice}" for group, choice in choices.items()]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("any_experiment", [f"method={name}", *overrides])
    cfg.target_modules = family.targets
    return cfg.method


def train(family, model, optimizer, steps=2):
    family.train(model, optimizer, steps)
    return family.loss(model).item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_every_family(name, family):
    refused = family == "unet" and name in NEEDS_PEFT_MODEL
    family = FAMILIES[family]
    rate = {"lr": "0.1"} if name == "altlora" else {}  # its steps are as small as gradients
    cfg = method(name, family, **rate)
    assert cfg.name == name
    base = family.build()
    if refused:
        with pytest.raises(ValueError, match="not for diffusers models"):
            apply_method(base, cfg, batches=[family.batch] * 2)
        return
    with torch.no_grad():
        before, first = family.output(base), family.loss(base).item()
    loss = lambda model, batch: family.loss(model)  # noqa: E731
    model, create_optimizer = apply_method(base, cfg, [family.batch] * 2, loss=loss)
    optimizer = create_optimizer(model.eval())
    assert (getattr(optimizer, "mlp_parameters", 0) > 0) is (mlp_of(cfg) != "none")
    with torch.no_grad():
        moved = (family.output(model) - before).abs().max().item()
        assert (moved <= 2e-6) is (name != "lora_one")  # which begins a step away
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} <= {id(p) for g in optimizer.param_groups for p in g["params"]}
    total = sum(p.numel() for p in model.parameters())
    assert (sum(p.numel() for p in trained) == total) is (name == "full")
    assert train(family, model, optimizer) < first


@pytest.mark.parametrize(
    "optimizer, cls",
    [("adamw", "AdamW"), ("prodigy", "Prodigy"), ("schedulefree", "AdamWScheduleFree")],
)
def test_optimizers_of_plain_lora(optimizer, cls):
    family = FAMILIES["decoder"]
    model, create_optimizer = apply_method(family.build(), method("lora", optimizer=optimizer))
    made = create_optimizer(model.eval())
    assert type(made).__name__ == cls
    first = family.loss(model).item()
    if hasattr(made, "train"):
        made.train()
    assert train(family, model, made, steps=3) < first


def test_op_keeps_what_prodigy_learns_about_the_rate():
    family = FAMILIES["decoder"]
    model, create_optimizer = apply_method(family.build(), method("oplora", optimizer="prodigy"))
    optimizer = create_optimizer(model.eval())
    first = optimizer.param_groups[0]["d"]
    train(family, model, optimizer, steps=10)
    assert optimizer.param_groups[0]["d"] == optimizer.inner.param_groups[0]["d"] > 10 * first


def test_op_refuses_schedule_free_optimizers():
    cfg = method("oplora", optimizer="schedulefree")
    model, create_optimizer = apply_method(FAMILIES["decoder"].build(), cfg)
    with pytest.raises(ValueError, match="AdamWScheduleFree"):
        create_optimizer(model)


def test_any_adapter_has_an_op_form():
    cfg = method("ia3", **{"method/create_optimizer": "op"})
    model, create_optimizer = apply_method(FAMILIES["decoder"].build(), cfg)
    assert isinstance(create_optimizer(model), oplora.OPAdamW)


def test_settings_reach_the_optimizer():
    cfg = method(
        "oplora",
        **{"lr": "0.02", "mlp_width": "5", "seed": "3", "method.create_optimizer.z_dim": "7"},
    )
    model, create_optimizer = apply_method(FAMILIES["decoder"].build(), cfg)
    optimizer = create_optimizer(model)
    group = optimizer.param_groups[0]
    assert [group[k] for k in ("lr", "mlp_width", "seed", "z_dim")] == [0.02, 5, 3, 7]
    assert group["weight_decay"] == 0.01 and tuple(group["betas"]) == (0.9, 0.999)
    assert model.peft_config["default"].r == 4 and model.peft_config["default"].lora_alpha == 8


def test_adalora_prunes_to_the_rank():
    family = FAMILIES["decoder"]
    model, create_optimizer = apply_method(family.build(), method("adalora"))
    layers = [m for m in model.modules() if hasattr(m, "lora_E") and m.lora_E]
    assert {len(layer.lora_E["default"]) for layer in layers} == {6}
    train(family, model, create_optimizer(model.train()), steps=10)
    kept = sum(int(layer.lora_E["default"].count_nonzero()) for layer in layers)
    assert kept == 4 * len(layers)


def test_adalora_needs_an_optimizer_that_counts_steps():
    cfg = method("adalora", optimizer="schedulefree")
    model, create_optimizer = apply_method(FAMILIES["decoder"].build(), cfg)
    with pytest.raises(ValueError, match="AdamWScheduleFree"):
        create_optimizer(model)


@pytest.mark.parametrize("name", ["lora_ga", "eva"])
def test_methods_that_need_data_say_so(name):
    with pytest.raises(ValueError, match="batches"):
        apply_method(FAMILIES["decoder"].build(), method(name))


@pytest.mark.parametrize(
    ("name", "composed", "mlp"),
    [
        ("lora", "plain", "none"),
        ("oplora_lite", "op_lite", "lite"),
        ("lora_matched", "control", "full"),
        ("lora_mlp_start", "control", "none"),  # it knows a width, and trains no MLP
        ("dora", "op", "full"),  # the composed form of opdora
    ],
)
def test_the_dry_run_knows_what_predicts_the_adapter(name, composed, mlp):
    chosen = method(name, **{"method/create_optimizer": composed})
    assert mlp_of(chosen) == mlp
