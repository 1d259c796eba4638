"""LoRA-Pro and LoRA-RITE in lockstep with literal references, and what defines each of them."""

import copy
import io
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import oplora.baselines.lora_pro
import oplora.baselines.pairs
from oplora.baselines import (
    LoRAPro,
    LoRARITE,
    create_lora_pro_optimizer,
    create_lora_rite_optimizer,
)
from oplora.baselines.lora_pro import balance, closest, gram_spectra

SIZES = [(4, 10, 7), (4, 10, 7), (3, 6, 9)]  # r, d_in, d_out
SCALINGS = [2.0, 2.0, 0.5]
BETAS, EPS = (0.9, 0.99), 1e-6
MAKERS = {
    "equivalent": lambda groups, **kw: LoRAPro(groups, **kw),
    "factor": lambda groups, **kw: LoRAPro(groups, moments="factor", **kw),
    "rite": lambda groups, **kw: LoRARITE(groups, **kw),
}
FACTORIES = {
    "equivalent": create_lora_pro_optimizer,
    "factor": lambda model, **kw: create_lora_pro_optimizer(model, moments="factor", **kw),
    "rite": create_lora_rite_optimizer,
}
every_optimizer = pytest.mark.parametrize("name", MAKERS)


class ReferencePro:
    """LoRA-Pro on one layer as printed: explicit inverses, a Kronecker solve, full matrices."""

    def __init__(self, A, B, s, lr, wd, moments, delta=1e-8):
        self.A, self.B, self.s, self.lr, self.wd, self.delta = A, B, s, lr, wd, delta
        self.moments, self.t = moments, 0
        self.mean, self.square = {}, {}

    def adam(self, key, g):
        b1, b2 = BETAS
        self.mean[key] = b1 * self.mean.get(key, 0) + (1 - b1) * g
        self.square[key] = b2 * self.square.get(key, 0) + (1 - b2) * g**2
        mean, square = self.mean[key] / (1 - b1**self.t), self.square[key] / (1 - b2**self.t)
        return mean / (square.sqrt() + EPS)

    def adjust(self, gA, gB, with_X):
        A, B, s = self.A, self.B, self.s
        eye_r, eye_out = torch.eye(len(A)).to(A), torch.eye(len(B)).to(A)
        AAt, BtB = A @ A.T + self.delta * eye_r, B.T @ B + self.delta * eye_r
        dA = BtB.inverse() @ gA / s**2
        dB = (eye_out - B @ BtB.inverse() @ B.T) @ gB @ AAt.inverse() / s**2
        if not with_X:
            return dA, dB
        # row-major vec: vec(B^T B X + X A A^T) = (B^T B ⊗ I + I ⊗ A A^T) vec(X)
        system = torch.kron(B.T @ B, eye_r) + torch.kron(eye_r, A @ A.T)
        right = -BtB.inverse() @ gA @ A.T / s**2
        X = torch.linalg.solve(system, right.reshape(-1)).reshape(right.shape)
        return dA + X @ A, dB - B @ X

    def step(self, gA, gB):
        self.t += 1
        decay = 1 - self.lr * self.wd
        if self.moments == "factor":
            dA, dB = self.adjust(gA, gB, with_X=True)
            dA, dB = self.adam("A", dA), self.adam("B", dB)
        else:
            decay = math.sqrt(decay)
            dA, dB = self.adjust(gA, gB, with_X=False)
            U = self.adam("W", self.s * self.B @ dA + self.s * dB @ self.A)
            dA, dB = self.adjust(self.s * self.B.T @ U, self.s * U @ self.A.T, with_X=True)
        self.A, self.B = decay * self.A - self.lr * dA, decay * self.B - self.lr * dB


