"""LoRA-Muon, AltLoRA, LoFT, LoRA-One and CoRA against their formulae, in float64."""

import math

import pytest
import torch
from test_baselines import SCALINGS, SIZES, factors, gradients, groups_of, set_gradients
from test_relatives import loss_of, tiny

from oplora.baselines.altlora import AltLoRA
from oplora.baselines.loft import LoFT
from oplora.baselines.lora_muon import LoRAMuon
from oplora.baselines.starts import common_basis, lora_one


class ReferenceMuon:
    """By singular value decompositions; factors in the paper's shapes, W = s A B^T."""

    def __init__(self, A, B, s, lr, wd):
        self.A, self.B, self.s, self.lr, self.wd, self.m = B, A.T, s, lr, wd, [0, 0]

    def step(self, gA, gB):
        def root(F):
            _, S, Vh = torch.linalg.svd(F, full_matrices=False)
            return Vh.T @ torch.diag(torch.where(S > 1e-9, 1 / S, 0)) @ Vh

        def msign(M):
            U, S, Vh = torch.linalg.svd(M, full_matrices=False)
            return U @ torch.diag((S > 1e-9).to(S)) @ Vh

        k, new = math.sqrt(1 - self.lr * self.wd), []
        for i, (g, F, other) in enumerate([(gB, self.A, self.B), (gA.T, self.B, self.A)]):
            self.m[i] = 0.95 * self.m[i] + 0.05 * g
            R = root(other)
            dF = -self.lr / 2 * msign(self.m[i] @ R) @ R
            new.append(k * F + dF / k / self.s)
        self.A, self.B = new

    def pair(self):
        return self.B.T, self.A


class ReferenceAlt:
    """As the authors' code has it: explicit inverses, A (r, d_in) first."""

    def __init__(self, A, B, s, lr, wd):
        self.A, self.B, self.lr, self.wd, self.t = A, B, lr, wd, 0
        self.mA, self.mB, self.A_old, self.B_old = A * 0, B * 0, A * 0, B * 0

    def step(self, gA, gB):
        self.t += 1
        eye, lr = 1e-3 * torch.eye(len(self.A)).double(), self.lr / (1 - 0.9**self.t)
        inverse = (self.B.T @ self.B + eye).inverse()
        self.mA = 0.9 * inverse @ self.B.T @ self.B_old @ self.mA + 0.1 * inverse @ gA
        self.A, self.B_old = (self.A - lr * self.mA) * (1 - self.lr * self.wd), self.B
        inverse = (self.A @ self.A.T + eye).inverse()
        self.mB = 0.9 * self.mB @ self.A_old @ self.A.T @ inverse + 0.1 * gB @ inverse
        self.B, self.A_old = (self.B - lr * self.mB) * (1 - self.lr * self.wd), self.A

    def pair(self):
        return self.A, self.B


class ReferenceLoFT:
    """Row by row: a factor's row, of B or of A^T, has a moment in terms of the other factor."""

    def __init__(self, A, B, s, lr, wd):
        self.F, self.s, self.lr, self.wd, self.t = [A.T, B], s, lr, wd, 0
        r = len(A)
        self.m = [[torch.zeros(r).double() for _ in F] for F in self.F]
        self.P = [[torch.zeros(r, r).double() for _ in F] for F in self.F]
        self.old = [F * 0 for F in self.F]

    def step(self, gA, gB):
        self.t += 1
        moved, r = self.t % 2, len(gA)
        new = self.F[moved].clone()
        for i, g in enumerate((gA.T, gB)):
            other, old = self.F[1 - i], self.old[1 - i]
            inverse = (other.T @ other + (1e-6, 1e-8)[i] * torch.eye(r).double()).inverse()
            R = old.T @ other @ inverse
            for row in range(len(g)):
                v = g[row] @ inverse / self.s
                self.m[i][row] = 0.9 * self.m[i][row] @ R + 0.1 * v
                self.P[i][row] = 0.999 * R.T @ self.P[i][row] @ R + 0.001 * torch.outer(v, v)
                if i != moved:
                    continue
                first = other @ self.m[i][row] / (1 - 0.9**self.t)
                second = torch.stack([o @ self.P[i][row] @ o for o in other])
                U = first / ((second.clamp(min=0) / (1 - 0.999**self.t)).sqrt() + 1e-8)
                decayed = (1 - self.lr * self.wd) * new[row]
                new[row] = decayed - self.lr / self.s * (U @ other @ inverse)
        self.old = [F.clone() for F in self.F]
        self.F[moved] = new

    def pair(self):
        return self.F[0].T, self.F[1]


