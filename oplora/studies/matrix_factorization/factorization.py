"""Matrix factorization M ≈ B A by gradient descent, plain and with A and B from MLPs.

The paper's case study (section 4.1, Figures 2-4). All runs of a method, every learning rate
with every seed, are one batched tensor program: member (rate l, seed s) is row l * seeds + s of
every tensor. Members never interact, so one that diverges disturbs nobody.
"""

import math
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor
from tqdm import tqdm

from oplora.mlp import MLPWeights, generate, initial_mlp, pullback
from oplora.rank1 import rank1_adamw_, rank1_momentum_, rank1_sgd_

DIVERGED = 1e3  # a loss of this many times its first value is recorded as diverged
CURVES = (
    "mse",
    "gradient_norm",  # of A and B
    "gradient_cosine",  # of the gradients of A and B now and 10 steps before
    "effective_rank",  # of B A
    "hidden_l1",  # |h|_1, mean of both MLPs
    "step_multiplier",  # of the step of A and B, mean of both MLPs
)


@dataclass(frozen=True)
class Problem:
    """What is factorized, and for how long (defaults: the paper's)."""

    rows: int = 100
    columns: int = 100
    rank: int = 8
    condition_number: float | None = None  # None: U(0, 1) entries; else a geometric spectrum
    loss: str = "mse"  # or "frobenius": rows * columns times larger (the paper's formula)
    steps: int = 1000
    warmup_steps: int = 50
    log_every: int = 5

    def __post_init__(self):
        for name in ("rows", "columns", "rank", "steps", "warmup_steps", "log_every"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name}={getattr(self, name)!r} must be an integer")
        if not isinstance(self.condition_number, int | float | None):
            raise ValueError(f"condition_number={self.condition_number!r} must be a number or null")
        if not 1 <= self.rank < min(self.rows, self.columns):
            raise ValueError(
                f"rank={self.rank} must be at least 1 and below min(rows, columns) = "
                f"{min(self.rows, self.columns)}"
            )
        if self.loss not in ("mse", "frobenius"):
            raise ValueError(f"loss={self.loss!r} is unknown: use mse or frobenius")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be below steps={self.steps}")
        if self.log_every < 1 or 10 % self.log_every:
            raise ValueError(f"log_every={self.log_every} must be 1, 2, 5 or 10")
        if self.condition_number is not None and self.condition_number < 1:
            raise ValueError(f"condition_number={self.condition_number} must be at least 1")

    def target(self, seed: int) -> Tensor:
        """M (rows, columns) with entries U(0, 1), or of that norm with the given spectrum."""
        rng = numpy.random.default_rng(seed)
        M = torch.from_numpy(rng.random((self.rows, self.columns))).float()
        if self.condition_number is None:
            return M
        gaussian = torch.from_numpy(rng.standard_normal(M.shape)).float()
        U, _, Vh = torch.linalg.svd(gaussian, full_matrices=False)
        exponents = torch.linspace(0, 1, min(self.rows, self.columns))
        spectrum = self.condition_number**-exponents
        return (U * (spectrum * M.norm() / spectrum.norm())) @ Vh

    def factor(self, step: int) -> float:
        """Linear warm-up, then linear decay to zero."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return (self.steps - step) / (self.steps - self.warmup_steps)


def svd_reference(M: Tensor, rank: int) -> dict[str, float]:
    """The best that rank `rank` can do (Eckart-Young), and how hard M is."""
    sigma = torch.linalg.svdvals(M.double())
    return {
        "svd_mse": (sigma[rank:].square().sum() / M.numel()).item(),
        "rank1_mse": (sigma[1:].square().sum() / M.numel()).item(),
        "svd_effective_rank": effective_rank(sigma[:rank]).item(),
        "condition_number": (sigma[0] / sigma[-1]).item(),
    }


def effective_rank(sigma: Tensor) -> Tensor:
    """exp(-Σ p log p) with p = σ / Σσ, over the last dimension (OP-LoRA, section 4.1)."""
    p = sigma / sigma.sum(-1, keepdim=True)
    return torch.exp(torch.special.entr(p).sum(-1))


def product_singular_values(B: Tensor, A: Tensor) -> Tensor:
    """Singular values of B A (…, r) from r x r problems: σ² = eig(Lᵀ BᵀB L) with AAᵀ = LLᵀ."""
    A, B = A.double(), B.double()
    gram = A @ A.mT
    jitter = 1e-14 * gram.diagonal(dim1=-2, dim2=-1).mean(-1) + 1e-300
    L = torch.linalg.cholesky_ex(
        gram + jitter[..., None, None] * torch.eye(A.shape[-2], dtype=A.dtype)
    )[0]
    BL = B @ L
    return torch.linalg.eigvalsh(BL.mT @ BL).clamp(min=0).sqrt()


# Update rules with a learning rate per member: torch.optim has one rate per group


class SGD:
    """x ← x - lr g, for tensors with members in the first dimension."""

    follows_scale = True  # are the steps proportional to the loss?

    def dense(self, name: str, x: Tensor, g: Tensor, lr: Tensor):
        x.addcmul_(_like(lr, x), g, value=-1)

    def rank1(self, name: str, W: Tensor, h: Tensor, g: Tensor, lr: Tensor):
        rank1_sgd_(W, h, g, lr[:, None])

    def multiplier(self, h: Tensor) -> Tensor:
        """Step of theta over lr g while h stands still: W2 moves by lr h ⊗ g, b2 by lr g."""
        return 1 + h.square().sum(-1)

    def tick(self):
        """Called once a step, before the updates."""


class Momentum(SGD):
    """torch.optim.SGD with momentum."""

    def __init__(self, momentum: float = 0.9):
        self.momentum, self.buffers = momentum, {}

    def dense(self, name, x, g, lr):
        buffer = self._buffer(name, x).mul_(self.momentum).add_(g)
        x.addcmul_(_like(lr, x), buffer, value=-1)

    def rank1(self, name, W, h, g, lr):
        rank1_momentum_(W, self._buffer(name, W), h, g, lr[:, None], self.momentum)

    def _buffer(self, name: str, x: Tensor) -> Tensor:
        if name not in self.buffers:
            self.buffers[name] = torch.zeros_like(x)
        return self.buffers[name]


class Adam(SGD):
    """torch.optim.Adam, without weight decay."""

    follows_scale = False

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        self.betas, self.eps, self.moments = tuple(betas), eps, {}
        self.step = torch.zeros((), dtype=torch.float32)

    def tick(self):
        self.step += 1

    def dense(self, name, x, g, lr):  # as one row with h = 1
        flat = (x.flatten(1).unsqueeze(1), g.flatten(1))
        self.rank1(name, flat[0], x.new_ones(len(x), 1), flat[1], lr)

    def rank1(self, name, W, h, g, lr):
        if name not in self.moments:
            self.moments[name] = (torch.zeros_like(W), torch.zeros_like(W))
        options = dict(lr=lr[:, None], betas=self.betas, eps=self.eps)
        rank1_adamw_(W, *self.moments[name], h, g, self.step, **options)

    def multiplier(self, h: Tensor) -> Tensor:
        """Adam moves each entry of row j of W2 by lr u sign(h_j), b2 by lr u: lr u (1 + |h|_1)."""
        return 1 + h.abs().sum(-1)


# What a method trains: each returns A and B, takes their gradients, and returns the norm of the
# gradient of its own parameters


class Plain:
    """A and B are the parameters; B starts at zero, A as LoRA's (Kaiming uniform, a = sqrt 5)."""

    def __init__(self, A: Tensor, B: Tensor, rule: SGD):
        self.A, self.B, self.rule = A, B, rule
        self.trained_parameters = A[0].numel() + B[0].numel()

    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B

    def update(self, gA: Tensor, gB: Tensor, lr: Tensor) -> Tensor:
        self.rule.tick()
        self.rule.dense("A", self.A, gA, lr)
        self.rule.dense("B", self.B, gB, lr)
        return _norm(gA, gB)

    def steps(self) -> dict[str, Tensor]:
        return {"step_multiplier": torch.ones(len(self.A))}


