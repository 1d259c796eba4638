"""Rotated MNIST: the batch against single runs, curvature against known Hessians, end to end."""

import copy
import json
import sys
from functools import partial

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from processes import run_here
from tiny_digits import write_hub, write_package
from torch.func import grad, hessian
from torch.nn import functional

import oplora
from oplora.generators import create_generator_optimizer
from oplora.studies.rotated_mnist import digits
from oplora.studies.rotated_mnist.curvature import along_top, condition_numbers, power_iteration
from oplora.studies.rotated_mnist.network import (
    Layer,
    gradients,
    layers_of,
    logits,
    loss,
    network,
    pretrained,
)
from oplora.studies.rotated_mnist.report.rules import bounds
from oplora.studies.rotated_mnist.surface import changes, plane, surface
from oplora.studies.rotated_mnist.training import Member, adapt, alone, evaluate

ADAMW = partial(torch.optim.AdamW, weight_decay=0.0)
TRAINING = dict(epochs=3, batch_size=8)
torch.manual_seed(0)
X, Y = torch.rand(44, 784), torch.randint(10, (44,))
BASE = network(6)


def started(method: str, seed: int, lr: float):
    """The method's own PEFT model and optimizer, as experiments/ make them."""
    torch.manual_seed(seed)
    adapter = LoraConfig(r=2, lora_alpha=6, target_modules=["hidden", "output"])
    adapter.use_dora = method in ("dora", "opdora")
    model = get_peft_model(copy.deepcopy(BASE), adapter)
    options = dict(lr=lr, weight_decay=0.0)
    if method in ("lora", "dora"):
        return model, ADAMW([p for p in model.parameters() if p.requires_grad], lr=lr)
    options |= dict(seed=seed, mlp_width=4)
    if method in ("oplora", "opdora", "oplora_text"):
        init = "text" if method == "oplora_text" else "author"
        return model, oplora.create_oplora_optimizer(model, init=init, **options)
    return model, create_generator_optimizer(model, generator=method, **options)


def trained(method, rates, seeds):
    members = [Member.of(*started(method, seed, 1.0)) for seed in seeds]
    options = dict(optimizer=ADAMW, points=2, **TRAINING)
    return members[0].layers, adapt(members, rates, seeds, X, Y, **options)


def thetas_of(model):
    """The adapter's tensors of both layers, flat."""
    tensors = {}
    for name, p in model.named_parameters():
        if "lora" in name:
            tensors.setdefault("hidden" if ".hidden." in name else "output", []).append(p.flatten())
    return [torch.cat(parts).detach() for parts in tensors.values()]


METHODS = ["lora", "dora", "oplora", "opdora", "oplora_text"]
GENERATORS = ["relu", "linear", "free", "scalar", "nola", "rescaled"]


@pytest.mark.parametrize("method", METHODS + GENERATORS)
def test_members_equal_single_runs(method):
    rates, seeds = [1e-3, 1e-2], [0, 5]
    layers, batch = trained(method, rates, seeds)
    losses, _ = evaluate(layers, batch.thetas, X, Y)
    for r, rate in enumerate(rates):
        for s, seed in enumerate(seeds):
            model, optimizer = started(method, seed, rate)
            first = thetas_of(model)
            alone(model, optimizer, seed, X, Y, **TRAINING)
            for layer, (theta, start) in enumerate(zip(thetas_of(model), first)):
                found, snapshots = batch.thetas[layer][r, s], batch.snapshots[layer][:, r, s]
                assert not torch.equal(theta, start)
                torch.testing.assert_close(found, theta, rtol=1e-3, atol=2e-5)
                torch.testing.assert_close(snapshots[0], start, rtol=1e-5, atol=1e-6)
                assert torch.equal(snapshots[-1], found)
            with torch.no_grad():
                expected = functional.cross_entropy(model(X), Y)
            torch.testing.assert_close(losses[r, s], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "oplora", "scalar"])
def test_a_diverged_member_disturbs_nobody(method):
    _, one = trained(method, [1e-2], [3])
    _, both = trained(method, [1e-2, 1e20], [3])
    assert both.diverged.tolist() == [[False], [True]]
    assert both.losses[1, 0, -1].isnan()
    torch.testing.assert_close(both.losses[0], one.losses[0])
    torch.testing.assert_close(both.thetas[0][0], one.thetas[0][0], rtol=1e-4, atol=1e-6)