@pytest.mark.parametrize("zero_B", [True, False])
@pytest.mark.parametrize(
    "cls, reference",
    [(LoRAMuon, ReferenceMuon), (AltLoRA, ReferenceAlt), (LoFT, ReferenceLoFT)],
)
def test_lockstep_with_the_formulae(cls, reference, zero_B):
    params, lr, wd = factors(zero_B=zero_B), 2e-2, 0.1
    optimizer = cls(groups_of(params), lr=lr, weight_decay=wd)
    start = [p.detach().clone() for p in params]
    theirs = [
        reference(A, B, s, lr, wd)
        for A, B, s in zip(start[::2], start[1::2], SCALINGS, strict=True)
    ]
    for t in range(12):
        set_gradients(params, t)
        optimizer.step()
        for layer in range(len(SIZES)):
            theirs[layer].step(*gradients(*theirs[layer].pair(), layer, t))
            pair = params[2 * layer : 2 * layer + 2]
            torch.testing.assert_close(tuple(pair), theirs[layer].pair(), rtol=1e-9, atol=1e-10)
    assert all((p - s).abs().max() > 1e-3 for p, s in zip(params, start))


def test_a_step_of_lora_muon_has_the_rate_s_spectral_norm():
    """Each of the two terms moves s B A by half of the rate, whatever the factors' sizes."""
    params = factors(zero_B=False)
    A, B = (p.detach().clone() for p in params[:2])
    set_gradients(params, 0)
    LoRAMuon(groups_of(params), lr=0.01).step()
    dA, dB = params[0].detach() - A, params[1].detach() - B
    for moved in (B @ dA, dB @ A):
        spectrum = torch.linalg.svdvals(SCALINGS[0] * moved)[:4]
        torch.testing.assert_close(spectrum, torch.full_like(spectrum, 0.005), rtol=1e-8, atol=0)


def test_loft_of_full_rank_is_adamw_of_the_weights():
    torch.manual_seed(0)
    A, B, target = (torch.eye(4).double() + 0.3 * torch.randn(4, 4).double() for _ in range(3))
    s, W = 2.0, torch.nn.Parameter(2.0 * B @ A)
    A, B = torch.nn.Parameter(A), torch.nn.Parameter(B)
    loft = LoFT([{"params": [A, B], "scaling": s}], lr=0.03, reg=(0, 0))
    adamw = torch.optim.AdamW([W], lr=0.03, weight_decay=0)
    for _ in range(30):
        for optimizer, weight in ((loft, s * B @ A), (adamw, W)):
            optimizer.zero_grad()
            ((weight - target) ** 2 * target.abs()).sum().backward()
            optimizer.step()
        torch.testing.assert_close(s * B @ A, W, rtol=0, atol=1e-9)


def test_lora_one_is_a_step_down_the_gradient():
    model, x, y = tiny()
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    weights = [m.get_base_layer().weight.detach().clone().requires_grad_() for m in layers]
    loss_of(weights, x, y).backward()
    for layer, W in zip(layers, weights):
        layer.get_base_layer()._peft_loraga_grad = W.grad
    lora_one(model, gamma=4.0)
    for layer, W in zip(layers, weights):
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        U, S, Vh = torch.linalg.svd(-W.grad)
        best = U[:, :3] @ torch.diag(S[:3]) @ Vh[:3]
        torch.testing.assert_close(B @ A, best / (4 * S[0]), rtol=0, atol=1e-6)  # svd in float32
        torch.testing.assert_close(A.norm(), B.norm(), rtol=1e-5, atol=0)


def test_cora_s_basis_is_common_and_frozen():
    model, x, _ = tiny()
    before = model(x).detach()
    first, second = (m for m in model.modules() if hasattr(m, "lora_A"))
    common_basis(model)
    B = first.lora_B["default"].weight
    assert torch.equal(B, second.lora_B["default"].weight) and not B.requires_grad
    weights = torch.cat([m.get_base_layer().weight for m in (first, second)], 1)
    U = torch.linalg.svd(weights)[0][:, :3]
    torch.testing.assert_close(B @ B.T, U @ U.T, rtol=0, atol=1e-9)
    assert torch.equal(model(x), before) and first.lora_A["default"].weight.requires_grad
