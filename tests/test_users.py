"""What users' code does to an optimizer: autocast, compilation, several adapters, odd resumes."""

import copy
import inspect
import io

import pytest
import torch
from peft import LoraConfig
from tiny_blocks import blocks, losses
from tiny_models import DECODER, TARGETS, adapted, output, train
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import oplora
from oplora.baselines import create_lora_pro_optimizer, create_lora_rite_optimizer

FORMS = {
    "exact": oplora.OPAdamW,
    "any": oplora.OPOptimizer,
    "lite": lambda params, **kw: oplora.OPAdamW(params, lite=True, **kw),
}


def values(data):
    return [t.detach().clone() for block in data for t in block]


def steps(optimizer, data, count):
    for _ in range(count):
        optimizer.zero_grad()
        losses(data).backward()
        optimizer.step()


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def test_the_default_dtype_does_not_reach_the_step_counter(form):
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        data = blocks(torch.float32)
        torch.set_default_dtype(dtype)
        try:
            optimizer = form(data, lr=1e-3, mlp_width=4)
            steps(optimizer, data, 3)
        finally:
            torch.set_default_dtype(torch.float32)
        counters = [
            state["step"]
            for part in optimizer.parts
            for state in optimizer.moments_of(part, 0).values()
        ]
        results.append(values(data))
        if form is not FORMS["any"]:  # whose counter is torch's own
            assert all(c.dtype == torch.float32 for c in counters)
    if form is not FORMS["any"]:
        assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("create", [create_lora_pro_optimizer, create_lora_rite_optimizer])