def test_frozen_weights_that_differ_between_seeds_are_refused():
    members = [Member.of(*started("lora", seed, 1.0)) for seed in (0, 1)]
    other = copy.deepcopy(members[1])
    other.layers[0].W.add_(1)
    with pytest.raises(ValueError, match="changes the frozen weights"):
        adapt([members[0], other], [1.0], [0, 1], X, Y, optimizer=ADAMW, points=1, **TRAINING)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_forward_pass_merged_weights_and_gradients_are_pefts(method):
    model, _ = started(method, 1, 1.0)
    model = model.double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name:
                p.add_(0.1 * torch.randn_like(p))
    layers, thetas = layers_of(model), thetas_of(model)
    x = X.double()
    torch.testing.assert_close(logits(layers, thetas, x), model(x).detach())
    functional.cross_entropy(model(x), Y).backward()
    expected = [p.grad for name, p in model.named_parameters() if "lora" in name]
    found = [torch.empty(1, len(theta), dtype=theta.dtype) for theta in thetas]
    value = gradients(layers, [theta[None] for theta in thetas], found, x, Y)
    torch.testing.assert_close(value[0], functional.cross_entropy(model(x), Y).detach())
    torch.testing.assert_close(
        torch.cat(found, 1)[0], torch.cat([g.flatten() for g in expected]), rtol=1e-9, atol=1e-12
    )
    ours = [layer.weight(theta) for layer, theta in zip(layers, thetas)]
    merged = model.merge_and_unload()  # in place
    for weight, layer in zip(ours, (merged.hidden, merged.output)):
        torch.testing.assert_close(weight, layer.weight.detach())


def test_adapters_of_another_form_are_refused():
    model = get_peft_model(copy.deepcopy(BASE), LoraConfig(r=2, target_modules=["output"]))
    with pytest.raises(ValueError, match="LoRA and DoRA in both layers"):
        layers_of(model)


def test_power_iteration_finds_the_largest_of_a_known_hessian():
    torch.manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    H = Q @ torch.diag(torch.tensor([1.0, -7.0, 3.0, 0.5, 0.0]).double()) @ Q.T
    at = torch.randn(5, dtype=torch.float64)
    eigenvalue, v = power_iteration(grad(lambda x: x @ H @ x / 2), at, 60)
    assert eigenvalue.item() == pytest.approx(-7, rel=1e-9)
    assert abs(v @ Q[:, 1]).item() == pytest.approx(1, rel=1e-9)


def test_the_top_direction_is_the_hessians():
    torch.manual_seed(0)
    shapes = [(torch.Size((2, 7)), torch.Size((5, 2))), (torch.Size((2, 5)), torch.Size((10, 2)))]
    layers = [
        Layer(torch.randn(b[0], a[1]).double(), torch.randn(b[0]).double(), [a, b], 1.5)
        for a, b in shapes
    ]
    sizes = [24, 30]
    thetas = [torch.randn(2, size).double() for size in sizes]
    x = torch.rand(44, 7).double()
    found = along_top(layers, thetas, x, Y, 300)
    for s in range(2):
        f = lambda t: loss(layers, t.split(sizes), x, Y)  # noqa: E731
        at = torch.cat([theta[s] for theta in thetas])
        values, vectors = torch.linalg.eigh(hessian(f)(at))
        top, g = values.abs().argmax(), grad(f)(at)
        expected = [abs(vectors[:, top] @ g), values[top], g.norm()]
        torch.testing.assert_close(found[:, s], torch.stack(expected), rtol=1e-4, atol=1e-6)


def kappa(matrix):
    sigma = torch.linalg.svdvals(matrix)
    return (sigma[0] / sigma[-1]).item()


