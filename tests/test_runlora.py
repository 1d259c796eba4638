"""RunLoRA's orders give PEFT's numbers; the cheapest is chosen, and where it cannot be, PEFT's."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from oplora.baselines.runlora import (
    ORDERS,
    Ordered,
    RunLoraLinear,
    cheapest,
    products,
    use_runlora,
)

SHAPES = [(5, 8, 6, 2), (64, 8, 12, 2), (3, 40, 40, 16), (200, 6, 4, 4)]  # tokens, d_in, d_out, r


def adapted(rank=2, d_in=8, d_out=6, bias=True, dtype=torch.float64, **options):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(d_in, d_out, bias=bias)).to(dtype)
    config = LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=["0"], **options)
    model = get_peft_model(base, config, autocast_adapter_dtype=False).to(dtype)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    return model


def numbers(model, x):
    """y and the gradients of x and of all that is trained."""
    x = x.clone().requires_grad_()
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return y, *torch.autograd.grad(y.square().sum(), [x, *trained])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_order_gives_peft_s_numbers(order, bias, monkeypatch):
    model = adapted(bias=bias)
    x = torch.randn(3, 5, 8).double()
    expected = numbers(model, x)
    monkeypatch.setattr("oplora.baselines.runlora.cheapest", lambda *sizes: order)
    found = numbers(use_runlora(copy.deepcopy(model)), x)
    assert found[0].grad_fn.next_functions[0][0].name() == "OrderedBackward"
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens, d_in, d_out, rank", SHAPES)
def test_the_cheapest_order_is_that_of_the_fewest_counted_flop(tokens, d_in, d_out, rank):
    x = torch.randn(tokens, d_in, requires_grad=True)
    A, B = (torch.randn(shape, requires_grad=True) for shape in ((rank, d_in), (d_out, rank)))
    flop, in_place = {}, {torch.ops.aten.addmm_: lambda _, a, b, **kw: 2 * a[0] * a[1] * b[1]}
    for order in ORDERS:
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            Ordered.apply(x, torch.randn(d_out, d_in), None, A, B, 2.0, order).sum().backward()
        flop[order] = counter.get_total_flops()
    without = 2 * 2 * tokens * d_in * d_out  # y = x W^T and its gradient
    assert flop == {o: without + 2 * products(o, tokens, d_in, d_out, rank) for o in ORDERS}
    assert flop[cheapest(tokens, d_in, d_out, rank)] == min(flop.values())


def two_adapters(model):
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0"]))
    model.base_model.set_adapter(["default", "second"])
    return model.double()


FALLBACKS = {
    "dropout": lambda: adapted(lora_dropout=0.5),
    "dora": lambda: adapted(use_dora=True),
    "own_bias": lambda: adapted(lora_bias=True),
    "two_adapters": lambda: two_adapters(adapted()),
    "trained_base": lambda: adapted().requires_grad_(True),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_is_no_plain_lora_is_peft_s(name):
    model = FALLBACKS[name]()
    x, found = torch.randn(5, 8).double(), []
    for each in (model, use_runlora(copy.deepcopy(model))):
        torch.manual_seed(1)
        found.append(numbers(each, x))
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_autocast_merging_and_disabling_are_peft_s():
    model = adapted(dtype=torch.float32)
    mine, x = use_runlora(copy.deepcopy(model)), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mine(x), model(x))
    with mine.disable_adapter(), model.disable_adapter():
        assert torch.equal(mine(x), model(x))
    y = model(x)
    mine.merge_adapter()
    torch.testing.assert_close(mine(x), y)
    mine.unmerge_adapter()
    torch.testing.assert_close(mine(x), y)
    assert mine.state_dict().keys() == model.state_dict().keys()
    assert type(mine.base_model.model[0]) is RunLoraLinear


def test_a_model_without_lora_is_refused():
    with pytest.raises(ValueError, match="there are none"):
        use_runlora(nn.Linear(2, 2))