class Predicted:
    """A and B come from one MLP each (the paper's OP-MF)."""

    def __init__(self, mlps: dict[str, MLPWeights], shapes: dict[str, tuple[int, int]], rule: SGD):
        self.mlps, self.shapes, self.rule = mlps, shapes, rule
        self.h, self.values = {}, {}
        self.trained_parameters = sum(t[0].numel() for mlp in mlps.values() for t in mlp)
        self._generate()

    def _generate(self):
        for name, mlp in self.mlps.items():
            self.h[name], theta = generate(mlp)
            self.values[name] = theta.view(-1, *self.shapes[name])

    def tensors(self):
        return self.values["A"], self.values["B"]

    def update(self, gA, gB, lr):
        self.rule.tick()
        norms = []
        for name, gradient in (("A", gA), ("B", gB)):
            mlp, h, g = self.mlps[name], self.h[name], gradient.flatten(1)
            dh = (mlp.W2 @ g.unsqueeze(-1)).squeeze(-1)
            dz, dW1, db1 = pullback(dh, mlp.z, mlp.W1, h)
            for key, tensor, grad in (
                ("z", mlp.z, dz), ("W1", mlp.W1, dW1), ("b1", mlp.b1, db1), ("b2", mlp.b2, g)
            ):  # fmt: skip
                self.rule.dense(name + key, tensor, grad, lr)
            self.rule.rank1(name + "W2", mlp.W2, h, g, lr)
            of_W2_and_b2 = _norm(g) * (1 + h.square().sum(1)).sqrt()
            norms += [_norm(dz, dW1, db1), of_W2_and_b2]
        self._generate()
        return _norm(*norms)

    def multipliers(self) -> dict[str, Tensor]:
        return {name: self.rule.multiplier(h) for name, h in self.h.items()}

    def steps(self):
        l1 = torch.stack([h.sum(-1) for h in self.h.values()]).mean(0)
        multiplier = torch.stack(list(self.multipliers().values())).mean(0)
        return {"hidden_l1": l1, "step_multiplier": multiplier}


