"""AdamW that finds its own step size: one learned number per block says how far to go.

What OP-LoRA's MLP learns besides its last layer is, under Adam, one number per block: how many
times the adapter moves as far as an ordinary step would (1 + |h|_1). `ScaleAdamW` keeps that
number and drops the MLP. With D = theta - theta_0, the way a block has come, and n AdamW's
direction, a step is

    q = -<g, D> / |D|                        would going further along D have helped?
    u = mean(q) / sqrt(mean(q^2))            within [-1, 1]: q against its own noise
    s <- s exp(eta u lr_t / lr_0),   theta <- theta - s lr_t n

with running means, bias-corrected as Adam's. A line search is short-sighted: where larger steps
cost at first what they gain at the end, s stays below the rate that is best for a whole training.
"""

from collections.abc import Iterable
from itertools import chain, islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from oplora.arguments import blocks_of, check_adamw
from oplora.rank1 import adamw_
from oplora.saving import load_uncast
from oplora.tensors import check_gradients, check_tensor, local, state_dtype


class ScaleAdamW(Optimizer):
    """AdamW with a learned scale of its steps for every block.

    params: as for `OPOptimizer`: tensors, (name, tensor) pairs, lists of these, which are one
        block each, or groups of them. A group with `scaled=False` is trained by plain AdamW.
    lr: of the first step. Scales find the rest; a scheduler changes lr and eta together.
    eta: how far log s moves at most, a step. line_betas: of the running means of q and q^2.
    State is at least fp32, whatever the tensors are; s is `log_scale` in each tensor's state.
    FloatingPointError, before anything is changed, for NaN or Inf in a gradient.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        eta: float = 0.1,
        line_betas: tuple[float, float] = (0.9, 0.99),
        maximize: bool = False,
    ):
        adam = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
        super().__init__(params, {**adam, "eta": eta, "line_betas": line_betas, "scaled": True})

    def add_param_group(self, group: dict):
        options = {**self.defaults, **group}
        check_adamw(options, "eta")
        check_adamw({**options, "betas": options["line_betas"]})
        blocks, names = blocks_of(group["params"], f"group {len(self.param_groups)}")
        known: dict = {}
        for tensor, name in zip(chain(*blocks), chain(*names), strict=True):
            check_tensor(tensor, name, known)
        named = list(zip(chain(*names), chain(*blocks), strict=True))
        sizes = [len(block) for block in blocks]
        super().add_param_group({**group, "params": named, "block_sizes": sizes})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_gradients(
            (name, p.grad)
            for group in self.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)
        )
        for group in self.param_groups:
            tensors = iter(group["params"])
            kinds: dict[tuple, list[list[Tensor]]] = {}
            for size in group["block_sizes"]:
                block = [t for t in islice(tensors, size) if t.grad is not None]
                if block:
                    kind = local(block[0]).device, state_dtype(block)
                    kinds.setdefault(kind, []).append(block)
            for (_, dtype), blocks in kinds.items():
                self._update(group, blocks, dtype)
        return loss

    def _update(self, group: dict, blocks: list[list[Tensor]], dtype: torch.dtype):
        """One step of blocks of one device and dtype of state."""
        states = [[self._state_of(t, dtype) for t in block] for block in blocks]
        theta = [list(map(self._theta, *pair)) for pair in zip(blocks, states, strict=True)]
        g = [[local(t.grad).to(dtype) for t in block] for block in blocks]
        for state in chain(*states):
            state["step"] += 1
        if group["scaled"]:
            self._line_search(group, theta, g, states)
        scales = torch.stack([of_block[0]["log_scale"] for of_block in states]).exp().tolist()
        adam = {key: group[key] for key in ("betas", "eps", "weight_decay", "maximize")}
        for values, gradients, of_block, scale in zip(theta, g, states, scales, strict=True):
            moments = ([local(s[name]) for s in of_block] for name in ("exp_avg", "exp_avg_sq"))
            steps = [s["step"].to(values[0].device) for s in of_block]
            plain = all(t.is_contiguous() for t in chain(values, gradients))
            fused = None if plain else False  # its kernel goes over memory as it lies
            rate = group["lr"] * scale
            adamw_(values, gradients, *moments, steps, lr=rate, fused=fused, **adam)
        for tensor, value in zip(chain(*blocks), chain(*theta), strict=True):
            if value.dtype != tensor.dtype:
                local(tensor).copy_(value)

    def _line_search(self, group: dict, theta: list, g: list, states: list):
        """Move log s of every tensor, alike within a block."""
        each, sizes = list(chain(*states)), torch.tensor(list(map(len, states)))
        along = chain.from_iterable(map(_along, chain(*g), chain(*theta), each))
        sums = torch.stack(list(along)).view(-1, 2)
        block = torch.arange(len(sizes)).repeat_interleave(sizes).to(sums.device)
        sums = sums.new_zeros(len(sizes), 2).index_add_(0, block, sums)
        mesh = next((t.device_mesh for t in group["params"] if isinstance(t, DTensor)), None)
        if mesh is not None:
            dist.all_reduce(sums, group=mesh.get_group())
        product, squared = sums[block].unbind(1)
        q = torch.where(squared > 0, -product / squared.sqrt(), 0)
        q = -q if group["maximize"] else q
        # the first step has no way to look back on
        steps = q.new_tensor([max(1.0, state["step"].item() - 1) for state in each])
        means = []
        for name, value, beta in zip(
            ("q", "q_squared"), (q, q * q), group["line_betas"], strict=True
        ):
            running = [state[name] for state in each]
            torch._foreach_lerp_(running, list(value), 1 - beta)
            means.append(torch.stack(running) / (1 - beta**steps))
        u = torch.where(means[1] > 0, means[0] / means[1].sqrt(), 0).clamp(-1, 1)
        highest = group.get("initial_lr", group["lr"])  # a scheduler's
        u *= group["eta"] * (min(1.0, group["lr"] / highest) if highest else 0.0)
        torch._foreach_add_([state["log_scale"] for state in each], list(u))

    def _state_of(self, tensor: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        state = self.state[tensor]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(tensor, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(tensor, dtype=dtype)
            state["start"] = tensor.detach().to(dtype, copy=True)
            for name in ("log_scale", "q", "q_squared"):
                state[name] = torch.zeros((), dtype=dtype, device=tensor.device)
            if tensor.dtype != dtype:
                state["theta"] = state["start"].clone()
        return state

    def _theta(self, tensor: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The tensor's values in the state's dtype; what others wrote into the tensor counts."""
        held = local(tensor.detach())
        if "theta" not in state:
            return held
        theta = local(state["theta"])
        return theta.copy_(torch.where(theta.to(held.dtype) == held, theta, held.to(theta.dtype)))

    def scales(self) -> dict[str, float]:
        """s of every scaled tensor by name: how many times its steps are AdamW's at `lr`."""
        return {
            name: self.state[p]["log_scale"].exp().item() if self.state[p] else 1.0
            for group in self.param_groups
            if group["scaled"]
            for name, p in zip(group["param_names"], group["params"], strict=True)
        }

    def load_state_dict(self, state_dict: dict[str, Any]):
        """Resume exactly, with the state's own dtypes."""
        load_uncast(self, state_dict, super().load_state_dict)


def _along(g: Tensor, theta: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """<g, D> and |D|^2 of a tensor, which stays in the cache meanwhile."""
    way = theta - local(state["start"])
    return (g * way).sum(), way.square_().sum()
