"""Blocks and starts of `create_oplora_optimizer` on real PEFT models."""

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import TARGETS, adapted, decoder, output, train
from torch import nn

import oplora
from oplora.peft import adapter_blocks

METHODS = {
    "adalora": lambda: peft.AdaLoraConfig(total_step=100, **TARGETS),
    "c3a": lambda: peft.C3AConfig(block_size=8, **TARGETS),
    "delora": lambda: peft.DeloraConfig(r=4, **TARGETS),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=50, **TARGETS),
    "hra": lambda: peft.HRAConfig(r=4, **TARGETS),
    "ia3": lambda: peft.IA3Config(feedforward_modules=[], **TARGETS),
    "ln_tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "loha": lambda: peft.LoHaConfig(r=4, **TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=4, **TARGETS),
    "miss": lambda: peft.MissConfig(r=4, **TARGETS),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, r=0, **TARGETS),
    "randlora": lambda: peft.RandLoraConfig(r=4, **TARGETS),
    "road": lambda: peft.RoadConfig(group_size=8, **TARGETS),
    "shira": lambda: peft.ShiraConfig(r=4, **TARGETS),
    "vblora": lambda: peft.VBLoRAConfig(num_vectors=16, vector_length=8, r=4, **TARGETS),
    "vera": lambda: peft.VeraConfig(r=8, **TARGETS),
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_without_code_of_their_own(method):
    model = adapted(METHODS[method]())
    before = output(model)
    optimizer = oplora.create_oplora_optimizer(model, lr=0.0, mlp_width=8)
    assert (output(model) - before).abs().max() <= 2e-6
    train(model, optimizer, 1)  # lr 0: the tensors are now what the MLPs say
    assert (output(model) - before).abs().max() <= 2e-6
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    losses = train(model, optimizer, 10)
    assert losses[-1] < losses[0] - 0.01, losses
    assert not any(group["params"] for group in optimizer.param_groups if not group["mlp_width"])


STARTS = {
    "default": (dict(), "paper"),
    "gaussian": (dict(init_lora_weights="gaussian"), "paper"),
    "rslora": (dict(use_rslora=True), "paper"),
    "dora": (dict(use_dora=True), "paper"),
    "lora_bias": (dict(lora_bias=True), "paper"),
    "pissa": (dict(init_lora_weights="pissa"), "keep"),
    "olora": (dict(init_lora_weights="olora"), "keep"),
    "orthogonal": (dict(init_lora_weights="orthogonal"), "keep"),
    "random": (dict(init_lora_weights=False), "keep"),
    # B is zero, but A is chosen from data
    "eva": (dict(init_lora_weights="eva", eva_config=peft.EvaConfig()), "keep"),
}


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("shared_trunk", [True, False])
def test_the_start_follows_the_adapters_init_and_changes_no_output(init, shared_trunk):
    options, kind = STARTS[init]
    model = adapted(**options)
    before, first = output(model), [p.detach().clone() for p in model.parameters()]
    options = dict(lr=0.0, mlp_width=8, shared_trunk=shared_trunk)
    optimizer = oplora.create_oplora_optimizer(model, **options)
    assert (output(model) - before).abs().max() <= 2e-6
    changed = {
        name.split(".")[-3]
        for (name, p), old in zip(model.named_parameters(), first)
        if not torch.equal(p, old)
    }
    assert changed == ({"lora_A"} if kind == "paper" else set())
    assert f"start='{kind}'" in repr(optimizer)
    train(model, optimizer, 1)
    assert (output(model) - before).abs().max() <= 2e-6
    blocks, _ = adapter_blocks(model)
    assert len(optimizer.stacks[0].tensors.blocks) == (
        4 if shared_trunk else sum(len(b[0]) for b in blocks)
    )


def test_doras_magnitude_is_the_norm_of_the_base_weight_at_step_0():
    model = adapted(use_dora=True)
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(layers) == 4
    norms = [layer.lora_magnitude_vector["default"].weight.detach().clone() for layer in layers]
    optimizer = oplora.create_oplora_optimizer(model, lr=0.0)
    for steps, tolerance in [(0, 0), (1, 5e-7)]:  # a step writes what the MLPs say
        train(model, optimizer, steps)
        for layer, m in zip(layers, norms):
            now = layer.lora_magnitude_vector["default"].weight
            torch.testing.assert_close(now, m, rtol=0, atol=tolerance)
            torch.testing.assert_close(m, layer.base_layer.weight.norm(dim=1))


def test_a_loaded_adapter_is_kept(tmp_path):
    model = adapted()
    train(model, oplora.create_oplora_optimizer(model, lr=0.01, mlp_width=8), 2)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(decoder(), tmp_path, is_trainable=True).eval()
    assert torch.equal(output(loaded), output(model))
    optimizer = oplora.create_oplora_optimizer(loaded, lr=0.0)
    assert "start='keep'" in repr(optimizer) and "'paper'" not in repr(optimizer)
    assert torch.equal(output(loaded), output(model))