class ReferenceRITE:
    """LoRA-RITE on one layer as printed: QR, inverse matrix roots, one factor after the other."""

    def __init__(self, A, B, s, lr, wd):
        self.A, self.B, self.lr, self.wd, self.t = A, B, lr, wd, 0
        self.M, self.V, self.rho, self.U = {}, {}, {"A": 0.0, "B": 0.0}, {}

    def change(self, key, g, other):
        """The step of one tall factor with gradient g, seen from the other tall factor."""
        b1, b2 = (b * (1 - b ** (self.t - 1)) / (1 - b**self.t) for b in BETAS)
        U, R = torch.linalg.qr(other)
        R_inverse = torch.linalg.pinv(R)
        g = g @ R_inverse
        V, M = torch.zeros_like(R), torch.zeros_like(g)
        if self.t > 1:
            P = U.T @ self.U[key]
            V, M = P @ self.V[key] @ P.T, self.M[key] @ P.T
            lost = torch.linalg.eigvalsh(self.V[key]) - torch.linalg.eigvalsh(V)
            self.rho[key] += max(lost.max().item(), 0.0)
        self.rho[key] *= b2
        V = b2 * V + (1 - b2) * g.T @ g / len(g)
        w, Q = torch.linalg.eigh(V + self.rho[key] * torch.eye(len(V)).to(V))
        S = g @ Q @ torch.diag(1 / (w.clamp(min=0).sqrt() + EPS)) @ Q.T
        M = b1 * M + (1 - b1) * S
        self.U[key], self.V[key], self.M[key] = U, V, M
        return M @ R_inverse.T

    def step(self, gA, gB):
        self.t += 1
        dA, dB = self.change("A", gA.T, self.B).T, self.change("B", gB, self.A.T)
        self.A = self.A - self.lr * (dA + self.wd * self.A)
        self.B = self.B - self.lr * (dB + self.wd * self.B)