def test_condition_numbers_are_those_of_the_literal_hessians():
    torch.manual_seed(0)
    W, x, labels = torch.randn(4, 3), torch.randn(30, 3), torch.randint(4, (30,))
    layer = Layer(W, torch.randn(4), [torch.Size((2, 3)), torch.Size((4, 2))], 0.5)
    theta = torch.randn(14)
    found = condition_numbers(layer, theta, x, labels, damping=0.01, iterations=500)
    A, B = (part.double() for part in layer.tensors(theta))

    def f(W):
        scores = x.double() @ W.T + layer.bias.double()
        return functional.cross_entropy(scores, labels) + 0.005 * W.square().sum()

    literal = torch.autograd.functional.hessian
    merged = lambda A, B: W.double() + 0.5 * B @ A  # noqa: E731
    wanted = {
        "H_W": literal(f, merged(A, B)).reshape(12, 12),
        "H_A": literal(lambda A: f(merged(A, B)), A).reshape(6, 6),
        "H_B": literal(lambda B: f(merged(A, B)), B).reshape(8, 8),
        "A": A,
        "B": B,
    }
    assert found == pytest.approx({name: kappa(H) for name, H in wanted.items()}, rel=1e-5)
    _, upper = bounds(found["H_W"], found["B"])
    assert found["H_A"] <= upper


def test_bounds_of_equation_3():
    """Both hold where B is square; with fewer columns than rows the lower one need not."""
    torch.manual_seed(0)
    for r, trials in ((4, 200), (2, 200)):
        for _ in range(trials):
            root, B = torch.randn(12, 12).double(), torch.randn(4, r).double()
            H = root @ root.T + 0.1 * torch.eye(12)
            wide = torch.kron(B, torch.eye(3).double())  # of W (4, 3), row by row
            found = kappa(wide.T @ H @ wide)
            low, high = bounds(kappa(H), kappa(B))
            assert found <= high * (1 + 1e-9) and (r < 4 or found >= low * (1 - 1e-9))
    H, B = torch.diag(torch.tensor([1.0, 1.0, 100.0])), torch.eye(3)[:, :2]
    assert kappa(B.T @ H @ B) == 1 and bounds(kappa(H), kappa(B)) == (100, 100)


def test_the_plane_holds_two_straight_paths_and_the_loss_on_it_is_the_networks():
    layers, batch = trained("lora", [1e-2], [0, 1])
    ends = [[theta[0, s] for theta in batch.thetas] for s in (0, 1)]
    paths = [[torch.stack([theta * 0, theta]) for theta in end] for end in ends]
    moved = [changes(layers, path) for path in paths]
    basis, explained = plane(moved)
    assert explained == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(basis @ basis.T, torch.eye(2), rtol=0, atol=1e-5)
    found = surface(layers, paths, X, Y, resolution=4)
    for path, change in zip(found.paths, moved):
        torch.testing.assert_close(path @ basis, change, rtol=1e-3, atol=1e-5)
    model = copy.deepcopy(BASE)
    change = found.x[3] * basis[0] + found.y[1] * basis[1]
    with torch.no_grad():
        for layer, part in zip((model.hidden, model.output), change.split([6 * 784, 60])):
            layer.weight += part.view_as(layer.weight)
        expected = functional.cross_entropy(model(X), Y)
    torch.testing.assert_close(found.loss[1, 3], expected, rtol=1e-4, atol=1e-5)


def test_digits_of_the_package_are_split_once(tmp_path):
    sides = digits.packaged(10, write_package(tmp_path))
    assert [len(sides[side][1]) for side in ("train", "test")] == [30, 10]
    every = torch.cat([images for images, _ in sides.values()])
    labels = torch.cat([labels for _, labels in sides.values()])
    assert len(every.unique(dim=0)) == 40 and labels.bincount().tolist() == [4] * 10
    assert torch.equal(every[:, 1:11].argmax(1), labels)
    assert torch.equal(digits.packaged(10, tmp_path)["test"][0], sides["test"][0])
    with pytest.raises(ValueError, match="test=40"):
        digits.packaged(40, tmp_path)


def test_a_turn_is_about_the_centre_and_no_turn_changes_nothing(monkeypatch):
    images = torch.rand(3, 784)
    torch.testing.assert_close(digits.rotated(images, 0.0, 0), images, rtol=0, atol=1e-5)
    turned = digits.rotated(images, 180.0, 0)
    assert torch.equal(turned, digits.rotated(images, 180.0, 0))
    assert not torch.allclose(turned, digits.rotated(images, 180.0, 1))
    monkeypatch.setattr(torch, "rand", lambda n, generator: torch.ones(n))
    quarter = torch.rot90(images.view(3, 28, 28), 1, (1, 2)).flatten(1)
    torch.testing.assert_close(digits.rotated(images, 90.0, 0), quarter, rtol=0, atol=1e-4)


