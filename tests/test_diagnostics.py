"""What the MLPs do, by autograd and by hand; the callback, which only looks on; its figure."""

import ast
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from stored_runs import store_commonsense
from test_trainer import adapter, arguments, data, model
from tiny_blocks import WIDTH, blocks, losses, starts
from tiny_models import adapted, train

import oplora
from oplora.diagnostics import Diagnostics, diagnose
from oplora.harness import finetuning
from oplora.harness.methods import OptimizerFactory
from oplora.harness.runs import DIAGNOSTICS, identity, load_runs
from oplora.mlp import AdapterMLP, generator_for
from oplora.report.diagnostics import layer_type
from oplora.studies.commonsense.report import EXPERIMENT

ROOT = Path(__file__).resolve().parent.parent


def by_autograd(mlps):
    """The numbers of in-graph MLPs from a step of SGD on W2 and b2, and one on h."""
    hs = [mlp.hidden().detach().requires_grad_() for mlp in mlps]
    for mlp, h in zip(mlps, hs):
        mlp.hidden = lambda h=h: h
    leaves = [leaf for mlp, h in zip(mlps, hs) for leaf in (mlp.W2, mlp.b2, h)]
    gradients = iter(torch.autograd.grad(losses([mlp() for mlp in mlps]), leaves))
    found = []
    for mlp, h in zip(mlps, hs):
        dW2, db2, dh = (next(gradients) for _ in range(3))
        plain = ((mlp.W2 + dW2) @ h + mlp.b2 + db2 - (mlp.W2 @ h + mlp.b2)).norm().item()
        on = h > 0
        line = (mlp.W2[:, on] @ dh[on]).norm().item()
        found.append(
            {
                "h_squared": sum(x**2 for x in h.tolist()),
                "multiplier": 1 + sum(h.tolist()),
                "units_on": int(on.sum()),
                "line_search_share": line / (line + plain),
            }
        )
    return found


@pytest.mark.parametrize("form", [oplora.OPAdamW, oplora.OPOptimizer])
@pytest.mark.parametrize("init", ["author", "text"])
def test_the_numbers_are_autograds(form, init):
    start, chosen = blocks(), starts("paper")
    mlps = [
        AdapterMLP(t, WIDTH, s, init=init, generator=generator_for(0, f"group 0 tensor {b}.0"))
        for b, (t, s) in enumerate(zip(start, chosen))
    ]
    optimizer = form(start, lr=0.003, mlp_width=WIDTH, start=chosen, init=init)
    reference = torch.optim.AdamW([p for mlp in mlps for p in mlp.parameters()], lr=0.003)
    for _ in range(4):  # B is zero at first, and then there is no line search
        for values, each in ((start, optimizer), ([mlp() for mlp in mlps], reference)):
            each.zero_grad()
            losses(values).backward()
            each.step()
    optimizer.zero_grad()
    losses(start).backward()
    found, expected = diagnose(optimizer), by_autograd(mlps)
    assert [row.pop("name") for row in found] == [f"group 0 tensor {b}.0" for b in range(3)]
    for row, right in zip(found, expected, strict=True):
        assert row == pytest.approx(right, rel=1e-9)
        assert 0.001 < right["line_search_share"] < 0.999 and 0 < right["units_on"] < WIDTH


def test_the_share_does_not_see_the_gradients_scale_and_is_none_without_one():
    start = blocks(torch.float32, "keep")
    optimizer = oplora.OPAdamW(start, mlp_width=WIDTH)
    losses(start).backward()
    before = [row["line_search_share"] for row in diagnose(optimizer)]
    for tensor in (t for block in start for t in block):
        tensor.grad *= 2.0**16  # as fp16's GradScaler leaves it until the step
    after = [row["line_search_share"] for row in diagnose(optimizer)]
    assert after == pytest.approx(before, rel=1e-6) and min(before) > 0
    start[0][0].grad[0, 0] = torch.nan
    for tensor in start[1]:
        tensor.grad = None
    rows = diagnose(optimizer)
    assert [row["line_search_share"] for row in rows[:2]] == [None, None]
    assert rows[2]["line_search_share"] == after[2] and rows[1]["multiplier"] > 1


def test_lite_keeps_no_rows_to_look_at():
    start = blocks()
    rows = diagnose(oplora.OPAdamW(start, lite=True, mlp_width=WIDTH))
    whole = diagnose(oplora.OPAdamW(blocks(), mlp_width=WIDTH))
    for row, exact in zip(rows, whole, strict=True):
        assert exact.pop("line_search_share") is None  # no gradient
        assert row == exact