def factors(dtype=torch.float64, zero_B=True, seed=0):
    """A1, B1, A2, B2, … of SIZES."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    pairs = [(draw(r, i) / math.sqrt(i), draw(o, r) * (not zero_B)) for r, i, o in SIZES]
    return [nn.Parameter(f.to(dtype)) for pair in pairs for f in pair]


def groups_of(params):
    """One group per scaling, as the factories make them."""
    return [
        {"params": params[:4], "scaling": SCALINGS[0]},
        {"params": params[4:], "scaling": SCALINGS[2]},
    ]


def gradients(A, B, layer, t):
    """Of 1/2 |s B A - target|^2 with some noise that differs from step to step."""
    generator = torch.Generator().manual_seed(100 * layer + t)
    target = torch.randn(len(B), A.shape[1], generator=torch.Generator().manual_seed(layer))
    noise = torch.randn(len(B), A.shape[1], generator=generator)
    s = SCALINGS[layer]
    G = s * B @ A - target.to(A) + 0.3 * noise.to(A)
    return s * B.T @ G, s * G @ A.T


def set_gradients(params, t, skip=()):
    with torch.no_grad():
        for layer in range(len(SIZES)):
            A, B = params[2 * layer : 2 * layer + 2]
            grads = gradients(A, B, layer, t) if layer not in skip else (None, None)
            A.grad, B.grad = grads


def train(params, optimizer, steps):
    for t in steps:
        set_gradients(params, t)
        optimizer.step()


def tiny_model(**config):
    torch.manual_seed(0)
    layers = dict(a=nn.Linear(12, 16), relu=nn.ReLU(), b=nn.Linear(16, 12), c=nn.Linear(12, 4))
    base = nn.Sequential()
    for name, layer in layers.items():
        base.add_module(name, layer)
    return get_peft_model(base, LoraConfig(**{"r": 3, "target_modules": ["a", "b"], **config}))


@pytest.mark.parametrize("zero_B", [True, False])
@pytest.mark.parametrize("wd", [0.0, 0.1])
@every_optimizer
def test_lockstep_with_the_reference(name, wd, zero_B):
    params, lr = factors(zero_B=zero_B), 2e-2
    optimizer = MAKERS[name](groups_of(params), lr=lr, betas=BETAS, eps=EPS, weight_decay=wd)
    start = [p.detach().clone() for p in params]
    references = [
        ReferenceRITE(A, B, s, lr, wd) if name == "rite" else ReferencePro(A, B, s, lr, wd, name)
        for A, B, s in zip(start[::2], start[1::2], SCALINGS, strict=True)
    ]
    for t in range(15):
        skip = {1} if t in (0, 6) else ()  # layer 1 has another step count than its twin
        set_gradients(params, t, skip)
        optimizer.step()
        for layer, reference in enumerate(references):
            if layer not in skip:
                reference.step(*gradients(reference.A, reference.B, layer, t))
            expected = {"rtol": 1e-9, "atol": 1e-10}
            torch.testing.assert_close(params[2 * layer], reference.A, **expected)
            torch.testing.assert_close(params[2 * layer + 1], reference.B, **expected)


@every_optimizer
def test_batches_and_pieces_do_not_matter(name, monkeypatch):
    whole, pieces = factors(), factors()
    train(whole, MAKERS[name](groups_of(whole)), range(5))
    monkeypatch.setattr(oplora.baselines.pairs, "BATCH_VALUES", 1)
    monkeypatch.setattr(oplora.baselines.lora_pro, "SCRATCH_VALUES", {"cpu": 25})
    train(pieces, MAKERS[name](groups_of(pieces)), range(5))
    torch.testing.assert_close(whole, pieces, rtol=1e-10, atol=1e-12)


def test_pro_equivalent_gradient_is_the_closest():
    A, B = factors(zero_B=False)[:2]
    A, B, At = A.detach(), B.detach(), A.detach().T.contiguous()
    generator = torch.Generator().manual_seed(2)
    G = torch.randn(7, 10, dtype=torch.float64, generator=generator)
    # all that (dA, dB) can do to W, as a matrix on vec(dA), vec(dB)
    reach = torch.cat([torch.kron(B, torch.eye(10)), torch.kron(torch.eye(7), At)], 1)
    best = (reach @ torch.linalg.lstsq(reach, G.reshape(-1), driver="gelsd").solution).view(7, 10)
    gA, gB = B.T @ G, G @ A.T
    batch = [x[None] for x in (A, B, gA, gB)]
    grams = gram_spectra(*batch[:2], delta=1e-14)
    dA, dB = closest(*batch, grams)
    torch.testing.assert_close((B @ dA + dB @ A)[0], best, rtol=0, atol=1e-9)
    X = torch.randn(4, 4, dtype=torch.float64, generator=generator)
    torch.testing.assert_close((B @ (dA + X @ A) + (dB - B @ X) @ A)[0], best, rtol=0, atol=1e-9)
    # the Sylvester solution is, of all X, the one that stays nearest to the original gradients
    nA, nB = balance(*batch[:2], dA, dB, grams)
    torch.testing.assert_close((B @ nA + nB @ A)[0], best, rtol=0, atol=1e-9)
    moved = torch.cat([torch.kron(torch.eye(4), At), -torch.kron(B, torch.eye(4))])
    away = torch.cat([(gA - dA[0]).reshape(-1), (gB - dB[0]).reshape(-1)])
    X = torch.linalg.lstsq(moved, away).solution.view(4, 4)
    torch.testing.assert_close(nA[0], dA[0] + X @ A, rtol=0, atol=1e-9)


@pytest.mark.parametrize("zero_B", [True, False])
def test_rite_depends_on_the_product_alone(zero_B):
    one, other = factors(zero_B=zero_B), factors(zero_B=zero_B)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for A, B in zip(other[::2], other[1::2], strict=True):
            T = torch.randn(len(A), len(A), generator=generator, dtype=A.dtype)
            T += 3 * torch.eye(len(A))
            A.copy_(T @ A)
            B.copy_(B @ T.inverse())
    optimizers = [LoRARITE(p, lr=2e-2, betas=BETAS, weight_decay=0.1) for p in (one, other)]
    adam = [torch.optim.Adam(copy.deepcopy(p), lr=2e-2) for p in (one, other)]
    for t in range(15):
        train(one, optimizers[0], [t])
        train(other, optimizers[1], [t])
        for i in range(0, len(one), 2):
            torch.testing.assert_close(
                one[i + 1] @ one[i], other[i + 1] @ other[i], rtol=1e-9, atol=1e-10
            )
    assert one[1].abs().max() > 0.05
    # the test can fail: Adam's trajectories part at once
    for optimizer in adam:
        train(optimizer.param_groups[0]["params"], optimizer, range(2))
    A, B, C, D = (p for o in adam for p in o.param_groups[0]["params"][:2])
    assert not torch.allclose(B @ A, D @ C, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_optimizer
def test_resume_is_bit_identical(name, dtype):
    """Also after a step that some layers missed, through a file and weights_only loading."""
    through, before = factors(dtype), factors(dtype)
    optimizer = MAKERS[name](groups_of(through), lr=2e-2, weight_decay=0.1)
    set_gradients(through, 0, skip={1})
    optimizer.step()
    train(through, optimizer, range(1, 4))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    with torch.no_grad():
        for p, q in zip(before, through, strict=True):
            p.copy_(q)
    file.seek(0)
    resumed = MAKERS[name](groups_of(before), lr=1.0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(through, optimizer, range(4, 8))
    train(before, resumed, range(4, 8))
    for p, q in zip(before, through, strict=True):
        assert torch.equal(p, q)
        assert resumed.state[p].keys() == optimizer.state[q].keys()
        for key, value in resumed.state[p].items():
            assert torch.equal(value, optimizer.state[q][key])
            assert value.dtype in (torch.float32, torch.float64)


@every_optimizer
def test_bf16_adapters_follow_fp32_ones(name):
    single, half = factors(torch.float32), factors(torch.bfloat16)
    start = [p.detach().clone() for p in single]
    train(single, MAKERS[name](groups_of(single), lr=1e-2), range(6))
    train(half, MAKERS[name](groups_of(half), lr=1e-2), range(6))
    for a, b, first in zip(single, half, start, strict=True):
        assert b.dtype == torch.bfloat16
        assert (a - b.float()).norm() < 0.25 * (a - first).norm()


@every_optimizer
def test_reduces_the_loss_of_a_peft_model(name):
    model = tiny_model(rank_pattern={"b": 2}, use_dora=True)
    optimizer = FACTORIES[name](model, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40, eta_min=1e-3)
    teacher, x = copy.deepcopy(model), torch.randn(64, 12)
    for n, p in teacher.named_parameters():
        if "lora_B" in n:
            nn.init.normal_(p)
    target, losses = teacher(x).detach(), []
    for _ in range(40):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(group["lr"] == pytest.approx(1e-3) for group in optimizer.param_groups)
    assert all(p.grad is None for p in model.parameters())


@every_optimizer
def test_fp32_stands_gradients_of_low_rank(name):
    """Singular values that are rounding noise are not inverted; the first step has lr 0."""
    draw, ranks = torch.Generator().manual_seed(0), torch.arange(12) // 4 + 1
    pairs = [(torch.randn(8, 64, generator=draw) / 8, torch.zeros(48, 8)) for _ in ranks]
    params = [nn.Parameter(factor) for pair in pairs for factor in pair]
    targets = [
        torch.randn(48, rank, generator=draw) @ torch.randn(rank, 64, generator=draw) / 1000
        for rank in ranks
    ]
    optimizer = MAKERS[name](params, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1, t / 5))
    history = []
    for _ in range(100):
        layers = zip(params[::2], params[1::2], targets, strict=True)
        losses = torch.stack([(2 * B @ A - target).square().mean() for A, B, target in layers])
        losses.sum().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        history.append(losses.detach())
    relative = torch.stack(history) / history[0]
    assert relative.max() < 1.5 and relative[-1].max() < 0.7


class Mixed(nn.Module):
    """One layer of every kind that PEFT's LoRA adapts."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(11, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.lin, self.lin2, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.experts = nn.Module()
        self.experts.weight = nn.Parameter(torch.randn(2, 8, 8))


