"""The benchmark's subjects compute what their names say; its files and their tables."""

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from test_full_size_step import TINY
from transformers import LlamaConfig, LlamaForCausalLM

import oplora
from oplora.report import benchmarks

SCRIPTS = Path(__file__).parent.parent / "scripts"


def _script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # for the scripts that import it
    spec.loader.exec_module(module)
    return module


_script("full_size_step")
training = _script("benchmark_training")
orders = _script("benchmark_runlora")
_script("benchmark_batches")
benchmark = _script("benchmark")


def tiny() -> "training.Workload":
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, vocab_size=64)
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **sizes))
    tokens = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))
    targets = ["q_proj", "k_proj", "up_proj"]
    return training.Workload(model, targets, lambda m: m(input_ids=tokens, labels=tokens).loss)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """training_step.json and shapes.json of a tiny model."""
    folder = tmp_path_factory.mktemp("benchmarks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "ROUNDS", 2)
        patch.setattr(benchmark, "CASES", [("smollm2", 8, list(training.METHODS))])
        patch.setitem(training.WORKLOADS, "smollm2", tiny)
        memory = {name: 10 + i for i, name in enumerate(training.METHODS)}
        patch.setattr(benchmark, "peak_memory", lambda w, rank, name: memory[name])
        patch.setattr(benchmark, "triad", lambda: 1e9)
        patch.setattr(sys, "argv", ["benchmark.py", "training_step", "--out", str(folder)])
        threads = torch.get_num_threads()
        patch.setattr(sys, "argv", [*sys.argv, "--threads", str(threads)])
        assert benchmark.main() == 0
    return folder


def test_every_method_starts_at_the_same_loss_and_learns():
    workload = tiny()
    before = {name: p.detach().clone() for name, p in workload.model.named_parameters()}
    with torch.no_grad():
        first = workload.loss(workload.model)
    for method in training.METHODS:
        loss, optimizer = training.prepare(workload, 4, method)
        torch.testing.assert_close(loss(), first, msg=method)
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        for _ in range(5):
            training.timed_step(loss, optimizer)
        assert loss() < first, method
    for name, p in workload.model.named_parameters():
        assert torch.equal(p, before[name]), f"{name}: methods share what they do not train"


def test_the_form_in_the_graph_has_ours_parameters():
    _, ours = training.prepare(tiny(), 4, "oplora")
    _, theirs = training.prepare(tiny(), 4, "oplora_in_graph_fused")
    count = sum(p.numel() for group in theirs.param_groups for p in group["params"])
    assert count == ours.mlp_parameters


@pytest.mark.parametrize("name", ["llama_7b", "sdxl"])
def test_workloads_of_real_size_train(name, monkeypatch):
    """With few and small layers, which is all that differs."""
    llama = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, vocab_size=64)
    config = OmegaConf.create({"architecture": {"num_attention_heads": 2, **llama}})
    monkeypatch.setattr(training.OmegaConf, "load", lambda path: config)
    monkeypatch.setattr(training, "sdxl_unet", lambda: TINY)
    workload = training.WORKLOADS[name]()
    assert next(workload.model.parameters()).dtype == torch.bfloat16
    loss, optimizer = training.prepare(workload, 4, "oplora")
    before = [t.clone() for t in optimizer.stacks[0].tensors.flat]
    training.timed_step(loss, optimizer)
    assert any(not torch.equal(a, b) for a, b in zip(before, optimizer.stacks[0].tensors.flat))


def test_traffic_is_counted_by_hand():
    blocks = [[torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.zeros(5, 3))]]
    optimizer = oplora.OPAdamW(blocks, start="paper", mlp_width=8)
    (active,) = optimizer.stacks[0].rows.active
    assert 0 < active < 8
    assert benchmark.traffic_bytes(optimizer) == 28 * active * 27 + 44 * 27


def test_a_file_has_every_method_and_its_tables(results):
    (case,) = json.loads((results / "training_step.json").read_text())["cases"]
    assert list(case["methods"]) == list(training.METHODS)
    for row in case["methods"].values():
        assert row["optimizer_seconds"]["low"] <= row["optimizer_seconds"]["high"]
    assert case["methods"]["lora"]["step_over_lora"] == dict(median=1.0, low=1.0, high=1.0)
    section = benchmarks.section(results)
    tables = {part.name: part.frame for part in section.parts if not isinstance(part, str)}
    rows = tables["benchmark_smollm2_r8"]
    assert len(rows) == len(training.METHODS)
    assert rows["beyond LoRA, GB"].iloc[0] == "+0.00"