class Layers(nn.Module):
    """Every kind of layer that LoRA adapts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.image = nn.Conv2d(1, 2, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 8)
        self.experts = nn.Module()
        self.experts.weight = nn.Parameter(torch.randn(2, 8, 8) / 8)
        self.experts.forward = lambda x: torch.einsum("bti,eij->btj", x, self.experts.weight)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = self.conv(x.mT).mT
        x = x + self.image(x[:, None]).mean(1)
        x = self.attention(x, x, x)[0] + self.linear(x)
        return self.head(self.norm(x + self.experts(x)))


def test_one_block_per_layer_of_every_kind_and_the_rest_rides_along():
    names = ["embed", "conv", "image", "attention", "linear"]
    config = LoraConfig(
        r=2,
        target_modules=names,
        target_parameters=["experts.weight"],
        modules_to_save=["head"],
        bias="all",
    )
    model = get_peft_model(Layers(), config)
    tokens = torch.arange(12).view(2, 6)
    before = model(tokens)
    optimizer = oplora.create_oplora_optimizer(model, lr=0.01, mlp_width=8, weight_decay=0.1)
    assert torch.equal(model(tokens), before)
    blocks, others = adapter_blocks(model)
    assert len(blocks) == len(names) + 2  # attention has two layers: its input and its output
    assert all(len(b.names) == 2 for b in blocks), [b.names for b in blocks]
    assert all(stack.starts.count(["keep"]) == 0 for stack in optimizer.stacks)
    assert repr(optimizer).count("start=") == 1 and "7 start='paper'" in repr(optimizer)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == trained
    spared = {name for name, _ in others if "bias" in name}
    (decayed,) = [name for name, _ in others if "bias" not in name]
    assert decayed.endswith("head.modules_to_save.default.weight")
    adapters, plain, undecayed = optimizer.param_groups
    assert (adapters["mlp_width"], plain["mlp_width"], undecayed["mlp_width"]) == (8, 0, 0)
    assert [plain["weight_decay"], undecayed["weight_decay"]] == [0.1, 0.0]
    assert len(undecayed["params"]) == len(spared) and "base_model.model.norm.bias" in spared
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens).square().mean().backward()
        optimizer.step()
    still = [n for n, p in model.named_parameters() if p.requires_grad and torch.equal(p, old[n])]
    assert not still


def test_trainable_tokens_and_a_plain_module_around_the_model():
    model = nn.ModuleList([adapted(trainable_token_indices={"embed_tokens": [3, 4]}), Layers()])
    model[1].requires_grad_(False).head.requires_grad_(True)
    optimizer = oplora.create_oplora_optimizer(model, lr=0.01, mlp_width=8)
    _, others = adapter_blocks(model)
    assert {name.rsplit(".", 2)[-2] for name, _ in others} == {"trainable_tokens_delta", "head"}
    assert "4 start='paper'" in repr(optimizer) and "3 tensors trained directly" in repr(optimizer)


def test_models_in_a_list_are_trained_together():
    models = [adapted(), adapted()]
    optimizer = oplora.create_oplora_optimizer(models, lr=0.01, mlp_width=8)
    names = [name for stack in optimizer.stacks for block in stack.tensors.names for name in block]
    assert len(set(names)) == 16 and {name.split(".")[0] for name in names} == {"0", "1"}


def test_only_the_active_adapter_is_trained():
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, init_lora_weights=False, **TARGETS))
    model.set_adapter("other")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = oplora.create_oplora_optimizer(model, lr=0.01, mlp_width=8)
    assert all(".other." in n for stack in optimizer.stacks for b in stack.tensors.names for n in b)
    train(model, optimizer, 1)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert len(changed) == 8 and all(".other." in name for name in changed)
    model.set_adapter("default")  # trained on: its tensors are not the optimizer's
    train(model, optimizer, 1)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert len(changed) == 8


def test_the_mlps_do_not_depend_on_wrappers_and_random_state():
    def first(wrap, draws):
        model = adapted()
        torch.manual_seed(draws)
        oplora.create_oplora_optimizer(wrap(model), lr=1e-3)
        return [p.detach() for p in model.parameters() if p.requires_grad]

    plain = first(lambda m: m, 0)
    for wrap in (lambda m: torch.compile(m, backend="eager"), nn.DataParallel):
        assert all(torch.equal(a, b) for a, b in zip(plain, first(wrap, 1), strict=True))


def test_compiled_model_trains_alike():
    plain, compiled = adapted(use_dora=True), adapted(use_dora=True)
    first = train(plain, oplora.create_oplora_optimizer(plain, lr=3e-3, mlp_width=8), 4)
    fast = torch.compile(compiled, backend="aot_eager")
    second = train(fast, oplora.create_oplora_optimizer(fast, lr=3e-3, mlp_width=8), 4)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=0)
    assert first[-1] < first[0]


def test_bf16_adapters_keep_fp32_state():
    base = decoder().to(torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=4, **TARGETS), autocast_adapter_dtype=False)
    optimizer = oplora.create_oplora_optimizer(model, lr=1e-3, mlp_width=8)
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)  # as accelerate does; torch would cast it to bf16
    losses = train(model, optimizer, 6)
    assert losses[-1] < losses[0]
    for stack in optimizer.stacks:
        assert all(t.dtype == torch.bfloat16 for t in stack.tensors.flat)
        assert stack.b2.dtype == stack.rows.W2[0].dtype == torch.float32
        moments = [m for part in optimizer.parts for m in part.moments.state(0)["W2"].values()]
        assert moments and all(m.dtype == torch.float32 for m in moments)


def test_any_optimizer_class():
    model = adapted()
    with_sgd = oplora.create_oplora_optimizer(model, torch.optim.SGD, lr=0.1, momentum=0.9)
    assert type(with_sgd) is oplora.OPOptimizer and isinstance(with_sgd.inner, torch.optim.SGD)
    losses = train(model, with_sgd, 5)
    assert losses[-1] < losses[0]
