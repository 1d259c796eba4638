"""RoSA against its definition, its resume, and what stock PEFT makes of its two adapters."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import in_another_process
from test_relatives import FAMILY, factors, fit, loss_of, tiny
from tiny_models import adapted, output, train

from oplora.baselines.rosa import create_rosa_optimizer

STOCK_USER = """
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

base, path = sys.argv[1:]
batch, model = load_file(base + "/batch.safetensors"), LlamaForCausalLM.from_pretrained(base)
model = PeftModel.from_pretrained(model, path + "/sparse").merge_and_unload()
model = PeftModel.from_pretrained(model, path).eval()
with torch.no_grad():
    outputs = {path: model(**batch).logits}
    outputs[path + " merged"] = model.merge_and_unload()(**batch).logits
assert not any(name.split(".")[0] == "oplora" for name in sys.modules)
save_file(outputs, base + "/outputs.safetensors")
"""


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_lockstep_with_a_dense_mask(micro_batches):
    """W0 + mask * S + s B A with S as dense as W; the mask from the third of twelve steps."""
    model, x, y = tiny()
    adam, warmup, count = dict(lr=0.02, weight_decay=0.1), 2, int(0.2 * 36)
    optimizer = create_rosa_optimizer(
        model, torch.optim.AdamW, density=0.2, warmup_steps=warmup, **adam
    )
    pairs, base = factors(model)
    base = [W.clone() for W in base]  # ours holds the sum
    twins = [[t.detach().clone().requires_grad_() for t in pair] for pair in pairs]
    S = [torch.zeros(6, 6).double().requires_grad_() for _ in twins]
    theirs = torch.optim.AdamW([t for twin in twins for t in twin] + S, **adam)
    masks = [torch.zeros(6, 6).double() for _ in twins]
    parts = list(zip(x.chunk(micro_batches), y.chunk(micro_batches)))
    for step in range(12):
        squares = [0, 0]
        optimizer.zero_grad()
        theirs.zero_grad()
        for inputs, targets in parts:
            (model(inputs) - targets).square().mean().backward()
            full = [
                (W + mask * dW).detach().requires_grad_() for W, mask, dW in zip(base, masks, S)
            ]
            weights = [W + 2 * B @ A for W, (A, B) in zip(full, twins)]
            loss_of(weights, inputs, targets).backward()
            squares = [before + W.grad**2 for before, W in zip(squares, full)]
            for dW, W, mask in zip(S, full, masks):
                if step > warmup:
                    dW.grad = (0 if dW.grad is None else dW.grad) + mask * W.grad
        optimizer.step()
        theirs.step()
        if step == warmup:
            for mask, square in zip(masks, squares):
                mask[square >= square.flatten().sort().values[-count]] = 1
            assert all(mask.sum() == count for mask in masks)
        for (A, B), twin, W, first, mask, dW in zip(
            pairs, twins, factors(model)[1], base, masks, S
        ):
            torch.testing.assert_close((A, B), tuple(twin), rtol=0, atol=1e-12)
            torch.testing.assert_close(W, first + mask * dW, rtol=0, atol=1e-12)
    assert all((dW * mask).abs().max() > 1e-3 for dW, mask in zip(S, masks))


def rosa(model, density=0.05, warmup_steps=1, **options):
    sizes = dict(density=density, warmup_steps=warmup_steps)
    return create_rosa_optimizer(model, torch.optim.AdamW, lr=1e-2, **sizes, **options)


@pytest.mark.parametrize("saved", [1, 4])
def test_resume_is_bit_identical_also_into_an_optimizer_that_went_on(saved):
    model = adapted()
    optimizer = rosa(model)
    train(model, optimizer, saved)
    state = copy.deepcopy(optimizer.state_dict())
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    train(model, optimizer, 4)
    expected = output(model)
    for other in (model, adapted()):
        other.load_state_dict(weights, strict=False)
        resumed = optimizer if other is model else rosa(other)
        resumed.load_state_dict(copy.deepcopy(state))
        train(other, resumed, 4)
        assert torch.equal(output(other), expected)


def test_the_base_is_frozen_and_has_no_gradient():
    model = adapted()
    optimizer = rosa(model)
    train(model, optimizer, 4)
    base = [p for n, p in model.named_parameters() if "lora_" not in n and "rosa" not in n]
    assert not any(p.requires_grad for p in base) and all(p.grad is None for p in base)
    assert all(p.any() for n, p in model.named_parameters() if "rosa" in n)


def test_a_base_in_half_precision_holds_the_rounded_sum():
    model = adapted().bfloat16()
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    before = {n: m.get_base_layer().weight.detach().clone() for n, m in layers.items()}
    train(model, rosa(model), 5)
    for name, layer in layers.items():
        W, sparse = before[name].float().flatten(), layer.sparse
        W[sparse.places] += sparse.values.detach()
        assert sparse.values.dtype == torch.float32 and sparse.values.all()
        assert torch.equal(sparse.weight.flatten(), W.bfloat16())


def test_stock_peft_loads_lora_and_sparse_part(tmp_path):
    expected, metrics = fit("rosa", tmp_path / "run")
    sparse = load_file(tmp_path / "run/adapter/sparse/adapter_model.safetensors")
    assert len(sparse) == 12 and any(
        value.any() for key, value in sparse.items() if "weight" in key
    )
    lora = sum(
        t.numel() for t in load_file(tmp_path / "run/adapter/adapter_model.safetensors").values()
    )
    count = sum(max(1, int(0.006 * size)) for size in 2 * [32 * 32, 32 * 32, 32 * 48])
    assert metrics["adapter_parameters"] == metrics["trained_parameters"] == lora + count
    FAMILY.build().save_pretrained(tmp_path)
    save_file(FAMILY.batch, tmp_path / "batch.safetensors")
    path = str(tmp_path / "run/adapter")
    outputs = in_another_process(STOCK_USER, tmp_path, [path])
    for name in (path, f"{path} merged"):
        assert (outputs[name] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("options", "words"),
    [(dict(density=0), "density=0"), (dict(density=0.1, warmup_steps=0.5), "warmup_steps=0.5")],
)
def test_wrong_sizes_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        rosa(adapted(), **options)


def test_a_training_that_is_too_short_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(
        fit.__globals__["OPTIONS"], "rosa", {"method.create_optimizer.warmup_steps": "9"}
    )
    with pytest.raises(ValueError, match="warmup_steps=9 leaves rosa none of 10 steps"):
        fit("rosa", tmp_path)
