"""The controls: plain LoRA with OP-LoRA's step sizes, its first A, or both."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

import oplora
from oplora.baselines.controls import create_control_optimizer

OPTIONS = dict(mlp_width=8, lr=1e-2, weight_decay=0.0)
MLP = {"seed": 3, "z_dim": 16}


def model():
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 4))
    return get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"]))


def backward(net):
    torch.manual_seed(1)
    x, y = torch.randn(32, 6), torch.randn(32, 4)
    net.zero_grad()
    loss = ((net(x) - y) ** 2).mean()
    loss.backward()
    return loss.item()


def trained(net):
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def control(net, matched_steps, mlp_start):
    options = dict(matched_steps=matched_steps, mlp_start=mlp_start, mlp_options=MLP)
    return create_control_optimizer(net, torch.optim.AdamW, **options, **OPTIONS)


def values(net):
    return {name: p.detach().clone() for name, p in trained(net).items()}


@pytest.mark.parametrize("mlp_start", [False, True])
@pytest.mark.parametrize("matched", [False, True])
def test_first_a_is_loras_or_op_loras(matched, mlp_start):
    stock, op, ours = model(), model(), model()
    oplora.create_oplora_optimizer(op, **OPTIONS, **MLP)
    control(ours, matched, mlp_start)
    expected = values(op if mlp_start else stock)
    for name, value in values(ours).items():
        assert torch.equal(value, expected[name])
    assert any(not torch.equal(values(op)[n], values(stock)[n]) for n in expected)


def test_a_step_is_adamw_at_the_multiplied_rate_of_each_layer():
    ours, plain = model(), model()
    optimizer = control(ours, True, False)
    (stack,) = optimizer.stacks
    reference = torch.optim.AdamW([{"params": b} for b in _layers(plain)], fused=True)
    for _ in range(5):
        for group, h in zip(reference.param_groups, stack.h):
            group.update(lr=1e-2 * (1 + h.sum().item()), weight_decay=0.0)
        backward(ours)
        backward(plain)
        optimizer.step()
        reference.step()
        for mine, theirs in zip(trained(ours).values(), trained(plain).values()):
            assert torch.equal(mine, theirs)
    assert (1 + stack.h.sum(1) > 1.4).all()


def _layers(net):
    tensors = list(trained(net).values())
    return [tensors[:2], tensors[2:]]


def test_the_mlp_is_trained_as_op_lora_trains_it():
    """One step in: gradients are still those of OP-LoRA, so its MLP must be the same."""
    op, ours = model(), model()
    reference = oplora.create_oplora_optimizer(op, **OPTIONS, **MLP)
    optimizer = control(ours, True, True)
    for net, o in ((op, reference), (ours, optimizer)):
        backward(net)
        o.step()
    assert torch.equal(reference.stacks[0].h, optimizer.stacks[0].h)
    assert torch.equal(reference.stacks[0].rows.W2[0], optimizer.stacks[0].rows.W2[0])


def test_resume_is_bit_identical():
    whole = model()
    optimizer = control(whole, True, True)
    for step in range(8):
        if step == 4:
            state, saved = copy.deepcopy(optimizer.state_dict()), values(whole)
        backward(whole)
        optimizer.step()
    half = model()
    resumed = control(half, True, True)
    with torch.no_grad():
        for name, p in trained(half).items():
            p.copy_(saved[name])
    resumed.load_state_dict(state)
    for _ in range(4):
        backward(half)
        resumed.step()
    for mine, theirs in zip(trained(half).values(), trained(whole).values()):
        assert torch.equal(mine, theirs)


def test_loss_falls_and_other_optimizers_are_refused():
    net = model()
    optimizer = control(net, True, True)
    losses = []
    for _ in range(30):
        losses.append(backward(net))
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    with pytest.raises(ValueError, match="SGD"):
        create_control_optimizer(
            net, torch.optim.SGD, matched_steps=True, mlp_start=True, mlp_options=MLP, **OPTIONS
        )


@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_nonfinite_gradients_change_nothing(mode):
    net = model()
    optimizer = control(net, True, True)
    optimizer.nonfinite = mode
    backward(net)
    before = values(net)
    next(iter(trained(net).values())).grad[0, 0] = float("nan")
    if mode == "raise":
        with pytest.raises(FloatingPointError):
            optimizer.step()
    else:
        optimizer.step()
    assert all(torch.equal(v, before[name]) for name, v in values(net).items())
