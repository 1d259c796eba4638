"""On a GPU the optimizers take the CPU's steps; mixed precision with a gradient scaler on both."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import DECODER, adapted
from torch import nn

import oplora
from oplora.peft import create_oplora_lite_optimizer
from oplora.rank1 import rank1_adamw_

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def layers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5)).double()
    return get_peft_model(net, LoraConfig(r=4, target_modules=["0", "2"], use_dora=True))


def train(net, optimizer, steps=15):
    x = torch.linspace(-1, 1, 48, dtype=torch.float64).view(6, 8).to(next(net.parameters()).device)
    for _ in range(steps):
        optimizer.zero_grad()
        (net(x) - 1).square().mean().backward()
        optimizer.step()


FORMS = {
    "fast": dict(create=oplora.create_oplora_optimizer, weight_decay=0.1),
    "clipped": dict(create=oplora.create_oplora_optimizer, clip="mlp", max_norm=0.05),
    "generic": dict(create=oplora.create_oplora_optimizer, optimizer_cls=torch.optim.RMSprop),
    "lite": dict(create=create_oplora_lite_optimizer, weight_decay=0.1),
}


@needs_gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("moved_after", [False, True], ids=["built there", "moved there"])
def test_training_equals_the_cpus(form, moved_after):
    options = dict(FORMS[form])
    create = options.pop("create")
    here, there = layers(), layers()
    make = lambda net: create(net, lr=0.01, mlp_width=16, **options)  # noqa: E731
    if moved_after:
        optimizer = make(there)
        there.cuda()
    else:
        optimizer = make(there.cuda())
    train(here, make(here))
    train(there, optimizer)
    assert all(state.is_cuda for stack in optimizer.stacks for state in stack.held())
    for (name, expected), (_, found) in zip(here.named_parameters(), there.named_parameters()):
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-11, msg=name)


@needs_gpu
def test_rank1_update_is_bit_identical_to_fused_adamw(monkeypatch):
    monkeypatch.setattr("oplora.rank1.SCRATCH_OTHERWISE", 4096)  # several pieces
    torch.manual_seed(0)
    W = nn.Parameter(torch.randn(31, 640, device="cuda"))
    ours, m, v = W.detach().clone(), torch.zeros_like(W), torch.zeros_like(W)
    options = dict(lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    fused = torch.optim.AdamW([W], fused=True, **options)
    step = torch.zeros((), device="cuda")
    for _ in range(5):
        h, g = torch.randn(31, device="cuda"), torch.randn(640, device="cuda")
        W.grad = torch.outer(h, g)
        fused.step()
        step += 1
        rank1_adamw_(ours, m, v, h, g, step, **options)
        assert torch.equal(ours, W)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_with_a_gradient_scaler(dtype, device):
    model = adapted().to(device).train()
    batch = {name: tensor.to(device) for name, tensor in DECODER.batch.items()}
    optimizer = oplora.create_oplora_optimizer(model, lr=1e-3)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40, enabled=dtype is torch.float16)
    before = copy.deepcopy(optimizer.state_dict())
    losses, skipped = [], 0
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:  # the gradient overflowed: nothing may change
            skipped += 1
            after = optimizer.state_dict()
            for mine, old in zip(after["state"].values(), before["state"].values()):
                assert all(torch.equal(mine["mlp"][name], old["mlp"][name]) for name in mine["mlp"])
        before = copy.deepcopy(optimizer.state_dict())
        losses.append(loss.item())
    assert (skipped > 0) == (dtype is torch.float16)
    assert losses[-1] < losses[0] - 0.1


@needs_gpu
def test_a_checkpoint_of_the_gpu_resumes_on_it_exactly(tmp_path):
    net = layers().cuda()
    optimizer = oplora.create_oplora_optimizer(net, lr=0.01)
    train(net, optimizer, 5)
    torch.save([net.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    train(net, optimizer, 5)
    again = layers().cuda()
    resumed = oplora.create_oplora_optimizer(again, lr=0.01)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True, map_location="cpu")
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(again, resumed, 5)
    for expected, found in zip(net.parameters(), again.parameters()):
        assert torch.equal(found, expected)