def test_aims_are_judged_by_their_numbers():
    def row(memory, optimizer, step, graph=1.0):
        return {
            "peak_memory_bytes": memory,
            "forward_backward_seconds": {"median": graph},
            "optimizer_seconds": {"median": optimizer},
            "step_over_lora": {"median": step},
        }

    methods = {
        "lora": row(100, 0.01, 1.0),
        "oplora": row(150, 0.1, 1.04),
        "oplora_in_graph_fused": row(200, 0.3, 1.4, graph=1.2),
        "lora_pro": row(100, 0.3, 1.2),
        "lora_rite": row(100, 0.05, 1.02),
        "scale": row(100, 0.02, 1.03),
    }
    case = dict(model="smollm2", rank=8, methods=methods, oplora_optimizer_over_limit=1.6)
    steps = {"ratio_to_op_adamw": {"in_graph_adamw_fused": 2.0, "in_graph_adamw_foreach": 5.0}}
    rows = benchmarks.aim_table([case, {**case, "model": "tiny_sdxl"}], steps)
    measured = ["1.040", "0.500", "1.600", "0.867", "1.020", "1.030", "0.500", "0.200"]
    assert [row.cells["measured"] for row in rows] == measured
    verdicts = ["reached", "reached", "missed", "reached", "missed", "missed", "missed", "reached"]
    assert [row.cells["verdict"] for row in rows] == verdicts


def test_costs_stand_beside_the_papers(results):
    (case,) = json.loads((results / "training_step.json").read_text())["cases"]
    rows = benchmarks.costs(case).frame.set_index("method")
    assert len(rows) == sum("in_graph" not in method for method in training.METHODS)
    lora, first = (case["methods"][m]["peak_memory_bytes"] for m in ("lora", "oplora"))
    assert rows.loc["OP-LoRA", "memory over LoRA's"] == f"{first / lora:.2f}"
    assert rows.loc["LoRA", "step over LoRA's"] == "1.00"
    assert rows.loc["LoRA-Pro", "paper: hours (over LoRA's)"] == "56 (16.00)"
    assert rows.loc["OP-LoRA", "paper: memory, GB (over LoRA's)"] == "69 (1.57)"
    assert rows.loc["DoRA"].isna().sum() == 2  # not in the paper's table


def test_runloras_table_has_every_layer_and_the_sum(monkeypatch, results):
    monkeypatch.setattr(orders, "LAYERS", {"a": (2, 3, 4, [(2, 8, 8), (1, 8, 4)])})
    calls_of, now = orders.calls_of, [0.0]  # a clock that the calls move

    def slow(*sizes):
        def taking(duration, call):
            now[0] += duration
            return call()

        return [partial(taking, *each) for each in zip((1.3, 1.0), calls_of(*sizes), strict=True)]

    def seconds(call):
        start = now[0]
        call()
        return now[0] - start

    monkeypatch.setattr(orders, "calls_of", slow)
    monkeypatch.setattr(orders, "seconds", seconds)
    found = orders.runlora()
    assert found["models"][0]["layers"][0]["order"] == {
        "y": "merged",
        "dx": "merged",
        "dA, dB": "rank",
    }
    assert found["models"][0]["peft_over_runlora"]["median"] == pytest.approx(1.3)
    table = benchmarks.orders(found)
    assert len(table.frame) == 3 and "the fewest multiplications saves 23%" in table.caption


def test_no_file_no_section(tmp_path):
    assert benchmarks.section(tmp_path) is None


def test_the_sweeps_line_is_exact_for_a_linear_cost(monkeypatch):
    def pretend(make, count, columns):
        blocks = benchmark._adapters(count, columns // 256, rank=8)
        optimizer = make(blocks)
        (stack,) = optimizer.stacks
        active = sum(n * p for n, p in zip(stack.rows.active, stack.tensors.sizes))
        optimizer.cost = 1e-3 + 2e-6 * sum(stack.tensors.sizes) + 3e-6 * active
        return optimizer.step

    monkeypatch.setattr(benchmark, "_in_optimizer", pretend)
    monkeypatch.setattr(benchmark, "seconds", lambda step: step.__self__.cost)
    found = benchmark.shapes()
    assert found["fit"]["seconds_per_adapter_value"] == pytest.approx(2e-6)
    assert found["fit"]["seconds_per_active_W2_value"] == pytest.approx(3e-6)
    assert found["r_squared"] == pytest.approx(1) and found["largest_relative_residual"] < 1e-6
    assert "R² 1.000" in benchmarks.linear_cost(found).caption
