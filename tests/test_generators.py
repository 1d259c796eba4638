"""Generators in the optimizer: equal to the module in the graph, and how each of them starts."""

import copy

import pytest
import torch
from tiny_blocks import EVEN, losses
from tiny_models import adapted, output, train

import oplora
from oplora.generators import (
    GENERATORS,
    GeneratorOptimizer,
    create_generator_optimizer,
)
from oplora.mlp import AdapterMLP, generator_for


def pairs():
    torch.manual_seed(0)
    data = [(torch.randn(a), torch.zeros(b)) for a, b, *_ in EVEN]
    return [[torch.nn.Parameter(t.double()) for t in block] for block in data]


def modules(data, cls):
    return [cls(block, 8, z_dim=4, generator=generator_for(0, str(i)))
            for i, block in enumerate(data)]  # fmt: skip


@pytest.mark.parametrize("cls", GENERATORS.values())
@pytest.mark.parametrize("optimizer_cls", [torch.optim.AdamW, torch.optim.SGD])
def test_it_equals_the_module_in_the_graph(cls, optimizer_cls):
    data, options = pairs(), dict(lr=0.02, weight_decay=0.1)
    ours = GeneratorOptimizer(zip(data, modules(data, cls)), optimizer_cls, **options)
    graph = modules(pairs(), cls)
    theirs = optimizer_cls([p for module in graph for p in module.parameters()], **options)
    for _ in range(12):
        ours.zero_grad()
        losses(data).backward()
        ours.step()
        theirs.zero_grad()
        losses([module() for module in graph]).backward()
        theirs.step()
    for block, module in zip(data, graph):
        for tensor, value in zip(block, module()):
            torch.testing.assert_close(tensor, value, rtol=0, atol=1e-12)
    assert all(block[1].any() for block in data)


def test_it_equals_the_closed_form():
    results = []
    for closed in (True, False):
        data = pairs()
        if closed:
            names = [[(f"{i}", A), (f"{i}.B", B)] for i, (A, B) in enumerate(data)]
            optimizer = oplora.OPAdamW(names, lr=0.02, mlp_width=8, z_dim=4, start="paper")
        else:
            adam = dict(lr=0.02, weight_decay=1e-2)
            optimizer = GeneratorOptimizer(
                zip(data, modules(data, AdapterMLP)), torch.optim.AdamW, **adam
            )
        for _ in range(10):
            optimizer.zero_grad()
            losses(data).backward()
            optimizer.step()
        results.append([t.detach() for block in data for t in block])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_rescaled_form_starts_at_the_base_model_and_learns():
    model = adapted()
    before = output(model)
    optimizer = create_generator_optimizer(model, generator="rescaled", lr=1e-2, mlp_width=8)
    assert torch.equal(output(model), before)
    (_, module), *_ = optimizer.modules
    assert module.rescale == 0 and module.b2.any()
    seen = train(model, optimizer, 8)
    assert seen[-1] < seen[0] - 0.01 and all(m.rescale != 0 for _, m in optimizer.modules)
    assert optimizer.mlp_parameters > 8 * sum(t.numel() for b, _ in optimizer.modules for t in b)


@pytest.mark.parametrize("generator", GENERATORS)
def test_resume_is_bit_identical(generator):
    whole = adapted()
    optimizer = create_generator_optimizer(whole, generator=generator, lr=1e-2, mlp_width=8)
    train(whole, optimizer, 3)
    state, saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(whole.state_dict())
    train(whole, optimizer, 3)
    resumed = adapted()
    other = create_generator_optimizer(resumed, generator=generator, lr=1e-2, mlp_width=8)
    resumed.load_state_dict(saved)
    other.load_state_dict(state)
    train(resumed, other, 3)
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("generator", ["relu", "linear", "free", "scalar", "nola"])
@pytest.mark.parametrize("options", [{}, dict(use_dora=True), dict(init_lora_weights="pissa")])
def test_every_generator_starts_at_the_model_it_is_given(generator, options):
    model = adapted(modules_to_save=["lm_head"], **options)
    before = output(model)
    optimizer = create_generator_optimizer(model, generator=generator, lr=1e-2, mlp_width=8)
    assert (output(model) - before).abs().max() <= 2e-6
    seen = train(model, optimizer, 12)
    assert seen[-1] < seen[0] - 0.01
    assert optimizer.mlp_parameters == sum(
        p.numel() for _, module in optimizer.modules for p in module.parameters()
    )


@pytest.mark.parametrize("cls", GENERATORS.values())
def test_a_generator_moves_with_all_that_it_needs(cls):
    module = modules(pairs(), cls)[0].float()
    assert {value.dtype for value in module()} == {torch.float32}


def test_nola_trains_numbers_alone():
    (module,) = (GENERATORS["nola"](block, 8) for block in pairs()[:1])
    assert [tuple(p.shape) for p in module.parameters()] == [(8,), (8,)]
    assert next(GENERATORS["scalar"](pairs()[0]).parameters()).shape == ()


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match=r"generator='tanh' is unknown: use relu, linear"):
        create_generator_optimizer(adapted(), generator="tanh", lr=1e-2)
    with pytest.raises(ValueError, match="'rescaled' is for plain LoRA"):
        create_generator_optimizer(adapted(use_dora=True), generator="rescaled", lr=1e-2)
