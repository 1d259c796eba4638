"""OP-LoRA without the memory of W2: an approximation of `oplora.adamw.OPAdamW`.

Under Adam every active row j of W2 has the gradient h_j g, and Adam's step does not depend on
the scale of a gradient. As long as the h_j keep their proportions, all active rows therefore
move by the same S, and

    theta = W2_0^T h + |h|_1 S + b2

needs W2's initial rows, which never change, and S (P,) with its two moments in place of
(width, P) matrices. S's gradient is g times the mean of the active h_j, so that its moments
remember how large h was. Not exact: rows whose h_j move differently, and units that turn on
later, which share S from their first step on.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from oplora.mlp import MLPWeights, hidden, pullback
from oplora.optimizer import OPOptimizer
from oplora.peft import oplora_groups
from oplora.shards import local
from oplora.stack import MLPStack


class LiteStack(MLPStack):
    """MLPs whose active rows of W2 share one change; `W2` is that change S, one row a block.

    Of W2_0 only rows of units that were ever on are kept, of the tensors that do not start with
    zero rows; later ones are drawn again from the block's random stream.
    """

    def __init__(self, blocks, names, starts, *, width: int, dtype: torch.dtype, **options):
        device = local(blocks[0][0]).device
        self.on = torch.zeros(len(blocks), width, dtype=torch.bool, device=device)  # rows kept
        self.shrink = torch.ones(len(blocks), dtype=dtype, device=device)  # W2_0's weight decay
        # for every block the units whose rows are kept; columns of W2_0 and these rows of them
        self._first: list[tuple[Tensor, list[tuple[slice, Tensor]]]] = []
        super().__init__(blocks, names, starts, width=width, dtype=dtype, **options)

    def _initial_block(self, *drawn) -> MLPWeights:
        mlp, i = super()._initial_block(*drawn), len(self._first)
        self.on[i] = hidden(mlp.z, mlp.W1, mlp.b1) > 0
        self._first.append(self._keep(i, mlp.W2))
        return mlp._replace(W2=torch.zeros_like(mlp.b2[None]))

    def _keep(self, i: int, W2: Tensor) -> tuple[Tensor, list[tuple[slice, Tensor]]]:
        units, kept, first = self.on[i].nonzero().flatten(), [], 0
        for tensor, start in zip(self.blocks[i], self.starts[i], strict=True):
            columns = slice(first, first + local(tensor).numel())
            if start != "zero":
                kept.append((columns, W2[units, columns]))
            first = columns.stop
        return units, kept

    def _hidden(self) -> Tensor:
        h = hidden(self.z, self.W1, self.b1)
        new = (h > 0) & ~self.on
        for i in new.any(1).nonzero().flatten().tolist():
            self.on[i] |= new[i]
            self._first[i] = self._keep(i, super()._initial_block(*self._drawn[i]).W2)
        return h

    def _predict(self):
        self.h = self._hidden()
        for i, (total, part) in enumerate(
            zip(self.h.sum(1), self.theta.split(self.sizes), strict=True)
        ):
            torch.mul(self.W2[i][0], total, out=part)
            units, kept = self._first[i]
            h = self.h[i, units] * self.shrink[i]
            for columns, rows in kept:
                part[columns].addmv_(rows.T, h)
        self.theta += self.b2

    def backward(self, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dh = torch.zeros_like(self.h)
        for i, part in enumerate(g.split(self.sizes)):
            units, kept = self._first[i]
            of_first = sum(rows @ part[columns] for columns, rows in kept)
            dh[i, units] = self.W2[i][0] @ part + self.shrink[i] * of_first
        return pullback(self._all_reduce(dh), self.z, self.W1, self.h)

    def mean_active(self) -> Tensor:
        """Mean of every block's h_j above zero; 0 where there is none."""
        return self.h.sum(1) / (self.h > 0).sum(1).clamp(min=1)

    @property
    def mlp_parameters(self) -> int:
        """What is trained: S in place of W2."""
        return super().mlp_parameters - (self.width - 1) * self.b2.numel()

    def held(self) -> list[Tensor]:
        return [*super().held(), *(rows for _, kept in self._first for _, rows in kept)]

    def state(self, i: int) -> dict[str, Tensor]:
        own = {"W2": self.W2[i], "on": self.on[i], "shrink": self.shrink[i]}
        return {**self.trunks[i], **own}

    def _shapes(self, i: int) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.state(i).items()}

    def load(self, i: int, state: dict[str, Tensor], active: int):
        for name, mine in self.state(i).items():
            mine.copy_(state[name])
        self._first[i] = self._keep(i, super()._initial_block(*self._drawn[i]).W2)


class OPAdamWLite(OPOptimizer):
    """AdamW on MLPs with less than a third of `OPAdamW`'s state, approximately (see above).

    It resumes with the seed and MLP options it was built with. Arguments: `oplora.OPAdamW`.
    """

    _stack_cls = LiteStack

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        **mlp_options: Any,
    ):
        adam = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
        super().__init__(params, torch.optim.AdamW, **adam, fused=True, **mlp_options)

    def _update_W2(self, stack: LiteStack, members: list[int], gs: list[Tensor], group: dict):
        means = stack.mean_active()
        for i, g in zip(members, gs, strict=True):
            stack.W2[i].grad = g[None] * means[i]
        stack.shrink[members] *= 1 - group["lr"] * group["weight_decay"]

    def load_state_dict(self, state_dict: dict[str, Any]):
        for mine, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for key in ("seed", "z_init", "kaiming_a"):
                if key in saved and saved[key] != mine[key]:
                    raise ValueError(
                        f"the state was saved with {key}={saved[key]}, from which W2 is drawn "
                        f"again; here {key}={mine[key]}: build the optimizer with the saved one"
                    )
        super().load_state_dict(state_dict)


def create_oplora_lite_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer] = torch.optim.AdamW,
    *,
    mlp_width: int = 32,
    start: str = "auto",
    shared_trunk: bool = True,
    **kwargs: Any,
) -> OPAdamWLite:
    """`oplora.create_oplora_optimizer` with `OPAdamWLite`, for AdamW alone."""
    if optimizer_cls is not torch.optim.AdamW:
        raise ValueError(f"the Lite form needs optimizer=adamw, not {optimizer_cls.__name__}")
    return OPAdamWLite(oplora_groups(model, mlp_width, start, shared_trunk), **kwargs)