def test_of_a_learned_scale_it_is_s():
    net = adapted(modules_to_save=["lm_head"])
    optimizer = oplora.create_scale_optimizer(net, lr=1e-4)
    assert {row["multiplier"] for row in diagnose(optimizer)} == {1.0}
    train(net, optimizer, 5)
    rows = diagnose(optimizer)
    states = {name: optimizer.state[p] for name, p in net.named_parameters() if p.requires_grad}
    assert {row["name"] for row in rows} == {name for name in states if "lora_A" in name}
    for row in rows:
        assert row.keys() == {"name", "multiplier"}
        assert row["multiplier"] == pytest.approx(states[row["name"]]["log_scale"].exp().item())
    assert max(row["multiplier"] for row in rows) > 1.1


def test_what_has_neither_mlps_nor_scales_is_refused(tmp_path):
    plain = lambda net: torch.optim.AdamW(p for p in net.parameters() if p.requires_grad)  # noqa: E731
    words = "AdamW has neither MLPs nor learned scales to diagnose: use OPAdamW"
    with pytest.raises(ValueError, match=words):
        diagnose(plain(model()))
    with pytest.raises(ValueError, match="OPAdamW has neither"):
        diagnose(oplora.OPAdamW(blocks(), mlp_width=0))
    with pytest.raises(ValueError, match=words):  # before the first step
        trained(tmp_path, tmp_path / "d", optimizer_factory=plain)
    assert not (tmp_path / "d").exists()


def trained(folder, path=None, resume=None, optimizer_factory=None, **options):
    """The trained adapter of a tiny model, and the callback's history; path: of its file."""
    looking_on = [Diagnostics(path)] if path else []
    trainer = oplora.OPTrainer(
        model(),
        arguments(folder, logging_steps=2, **options),
        train_dataset=data(),
        callbacks=looking_on,
        optimizer_factory=optimizer_factory,
    )
    trainer.train(resume_from_checkpoint=resume)
    return adapter(trainer), looking_on[0].history if path else None


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


FORMS = {
    "active": oplora.create_oplora_optimizer,
    "every": partial(oplora.create_oplora_optimizer, optimizer_cls=torch.optim.SGD),
    "lite": partial(oplora.create_oplora_optimizer, lite=True),
    "scale": oplora.create_scale_optimizer,
}


@pytest.mark.parametrize("form", FORMS)
def test_training_does_not_notice(form, tmp_path):
    options = dict(gradient_accumulation_steps=2, optimizer_factory=partial(FORMS[form], lr=3e-3))
    path = tmp_path / "new" / DIAGNOSTICS
    without, _ = trained(tmp_path, **options)
    with_it, history = trained(tmp_path, path, **options)
    assert all(torch.equal(without[name], with_it[name]) for name in without)
    assert [entry["step"] for entry in history] == [1, 2, 4, 6]
    assert entries(path) == history
    assert all(len(entry["blocks"]) == 6 for entry in history)
    if form == "active":
        first, *_, last = (e["blocks"][0]["line_search_share"] for e in history)
        assert first == 0 and last > 0  # a zero B gives the trunk nothing to go along


def test_after_a_resume_it_goes_on(tmp_path):
    options = dict(save_strategy="steps", save_steps=3)
    path = tmp_path / DIAGNOSTICS
    _, whole = trained(tmp_path / "run", path, **options)
    written = path.read_text()
    third = written.splitlines(keepends=True)[2]  # of step 4, which the checkpoint does not know
    path.write_text(written[: written.index(third) + len(third)] + '{"step": 6, "blo')
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    _, resumed = trained(tmp_path / "run", path, resume=checkpoint, **options)
    assert resumed == whole and path.read_text() == written
    _, afresh = trained(tmp_path / "run", path, **options)
    assert afresh == whole and path.read_text() == written


def test_a_run_with_diagnostics_is_the_same_run(tmp_path):
    training = dict(
        _target_="transformers.TrainingArguments", max_steps=2, report_to="none", use_cpu=True,
        save_strategy="no", logging_steps=2,
    )  # fmt: skip
    factory = OptimizerFactory(partial(oplora.create_oplora_optimizer, lr=1e-3))
    for wanted in (False, True):
        run = SimpleNamespace(path=tmp_path)
        options = dict(diagnostics=wanted, train_dataset=data())
        finetuning.train(model(), factory, OmegaConf.create(training), run, **options)
        assert (tmp_path / DIAGNOSTICS).exists() == wanted
    assert [entry["step"] for entry in entries(tmp_path / DIAGNOSTICS)] == [1, 2]
    config = {"lr": 1e-3, "seed": 0}
    assert identity(config) == identity(config | {"diagnostics": True}) == identity(config)
    assert identity(config) != identity(config | {"seed": 1})


