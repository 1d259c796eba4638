"""Other systems around LoRA: literal references, resume, and what they export."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_export import PEFT_USER, in_another_process
from test_methods import method
from tiny_models import FAMILIES, adapted
from torch import nn

import oplora.harness.finetuning as finetuning
from oplora.baselines import MergeAndRestart, create_lora_pro_optimizer, merge_and_restart
from oplora.baselines.nola import load_seeded, save_seeded
from oplora.baselines.products import factors_of, joined
from oplora.baselines.scaled import create_op_scaled_optimizer
from oplora.generators import create_generator_optimizer
from oplora.harness.checkpoints import CheckpointingTrainer
from oplora.harness.methods import apply_method
from oplora.mlp import AdapterMLP, generator_for

FAMILY = FAMILIES["decoder"]
STEPS, SAVED, CUT = 10, 4, 6  # of a training: all, between checkpoints, where it is cut
NEW = ["oplora_scalar", "oplora_rescaled", "deeplora", "hyperloader", "reslora", "lora_large",
       "lora_ga", "eva", "op_scaled", "nola", "cola", "opcola", "relora", "xgblora",
       "lora_muon", "altlora", "loft", "lora_one", "cora", "rosa", "adalora",
       "runlora"]  # fmt: skip
# What a training of ten steps needs; not of one file alone: rosa's sparse part (test_rosa.py).
OPTIONS = {"rosa": {"method.create_optimizer.warmup_steps": "2"}}
EXPORTED = [name for name in NEW if name != "rosa"]


# Literal references, in float64


def tiny(r=3, **config):
    """Two adapted layers of one shape, their inputs and targets."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(2))).double()
    x, y = torch.randn(9, 6).double(), torch.randn(9, 6).double()
    options = dict(r=r, lora_alpha=2 * r, target_modules=["0", "1"])
    return get_peft_model(base, LoraConfig(**{**options, **config})).double(), x, y


def loss_of(weights, x, y):
    """Of the same two layers with these weights."""
    for W in weights:
        x = x @ W.T
    return (x - y).square().mean()


def factors(model):
    pairs = [(m.lora_A["default"].weight, m.lora_B["default"].weight)
             for m in model.modules() if hasattr(m, "lora_A")]  # fmt: skip
    base = [m.get_base_layer().weight.detach() for m in model.modules() if hasattr(m, "lora_A")]
    return pairs, base


def lockstep(model, optimizer, x, y, reference, parameters, optimizer_cls, steps=12, **options):
    """Train both; reference() -> the two layers' updates s B A from its parameters."""
    theirs = optimizer_cls(parameters, **options)
    pairs, base = factors(model)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        theirs.zero_grad()
        loss_of([W + dW for W, dW in zip(base, reference())], x, y).backward()
        theirs.step()
        for (A, B), dW in zip(pairs, reference()):
            torch.testing.assert_close(2 * B @ A, dW, rtol=0, atol=1e-12)
    assert all(B.abs().max() > 1e-3 for _, B in pairs)


class Projected(torch.autograd.Function):
    """A and B as they are; their gradients by ScaledAdamW's projection, with explicit inverses."""

    @staticmethod
    def forward(ctx, A, B):
        ctx.save_for_backward(A, B)
        return A.clone(), B.clone()

    @staticmethod
    def backward(ctx, gA, gB):
        A, B = ctx.saved_tensors
        reg = 0.01 * torch.eye(len(A)).double()
        return (B.T @ B + reg).inverse() @ gA, gB @ (A @ A.T + reg).inverse()


def names_of(model):
    return [n for n, p in model.named_parameters() if p.requires_grad]


def test_op_scaled_adamw_equals_a_projected_backward_in_the_graph():
    model, x, y = tiny()
    pairs, _ = factors(model)
    names = names_of(model)[::2]
    twins = [
        AdapterMLP([A.detach(), B.detach()], 5, ["random", "still"], generator=generator_for(0, n))
        for (A, B), n in zip(pairs, names)
    ]
    adam = dict(lr=0.02, weight_decay=0.1)
    optimizer = create_op_scaled_optimizer(model, mlp_width=5, reg=0.01, **adam)

    def updates():
        return [2 * B @ A for A, B in (Projected.apply(*twin()) for twin in twins)]

    parameters = [p for twin in twins for p in twin.parameters()]
    lockstep(model, optimizer, x, y, updates, parameters, torch.optim.AdamW, **adam)


def test_scaled_adamw_is_peft_s():
    """The method `riemannian`: moments of the projected gradients, both from the A and B before."""
    model, x, y = tiny()
    optimizer = instantiate(method("riemannian").create_optimizer)(model)
    twins = [[nn.Parameter(t.detach().clone()) for t in pair] for pair in factors(model)[0]]

    def updates():
        return [2 * B @ A for A, B in (Projected.apply(*twin) for twin in twins)]

    parameters = [p for twin in twins for p in twin]
    adam = dict(lr=1e-3, weight_decay=0.01)
    lockstep(model, optimizer, x, y, updates, parameters, torch.optim.AdamW, **adam)