@pytest.mark.parametrize(
    ("config", "others"),
    [
        ({"use_dora": True}, ("embed.lora_embedding_A", "conv.lora_A", "lin.lora_magnitude")),
        ({"lora_bias": True, "bias": "lora_only"}, ("lin.lora_B.default.bias", "base_layer.bias")),
        ({"target_parameters": ["experts.weight"]}, ("experts.lora_A", "experts.lora_B")),
    ],
)
def test_factory_pairs_linear_layers_and_leaves_the_rest_to_adamw(config, others):
    targets = ["embed", "conv"] * ("use_dora" in config) + ["lin", "lin2"]
    common = dict(r=2, lora_alpha=4, alpha_pattern={"lin2": 6}, modules_to_save=["head"])
    model = get_peft_model(Mixed(), LoraConfig(target_modules=targets, **common, **config))
    optimizer = create_lora_pro_optimizer(model, lr=1e-3)
    *paired, rest = optimizer.param_groups
    assert all(group["pairs"] for group in paired) and not rest["pairs"]
    assert {g["scaling"]: [n.split(".", 2)[2] for n in g["param_names"]] for g in paired} == {
        2.0: ["lin.lora_A.default.weight", "lin.lora_B.default.weight"],
        3.0: ["lin2.lora_A.default.weight", "lin2.lora_B.default.weight"],
    }
    for kind in (*others, "head.modules_to_save"):
        assert any(kind in name for name in rest["param_names"])
    covered = [p for group in optimizer.param_groups for p in group["params"]]
    trainable = {p for p in model.parameters() if p.requires_grad}
    assert len(covered) == len(trainable) and set(covered) == trainable
    rite = create_lora_rite_optimizer(model, lr=1e-3)
    assert [len(group["params"]) for group in rite.param_groups] == [4, len(rest["params"])]