TRAINS = {  # where an experiment calls `train`, if not in its script
    "sdxl": "oplora/studies/sdxl/training.py",
    "subjects": "oplora/studies/sdxl/training.py",
}


@pytest.mark.parametrize(
    "name", ["commonsense", "glue", "llava_cars", "sdxl", "subjects", "vl_bart"]
)
def test_every_fine_tuning_experiment_has_the_switch(name):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        assert compose(name).diagnostics is False
    path = ROOT / TRAINS.get(name, f"experiments/{name}.py")
    script = ast.parse(path.read_text(encoding="utf-8"))
    calls = [n for n in ast.walk(script) if isinstance(n, ast.Call)]
    (call,) = [n for n in calls if getattr(n.func, "id", "") == "train"]
    assert "diagnostics=cfg.diagnostics" in map(ast.unparse, call.keywords)


def stored(folder, method, lr, shares):
    """A run of two layers of q_proj and one of v_proj: multipliers 2, 4 and 8 times the step."""
    path = store_commonsense(folder, method, lr, 0, 3.2)
    names = [f"m.layers.{n}.self_attn.{kind}.lora_A.default.weight" for n, kind in
             ((0, "q_proj"), (1, "q_proj"), (0, "v_proj"))]  # fmt: skip
    lines = []
    for step in (1, 5):
        rows = [{"name": name, "multiplier": step * m} for name, m in zip(names, (2.0, 4.0, 8.0))]
        if shares:
            rows = [row | {"line_search_share": s} for row, s in zip(rows, (0.25, 0.75, None))]
        lines.append(json.dumps({"step": step, "blocks": rows}) + "\n")
    (path / DIAGNOSTICS).write_text("".join(lines))
    return path


def figures(root):
    parts = EXPERIMENT.read(load_runs(root)[0]).section().parts
    return [part for part in parts if getattr(part, "name", "").endswith("_diagnostics")]


def test_the_report_draws_them_by_type_of_layer(tmp_path):
    store_commonsense(tmp_path, "lora", 1e-3, 0, 3.3)
    assert figures(tmp_path) == []
    stored(tmp_path, "oplora", 1e-4, shares=True)
    stored(tmp_path, "scale", 1e-5, shares=False)
    (figure,) = figures(tmp_path)
    assert figure.name == "commonsense_small_float32_diagnostics"
    assert "OP-LoRA at 0.0001" in figure.caption and "at 1e-05" in figure.caption
    top, bottom = figure.drawing.axes[:2], figure.drawing.axes[2:]
    assert [axis.get_title() for axis in top] == ["q_proj", "v_proj"]
    drawn = [[line.get_xydata().tolist() for line in axis.lines] for axis in (*top, *bottom)]
    assert drawn == [[[[1, 3], [5, 15]]] * 2, [[[1, 8], [5, 40]]] * 2, [[[1, 0.5], [5, 0.5]]], []]
    (band,) = bottom[0].collections
    assert {y for _, y in band.get_paths()[0].vertices.tolist()} == {0.25, 0.75}
    (legend,) = figure.drawing.legends
    assert len(legend.get_texts()) == 2
    assert figures(tmp_path)[0].data == figure.data


def test_runs_at_other_rates_and_numbers_that_nobody_has_are_not_drawn(tmp_path):
    stored(tmp_path, "oplora_lite", 1e-4, shares=False)
    worse = stored(tmp_path, "oplora_lite", 1e-2, shares=False)
    metrics = json.loads((worse / "metrics.json").read_text())
    metrics |= {"validation_nll": 9.0, "validation_loss": [[10, 9.0]]}
    (worse / "metrics.json").write_text(json.dumps(metrics))
    (figure,) = figures(tmp_path)
    assert "at 0.0001" in figure.caption and "at 0.01" not in figure.caption
    assert len(figure.drawing.axes) == 2


@pytest.mark.parametrize(
    "name, layer",
    [
        ("base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight", "q_proj"),
        ("down_blocks.0.attentions.0.to_out.0.lora_A.default.weight", "to_out"),
        ("model.layers.0.mlp.up_proj.vera_lambda_b.default", "up_proj"),
        ("A", "A"),
    ],
)
def test_the_type_of_a_layer_is_its_last_word(name, layer):
    assert layer_type(name) == layer