class Matched(Plain):
    """Control: plain A and B whose steps are multiplied as those of an OP-MF run are.

    The OP-MF run of the same rate and seed goes on beside it; only its multipliers are used.
    What OP-MF does better than this does not come from the size of its steps.
    """

    def __init__(self, A, B, rule, companion: Predicted, gradients):
        super().__init__(A, B, rule)
        self.companion, self.gradients = companion, gradients
        self.multipliers = companion.multipliers()

    def update(self, gA, gB, lr):
        self.rule.tick()
        self.rule.dense("A", self.A, gA, lr * self.multipliers["A"])
        self.rule.dense("B", self.B, gB, lr * self.multipliers["B"])
        norm = _norm(gA, gB)
        _, gA, gB = self.gradients(*self.companion.tensors())
        self.companion.update(gA, gB, lr)
        for name, new in self.companion.multipliers().items():
            usable = new.isfinite() & (new < DIVERGED**2)  # after divergence: the last usable one
            self.multipliers[name] = torch.where(usable, new, self.multipliers[name])
        return norm

    def steps(self):
        return {"step_multiplier": torch.stack(list(self.multipliers.values())).mean(0)}


class Peak:
    """Of a number per member, over all steps: the first, the highest, and the lowest after that."""

    def __init__(self):
        self.first = self.highest = self.lowest = None

    def see(self, value: Tensor, alive: Tensor):
        if self.first is None:
            self.first = self.highest = self.lowest = value.clone()
        higher = alive & (value > self.highest)
        lower = alive & (value < self.lowest)
        self.highest = torch.where(higher, value, self.highest)
        self.lowest = torch.where(higher | lower, value, self.lowest)

    def figures(self, grid: tuple[int, int]) -> dict[str, list]:
        """Lists [rate][seed]."""
        parts = {"first": self.first, "highest": self.highest, "lowest_after": self.lowest}
        return {name: _lists(part.view(grid)) for name, part in parts.items()}


def build(
    method: str,
    initial_A: str,
    rule: type[SGD] | object,
    problem: Problem,
    seeds: list[int],
    rates: int,
    gradients,
    **mlp_options,
) -> Plain | Predicted | Matched:
    """The batched model; `rule` makes an update rule. Arguments: configs/method/mf*.yaml."""
    shapes = {"A": (problem.rank, problem.columns), "B": (problem.rows, problem.rank)}
    mlps, plain_A = {"A": [], "B": []}, []
    for seed in seeds:
        generator = torch.Generator().manual_seed(10_000 + seed)
        for name, start in (("A", "random"), ("B", "still")):
            zeros = torch.zeros(shapes[name])
            mlps[name].append(initial_mlp([zeros], [start], generator=generator, **mlp_options))
        bound = 1 / math.sqrt(problem.columns)
        generator = torch.Generator().manual_seed(20_000 + seed)
        plain_A.append(torch.empty(shapes["A"]).uniform_(-bound, bound, generator=generator))

    def all_members(per_seed):
        return torch.stack(per_seed).repeat(rates, *[1] * per_seed[0].ndim)

    stacked = {
        name: MLPWeights(*(all_members([m[i] for m in group]) for i in range(5)))
        for name, group in mlps.items()
    }
    predicted = Predicted(stacked, shapes, rule())
    if method == "predicted":
        return predicted
    if initial_A == "mlp":
        A = predicted.tensors()[0].clone()
    else:
        A = all_members(plain_A)
    B = torch.zeros(len(A), *shapes["B"])
    if method == "plain":
        return Plain(A, B, rule())
    return Matched(A, B, rule(), predicted, gradients)