def test_the_network_is_trained_once_for_all_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("OPLORA_CACHE", str(tmp_path))
    options = dict(hidden=32, epochs=40, batch_size=8, lr=1e-2, seed=0)
    first = pretrained(X, Y, **options)
    assert functional.cross_entropy(first(X), Y) < 0.2
    monkeypatch.setattr(torch.optim, "Adam", None)  # must not be asked again
    for a, b in zip(first.parameters(), pretrained(X, Y, **options).parameters()):
        assert torch.equal(a, b)
    with pytest.raises(TypeError):
        pretrained(X, 9 - Y, **options)  # other digits, another network


SMALL = [
    "seeds=[0,1]", "rates=[1e-4,1e-2]", "pretraining.hidden=6",
    "pretraining.epochs=2", "pretraining.batch_size=8", "training.epochs=2",
    "training.batch_size=8", "training.points=4", "log_every=4", "curvature.every=2",
    "curvature.images=20", "condition_numbers.images=20", "surface.images=20",
    "surface.resolution=3", "mlp_width=4", "rank=2",
]  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    write_package(tmp_path / "cache" / "mnist-digits-1.1.0")
    return tmp_path


def start(folder, *overrides, data=("preset=small", "data.test=10")):
    command = [sys.executable, "experiments/rotated_mnist.py", *SMALL, *data, *overrides]
    return run_here([*command, f"runtime.runs_dir={folder}"])


def only_run(folder):
    (path,) = folder.rglob("metrics.json")
    with numpy.load(path.parent / "curves.npz") as archive:
        return json.loads(path.read_text()), dict(archive)


def test_the_experiment_twice(cache):
    for name in "ab":
        done = start(cache / name, "method=oplora")
        assert done.returncode == 0, done.stderr
    (metrics, curves), (again, same) = only_run(cache / "a"), only_run(cache / "b")
    drop = ("train_seconds", "peak_memory_bytes")
    assert all(metrics[key] == again[key] for key in metrics if key not in drop)
    for name, values in curves.items():
        numpy.testing.assert_array_equal(values, same[name])
    final = numpy.array(metrics["final_loss"], float)  # None: diverged
    means = numpy.where(numpy.isnan(final), numpy.inf, final).mean(1)
    assert final.shape == (2, 2) and metrics["best_rate"] == [1e-4, 1e-2][means.argmin()]
    assert metrics["train_images"] == 30 and len(metrics["condition_numbers"]["H_A"]) == 2
    assert curves["loss"].shape == (2, 2, 2) and curves["best_paths"].shape == (2, 5, 2)
    assert curves["projection"].shape == (2, 2, 3) and (curves["projection"] > 0).all()
    assert "finished already" in start(cache / "a", "method=oplora").stdout


def test_what_has_no_hessian_and_no_counterpart_has_none(cache):
    assert start(cache / "runs", "method=dora").returncode == 0
    metrics, curves = only_run(cache / "runs")
    assert "condition_numbers" not in metrics and set(curves) == {"loss"}


def test_the_papers_digits_by_a_stand_in(cache):
    stand_in = ("preset=paper", f"data.path={write_hub(cache / 'hub')}", "data.revision=null")
    done = start(cache / "runs", "method=lora", data=stand_in)
    assert done.returncode == 0, done.stderr
    metrics, _ = only_run(cache / "runs" / "rotated_mnist" / "paper")
    assert (metrics["train_images"], metrics["test_images"]) == (30, 10)
    images, labels = digits.hub(str(cache / "hub"))["test"]
    pixels = numpy.random.default_rng(10).integers(0, 256, (28, 28), numpy.uint8)
    assert torch.equal(images[0], torch.from_numpy(pixels).flatten() / 255)
    assert labels.tolist() == list(range(10))


@pytest.mark.parametrize(
    "wrong, words",
    [
        ("method=lora_pro", "this method is not for this experiment"),
        ("method=oplora_lite", "which the batch cannot follow"),
        ("method=mf", "this method is not for this experiment"),
        ("method=full", "choose another method"),
        ("optimizer=prodigy", "use optimizer=adamw"),
        ("rates=[0.1,fast]", "rates=[0.1, 'fast']"),
        ("seeds=3", "seeds=3"),
        ("data.test=40", "test=40"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(cache, wrong, words):
    done = start(cache / "runs", wrong)
    assert done.returncode == 2 and words in done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1
    assert not list((cache / "runs").rglob("metrics.json"))