def test_deeplora_is_three_factors():
    model, x, y = tiny()
    adam = dict(lr=0.02, weight_decay=0.1)
    pairs, _ = factors(model)
    twins = [[A.detach().clone(), torch.eye(3).double(), B.detach().clone()] for A, B in pairs]
    parameters = [t.requires_grad_() for twin in twins for t in twin]
    optimizer = create_generator_optimizer(model, generator="deep", **adam)
    updates = lambda: [2 * B @ C @ A for A, C, B in twins]  # noqa: E731
    lockstep(model, optimizer, x, y, updates, parameters, torch.optim.AdamW, **adam)


def test_hyperloader_is_one_mlp_over_vectors_of_layers():
    model, x, y = tiny()
    adam = dict(lr=0.003, weight_decay=0.1)
    optimizer = create_generator_optimizer(model, generator="shared", mlp_width=5, **adam)
    ((_, module),) = optimizer.modules
    values = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
    assert values["z"].shape == (2, 128) and len(module.W2) == 2  # heads: all A, all B

    def updates():
        result = []
        for layer in range(2):
            h = torch.relu(values["W1"] @ values["z"][layer] + values["b1"])
            A = (h @ values["W2.0"] + values["b2.0"]).view(3, 6)
            B = (h @ values["W2.1"] + values["b2.1"]).view(6, 3)
            result.append(2 * B @ A)
        return result

    lockstep(model, optimizer, x, y, updates, values.values(), torch.optim.AdamW, **adam)
    assert not torch.equal(*(A for A, _ in factors(model)[0]))


def test_reslora_adds_the_product_of_the_layer_before():
    model, x, y = tiny(r=4)
    twins = [[A[:2].detach().clone(), B[:, :2].detach().clone()] for A, B in factors(model)[0]]
    parameters = [t.requires_grad_() for twin in twins for t in twin]
    adam = dict(lr=0.02, weight_decay=0.1)
    optimizer = create_generator_optimizer(model, generator="shortcuts", **adam)

    def updates():
        (A, B), (C, D) = twins
        return [2 * B @ A, 2 * (D @ C + B @ A)]

    lockstep(model, optimizer, x, y, updates, parameters, torch.optim.AdamW, **adam)
    assert not factors(model)[0][0][0][2:].any()  # there is none before the first


@pytest.mark.parametrize(
    ("generator", "config", "words"),
    [
        ("shared", dict(init_lora_weights="orthogonal", r=4), "B must start at zero"),
        ("shortcuts", {}, "rank 3 must be a multiple of previous [+] 1=2"),
        ("deep", dict(use_dora=True), "is for plain LoRA"),
    ],
)
def test_wrong_use_is_named(generator, config, words):
    model, _, _ = tiny(**config)
    with pytest.raises(ValueError, match=words):
        create_generator_optimizer(model, generator=generator, lr=0.1)


def test_rank_control_trains_as_many_values():
    sizes = []
    for name in ("lora_large", "oplora"):
        model, create_optimizer = apply_method(FAMILY.build(), method(name, FAMILY))
        optimizer, layers = create_optimizer(model), 6
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        sizes.append(getattr(optimizer, "mlp_parameters", trained))
        assert model.peft_config["default"].lora_alpha == 2 * model.peft_config["default"].r
    assert sizes[1] - sizes[0] == layers * (128 + 8 * 128 + 8)  # z, W1, b1


@pytest.mark.parametrize("moments", ["keep", "prune", "reset"])
def test_a_chain_is_training_folding_and_starting_afresh(moments):
    model, x, y = tiny()
    pairs, _ = factors(model)
    trained = [p for pair in pairs for p in pair]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    links, first = [], [W.clone() for W in factors(model)[1]]
    for number in (1, 2):
        for _ in range(4):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        before, moment = (
            model(x).detach(),
            {p: optimizer.state[p]["exp_avg"].clone() for p in trained},
        )
        links.append(merge_and_restart(model, optimizer, number, moments=moments))
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
        for A, B in pairs:
            assert A.any() and not B.any()
            assert not any(torch.equal(A, old) for link in links for old, _ in link.values())
        for p in trained:
            if moments == "reset":
                assert not optimizer.state[p]
                continue
            now = optimizer.state[p]["exp_avg"]
            largest = moment[p].abs() == moment[p].abs().max()
            expected = moment[p] if moments == "keep" else moment[p] * largest
            assert torch.equal(now, expected)
    chain = joined(*links, factors_of(model)).values()
    expected = loss_of([W + B @ A for W, (A, B) in zip(first, chain)], x, y)
    torch.testing.assert_close((model(x) - y).square().mean(), expected, rtol=0, atol=1e-12)
    assert {len(A) for A, _ in chain} == {9}


def test_a_link_trains_a_share_of_the_layers():
    model, _, _ = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    chosen = []
    for number in range(1, 9):
        merge_and_restart(model, optimizer, number, layers=0.5)
        chosen.append(tuple(A.requires_grad for A, _ in factors(model)[0]))
        assert sum(chosen[-1]) == 1
    assert len(set(chosen)) == 2