def test_nor_those_of_the_baselines(create):
    model = adapted()
    torch.set_default_dtype(torch.bfloat16)
    try:
        optimizer = create(model, lr=1e-3)
        train(model, optimizer, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    counters = [s["step"] for s in optimizer.state.values() if "step" in s]
    assert counters and all(c.dtype == torch.float32 for c in counters)


def test_a_step_within_autocast_is_the_same(form):
    results = []
    for inside in (False, True):
        data = blocks(torch.float32)
        optimizer = form(data, lr=0.01, mlp_width=8)
        for _ in range(5):
            optimizer.zero_grad()
            losses(data).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                optimizer.step()
        results.append(values(data))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_compiled_step_is_the_same(form):
    results = []
    for compiled in (False, True):
        data = blocks(torch.float32)
        optimizer = form(data, lr=0.01, mlp_width=8)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(3):
            optimizer.zero_grad()
            losses(data).backward()
            step()
        results.append(values(data))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_two_adapters_may_take_turns_between_backward_and_step():
    results = []
    for interleaved in (False, True):
        model = adapted()
        model.add_adapter("b", LoraConfig(r=4, **TARGETS))
        optimizers = {}
        for name in ("default", "b"):
            model.set_adapter(name)
            optimizers[name] = oplora.create_oplora_optimizer(model, lr=0.01, mlp_width=8)
        for _ in range(3):
            for name, optimizer in optimizers.items():
                model.set_adapter(name)
                optimizer.zero_grad()
                DECODER.loss(model).backward()
                if not interleaved:
                    optimizer.step()
            if interleaved:  # the other adapter is frozen by now
                for optimizer in optimizers.values():
                    optimizer.step()
        results.append({n: p.detach() for n, p in model.named_parameters() if "lora" in n})
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_a_layer_frozen_whole_sits_out(form):
    data = blocks()
    optimizer = form(data, lr=0.01, mlp_width=8)
    steps(optimizer, data, 2)
    for tensor in data[1]:
        tensor.requires_grad_(False)
    before = values(data)
    optimizer.zero_grad()
    losses(data).backward()
    optimizer.step()
    after = values(data)
    first, second = len(data[0]), len(data[0]) + len(data[1])
    assert all(torch.equal(a, b) for a, b in zip(before[first:second], after[first:second]))
    assert not any(torch.equal(a, b) for a, b in zip(before[:first], after[:first]))


def test_moments_are_reached_through_the_state(form):
    """Zeroing all of them there, as ReLoRA does, is `reset_moments` but for the steps' count."""
    results = []
    for how in ("state", "method"):
        data = blocks()
        optimizer = form(data, lr=0.01, mlp_width=8)
        steps(optimizer, data, 4)
        assert set(optimizer.state) == {t for block in data for t in block}
        if how == "state":
            assert all(s["exp_avg"].any() and s["step"] == 4 for s in optimizer.state.values())
            for state in optimizer.state.values():
                for value in state.values():
                    value.zero_()
        else:
            optimizer.reset_moments()
        steps(optimizer, data, 4)
        results.append(values(data))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_torchs_checkpoint_helper_makes_no_step(form):
    model = adapted()
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = form(list(names.items()), lr=0.01, mlp_width=8)
    before = {n: p.detach().clone() for n, p in names.items()}
    get_optimizer_state_dict(model, optimizer)
    assert not optimizer.trained
    assert all(torch.equal(p, before[n]) for n, p in names.items())


def test_a_zero_bias_is_no_factor():
    model = adapted(lora_bias=True)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name and name.endswith("weight"):
                p.normal_()
    before, first = output(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = oplora.create_oplora_optimizer(model, lr=0.0)
    assert "start='keep'" in repr(optimizer) and "'paper'" not in repr(optimizer)
    assert all(torch.equal(p, first[n]) for n, p in model.named_parameters())
    assert torch.equal(output(model), before)


def test_copies_are_refused_at_once(form):
    optimizer = form(blocks(), mlp_width=4)
    for copied in (copy.deepcopy, copy.copy, lambda o: torch.save(o, io.BytesIO())):
        with pytest.raises(TypeError, match="state_dict"):
            copied(optimizer)


def test_adapters_in_another_order_get_their_own_mlps_back(form):
    def named(data, order):
        return [[(f"layer {i}.{k}", t) for k, t in enumerate(data[i])] for i in order]

    whole = blocks(layers=[[(4, 10), (7, 4)]] * 3)
    optimizer = form(named(whole, [0, 1, 2]), lr=0.01, mlp_width=8)
    steps(optimizer, whole, 4)
    state, saved = copy.deepcopy(optimizer.state_dict()), values(whole)
    steps(optimizer, whole, 4)
    resumed = blocks(layers=[[(4, 10), (7, 4)]] * 3)
    with torch.no_grad():
        for tensor, value in zip([t for block in resumed for t in block], saved):
            tensor.copy_(value)
    other = form(named(resumed, [2, 0, 1]), lr=0.01, mlp_width=8)
    other.load_state_dict(state)
    steps(other, resumed, 4)
    assert all(torch.equal(a, b) for a, b in zip(values(whole), values(resumed)))
    stranger = form(named(blocks(layers=[[(4, 10), (7, 4)]] * 4), [1, 2, 3]), mlp_width=8)
    with pytest.raises(ValueError, match=r"nothing for layer 3\.0, layer 3\.1; it is of layer 0"):
        stranger.load_state_dict(state)


def test_edits_at_every_step_need_not_be_told(form, recwarn):
    data = blocks()
    optimizer = form(data, lr=0.01, mlp_width=8, edited="quiet")
    for _ in range(3):
        steps(optimizer, data, 1)
        with torch.no_grad():
            data[0][0].mul_(0.9)
    expected = data[0][0].detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    steps(optimizer, data, 1)
    torch.testing.assert_close(data[0][0], expected, rtol=0, atol=1e-12)
    assert not [w for w in recwarn if "changed from outside" in str(w.message)]


def test_layers_may_have_rates_of_their_own():
    model = adapted()
    layer_lr = {r"layers\.1\.": 3e-4, "v_proj": 1e-4}
    optimizer = oplora.create_oplora_optimizer(model, lr=1e-3, layer_lr=layer_lr)
    rates = {group["lr"]: len(group["params"]) for group in optimizer.param_groups}
    assert rates == {1e-3: 2, 3e-4: 4, 1e-4: 2}
    with pytest.raises(ValueError, match="'text_model' is in no name"):
        oplora.create_oplora_optimizer(model, lr=1e-3, layer_lr={"text_model": 1.0})


def test_two_models_do_not_get_the_same_A():
    first, second = adapted(), adapted()
    oplora.create_oplora_optimizer([first, second], lr=1e-3)
    a, b = (next(p for n, p in m.named_parameters() if "lora_A" in n) for m in (first, second))
    assert not torch.equal(a, b)


def test_a_misspelt_argument_is_told_its_name():
    for make in (
        lambda: oplora.OPAdamW(blocks(), mlp_widht=8),
        lambda: oplora.create_oplora_optimizer(adapted(), lr=1e-3, mlp_widht=8),
    ):
        with pytest.raises(TypeError, match=r"mlp_widht=8 .* did you mean mlp_width"):
            make()
    signature = inspect.signature(oplora.create_oplora_optimizer).parameters
    assert {"mlp_width", "init", "start", "clip", "z_dim"} <= signature.keys()
    assert "start" in inspect.signature(oplora.OPAdamW).parameters


def test_a_whole_model_is_told_what_to_give_instead():
    with pytest.raises(ValueError, match="create_oplora_optimizer"):
        oplora.OPAdamW(adapted().parameters())