@every_optimizer
def test_other_parameters_are_updated_by_adamw(name):
    options = dict(lr=1e-2, betas=BETAS, eps=EPS, weight_decay=0.1)
    ours, theirs = factors(torch.float32), factors(torch.float32)
    train(ours, MAKERS[name]([{"params": ours, "pairs": False}], **options), range(5))
    train(theirs, torch.optim.AdamW(theirs, **options), range(5))
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@every_optimizer
def test_missing_gradients_are_skipped(name):
    params = factors()
    params += [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    optimizer = MAKERS[name]([*groups_of(params[:6]), {"params": params[6:], "pairs": False}])
    before = [p.detach().clone() for p in params]
    set_gradients(params, 0)
    params[2].grad = params[5].grad = None  # of a pair, one gradient is as good as none
    params[6].grad = torch.ones(3)
    optimizer.step()
    moved = {i for i, p in enumerate(params) if not torch.equal(p, before[i])}
    assert moved == {1, 6}  # A of the first layer has no gradient yet: B is zero
    assert all(not optimizer.state.get(params[i]) for i in (2, 3, 4, 5, 7))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["a.lora_A", "b.lora_B", "modules_to_save"])
@every_optimizer
def test_nonfinite_gradients_change_nothing(name, which, value):
    model = tiny_model(modules_to_save=["c"])
    optimizer = FACTORIES[name](model, lr=1e-2)
    for _ in range(3):
        model(torch.randn(5, 12)).square().sum().backward()
        optimizer.step()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    bad = next(n for n in named if which in n)
    named[bad].grad.view(-1)[1] = value
    before = copy.deepcopy([dict(model.named_parameters()), optimizer.state_dict()["state"]])
    with pytest.raises(FloatingPointError, match=bad.replace(".", r"\.")):
        optimizer.step()
    parameters, state = before
    assert all(torch.equal(p, parameters[n]) for n, p in model.named_parameters())
    now = optimizer.state_dict()["state"]
    assert now.keys() == state.keys()
    for i in state:
        assert all(torch.equal(now[i][key], state[i][key]) for key in state[i])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
)
@every_optimizer
def test_wrong_options(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        MAKERS[name](factors(), **kwargs)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 5)], "unpaired"),
        ([(2, 5), (6, 3)], "no pair"),
        ([(6, 2), (2, 5)], "no pair"),
        ([(2, 5, 1), (6, 2)], "no pair"),
    ],
)
@every_optimizer
def test_wrong_factors(name, shapes, message):
    tensors = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        MAKERS[name](tensors)
    optimizer = MAKERS[name](factors())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": tensors})
    assert len(optimizer.param_groups) == 1


def test_wrong_options_of_lora_pro():
    for kwargs in ({"moments": "both"}, {"delta": 0.0}, {"scaling": -1.0}):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            LoRAPro(factors(), **kwargs)
    A, B = factors()[:2]
    with pytest.raises(ValueError, match="one dtype"):
        LoRAPro([A, nn.Parameter(B.detach().bfloat16())])


@every_optimizer
def test_models_that_cannot_be_paired(name):
    model = tiny_model()
    model.base_model.model.b.lora_A.default.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"model\.b: only one of lora_A and lora_B"):
        FACTORIES[name](model, lr=1e-3)
    with pytest.raises(ValueError, match="no trainable LoRA"):
        FACTORIES[name](nn.Linear(2, 2), lr=1e-3)