@pytest.mark.parametrize(
    ("options", "words"), [(dict(links=0), "links=0"), (dict(links=2, moments="all"), "moments=")]
)
def test_wrong_chains_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        MergeAndRestart(**options)


def test_nola_is_a_seed_and_coefficients(tmp_path):
    model = adapted()
    optimizer = create_generator_optimizer(model, generator="nola", mlp_width=8, seed=3, lr=0.1)
    FAMILY.train(model, optimizer, 3)
    path = tmp_path / "nola.safetensors"
    save_seeded(model, optimizer, path, seed=3)
    assert sum(t.numel() for t in load_file(path).values()) == optimizer.mlp_parameters
    drawn, trained = load_seeded(path), {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert drawn.keys() == trained.keys()
    assert all(torch.equal(drawn[n], p) and p.any() for n, p in trained.items())
    with pytest.raises(ValueError, match="did not start from seed=4"):
        save_seeded(model, optimizer, path, seed=4)


@pytest.mark.parametrize("steps", [1, 6])
def test_lora_pro_agrees_with_another_implementation(steps):
    """Where `lora-pro-adamw` is installed; it keeps second moments in bf16 after the first step."""
    other = pytest.importorskip("lora_pro.adamw")
    model, x, y = tiny()
    twin = copy.deepcopy(model)
    options = dict(lr=1e-2, weight_decay=0.0)
    ours = create_lora_pro_optimizer(model, **options)
    theirs = other.LoRAProAdamW(twin, lorapro_mode="full", **options)
    for _ in range(steps):
        for each, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            (each(x) - y).square().mean().backward()
            optimizer.step()
    for pair, expected in zip(factors(model)[0], factors(twin)[0]):
        torch.testing.assert_close(pair, expected, rtol=0, atol=1e-6 if steps == 1 else 1e-3)


# Every new method as the experiments train it


def fit(name, folder, cut=False):
    """Train the tiny decoder by HF Trainer in this folder, from a checkpoint if there is one."""
    cfg = OmegaConf.create(
        dict(
            _target_="transformers.TrainingArguments",
            max_steps=STEPS,
            per_device_train_batch_size=2,
            learning_rate=0.01,
            save_steps=SAVED,
            logging_steps=1,
            seed=0,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
    )
    rows = [{k: v[n % 4] for k, v in FAMILY.batch.items()} for n in range(12)]
    torch.manual_seed(0)
    stack = lambda rows: {k: torch.stack([row[k] for row in rows]) for k in rows[0]}  # noqa: E731
    batches = finetuning.first_batches(rows, stack, cfg)
    options = {"lr": "0.01", **OPTIONS.get(name, {})}
    model, create_optimizer = apply_method(FAMILY.build(), method(name, FAMILY, **options), batches)
    run = SimpleNamespace(path=folder, finish=None)
    make = trainer = CheckpointingTrainer
    if cut:

        class trainer(CheckpointingTrainer):
            def training_step(self, *args, **kwargs):
                if self.state.global_step == CUT:
                    raise KeyboardInterrupt
                return super().training_step(*args, **kwargs)

    finetuning.CheckpointingTrainer = trainer
    try:
        metrics = finetuning.train(model, create_optimizer, cfg, run, train_dataset=rows)
    finally:
        finetuning.CheckpointingTrainer = make
    with torch.no_grad():
        return FAMILY.output(model.eval()), metrics


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """By method its folder, the trained model's output and the metrics."""
    root = tmp_path_factory.mktemp("relatives")
    FAMILY.build().save_pretrained(root)
    save_file(FAMILY.batch, root / "batch.safetensors")
    return root, {name: fit(name, root / name) for name in NEW}


@pytest.mark.parametrize("name", NEW)
def test_it_learns_and_a_cut_run_ends_as_an_undisturbed_one(name, fitted, tmp_path):
    root, runs = fitted
    output, metrics = runs[name]
    assert metrics["train_loss"][-1][1] < metrics["train_loss"][0][1]
    with pytest.raises(KeyboardInterrupt):
        fit(name, tmp_path, cut=True)
    again, resumed = fit(name, tmp_path)
    assert resumed["resumed"] == f"checkpoint-{SAVED}"
    assert torch.equal(again, output)
    adapters = [load_file(p / "adapter/adapter_model.safetensors") for p in (root / name, tmp_path)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(t, adapters[1][key]) for key, t in adapters[0].items())


def test_what_it_exports_loads_in_stock_peft(fitted):
    root, runs = fitted
    paths = {name: root / name / "adapter" for name in EXPORTED}
    outputs = in_another_process(PEFT_USER, root, list(paths.values()))
    for name, path in paths.items():
        expected, _ = runs[name]
        assert (outputs[str(path)] - expected).abs().max() <= 1e-5, name
        assert (outputs[f"{path} merged"] - expected).abs().max() <= 1e-5, name