@torch.no_grad()
def factorize(
    problem: Problem,
    seeds: list[int],
    rates: list[float],
    *,
    method: str,
    rule,
    initial_A: str = "lora",
    progress: str | None = None,
    **mlp_options,
) -> tuple[dict, dict[str, Tensor]]:
    """Train all members; final figures as lists [rate][seed], and curves (rate, seed, time).

    method: "plain", "predicted" (OP-MF) or "matched"; initial_A: "lora" or "mlp" (OP-MF's A, for
    the controls); mlp_options: `initial_mlp`. Curves hold NaN after a member has diverged.
    """
    wrong = [r for r in rates if not (isinstance(r, int | float) and 0 < r < math.inf)]
    if wrong or not rates:
        raise ValueError(f"learning rates must be positive numbers, got {wrong or rates}")
    if not seeds or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise ValueError(f"seeds must be a list of integers from 0, got {seeds}")
    grid = (len(rates), len(seeds))
    targets = torch.stack([problem.target(seed) for seed in seeds])
    M = targets.repeat(len(rates), 1, 1)
    scale = 1 / M[0].numel() if problem.loss == "mse" else 1.0

    def gradients(A, B):
        error = torch.baddbmm(M, B, A, beta=-1)
        return error, (2 * scale * B).mT @ error, error @ (2 * scale * A).mT

    model = build(method, initial_A, rule, problem, seeds, len(rates), gradients, **mlp_options)
    lr = torch.tensor(rates, dtype=torch.float32).repeat_interleave(len(seeds))
    alive, diverged_at = torch.ones_like(lr, dtype=torch.bool), torch.full_like(lr, -1)
    past: dict[int, Tensor] = {}
    logged = {name: [] for name in CURVES}
    peaks = {"adapter": Peak(), "trained": Peak()}  # of gradient norms; trained: of the MLPs
    first = None
    silent = None if progress else True  # None: where there is no terminal
    bar = tqdm(range(problem.steps + 1), desc=progress, disable=silent, mininterval=2)
    for step in bar:  # the last pass only measures
        A, B = model.tensors()
        error, gA, gB = gradients(A, B)
        mse = torch.linalg.vector_norm(error, dim=(1, 2)).square() / M[0].numel()
        first = mse if first is None else first
        dead = alive & ~(mse < DIVERGED * first)
        diverged_at[dead] = step
        alive &= ~dead
        if step % problem.log_every == 0:
            g = torch.cat([gA.flatten(1), gB.flatten(1)], 1)
            past[step] = g
            row = _diagnostics(mse, g, past.pop(step - 10, None), A, B, alive) | model.steps()
            for name in CURVES:
                value = row.get(name)
                if value is not None:
                    logged[name].append(torch.where(alive, value, torch.nan))
        if step < problem.steps:
            gA, gB = (torch.where(alive[:, None, None], x, 0) for x in (gA, gB))
            trained = model.update(gA, gB, lr * problem.factor(step) * alive)
            peaks["adapter"].see(_norm(gA, gB), alive)
            peaks["trained"].see(trained, alive)
    curves = {name: torch.stack(rows, -1).view(*grid, -1) for name, rows in logged.items() if rows}
    worse = alive & ~(mse < first)
    diverged = (~alive | worse).view(grid)
    final = torch.where(diverged, torch.nan, mse.view(grid))
    references = [svd_reference(target, problem.rank) for target in targets]
    result = {
        "final_mse": _lists(final),
        "diverged": diverged.tolist(),
        "diverged_step": [[int(s) if s >= 0 else None for s in r] for r in diverged_at.view(grid)],
        "final_effective_rank": _lists(curves["effective_rank"][..., -1]),
        "gradient_peaks": {name: peak.figures(grid) for name, peak in peaks.items()},
        **{key: [reference[key] for reference in references] for key in references[0]},
        "adapter_parameters": A[0].numel() + B[0].numel(),
        "trained_parameters": model.trained_parameters,
    }
    return result, curves


def _diagnostics(mse, g, earlier, A, B, alive) -> dict[str, Tensor]:
    safe = alive[:, None, None]
    sigma = product_singular_values(torch.where(safe, B, 0), torch.where(safe, A, 1))
    row = {
        "mse": mse,
        "gradient_norm": g.norm(dim=1),
        "effective_rank": effective_rank(sigma).float(),
        "gradient_cosine": torch.full_like(mse, torch.nan),
    }
    if earlier is not None:
        row["gradient_cosine"] = torch.cosine_similarity(g, earlier, dim=1)
    return row


def _norm(*tensors: Tensor) -> Tensor:
    """Of all values together, for every member."""
    return torch.linalg.vector_norm(torch.cat([t.view(len(t), -1) for t in tensors], 1), dim=1)


def _like(lr: Tensor, x: Tensor) -> Tensor:
    return lr.view(-1, *[1] * (x.ndim - 1))


def _lists(x: Tensor) -> list[list[float | None]]:
    return [[v if math.isfinite(v) else None for v in row] for row in x.tolist()]
