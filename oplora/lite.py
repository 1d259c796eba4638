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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from oplora.adamw import OPAdamW
from oplora.blocks import INITIAL
from oplora.checks import check_optimizer
from oplora.mlp import MLPWeights, hidden, pullback
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
        self.active = [1] * len(blocks)  # S

    def _initial_block(self, *drawn) -> MLPWeights:
        mlp, i = super()._initial_block(*drawn), len(self._first)
        self.on[i] = hidden(mlp.z, mlp.W1, mlp.b1) > 0
        self._first.append(self._keep(i, mlp.W2))
        return mlp._replace(W2=torch.zeros_like(mlp.b2[None]))

    def _keep(self, i: int, W2: Tensor) -> tuple[Tensor, list[tuple[slice, Tensor]]]:
        units, kept, first = self.on[i].nonzero().flatten(), [], 0
        for tensor, start in zip(self.blocks[i], self.starts[i], strict=True):
            columns = slice(first, first + local(tensor).numel())
            if start != "still":
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

    def refresh(self):
        self.h = self._hidden()
        self._total = self.h.sum(1)

    def output(self, i: int):
        theta = torch.mul(self.W2[i][0], self._total[i], out=self._theta_blocks[i])
        units, kept = self._first[i]
        h = self.h[i, units] * self.shrink[i]
        for columns, rows in kept:
            theta[columns].addmv_(rows.T, h)

    def backward(self, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dh = torch.zeros_like(self.h)
        for i, part in enumerate(g.split(self.sizes)):
            units, kept = self._first[i]
            of_first = sum(rows @ part[columns] for columns, rows in kept)
            dh[i, units] = self.W2[i][0] @ part + self.shrink[i] * of_first
        return pullback(self._all_reduce(dh), self.z, self.W1, self.h)

    def rows(self, h: Tensor) -> list[Tensor]:
        """S's gradient is g times the mean of every block's h_j above zero."""
        means = h.sum(1, keepdim=True) / (h > 0).sum(1, keepdim=True).clamp(min=1)
        return list(means)

    def decay(self, members: Sequence[int], factor: float):
        self.shrink[members] *= factor

    @property
    def mlp_parameters(self) -> int:
        """What is trained: S in place of W2."""
        return super().mlp_parameters - (self.width - 1) * sum(t.numel() for t in self.tensors)

    def held(self) -> list[Tensor]:
        return [*super().held(), *(rows for _, kept in self._first for _, rows in kept)]

    def state(self, i: int) -> dict[str, Tensor]:
        own = {"W2": self.W2[i], "on": self.on[i], "shrink": self.shrink[i]}
        return {**self.trunks[i], **own}

    def _shapes(self, i: int) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.state(i).items()}

    def check(self, i: int, state: dict[str, Tensor], active: int):
        super().check(i, state, self.width)

    def load(self, i: int, state: dict[str, Tensor], active: int):
        for name, mine in self.state(i).items():
            mine.copy_(state[name])
        self._first[i] = self._keep(i, super()._initial_block(*self._drawn[i]).W2)


class OPAdamWLite(OPAdamW):
    """AdamW on MLPs with less than a third of `OPAdamW`'s state, approximately (see above).

    It resumes with the seed and MLP options it was built with. Arguments: `oplora.OPAdamW`.
    """

    _compact = False
    _stack_cls = LiteStack

    def load_state_dict(self, state_dict: dict[str, Any]):
        for mine, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for key in ("seed", *INITIAL):
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
    lr: float,
    mlp_width: int = 32,
    start: str = "auto",
    shared_trunk: bool = True,
    init: str = "author",
    direct_lr: float | None = None,
    **kwargs: Any,
) -> OPAdamWLite:
    """`oplora.create_oplora_optimizer` with `OPAdamWLite`, for AdamW alone."""
    if optimizer_cls is not torch.optim.AdamW:
        check_optimizer(optimizer_cls)
        raise ValueError(f"the Lite form needs optimizer=adamw, not {optimizer_cls.__name__}")
    groups = oplora_groups(
        model, mlp_width, start, shared_trunk=shared_trunk, init=init, direct_lr=direct_lr
    )
    return OPAdamWLite(groups, lr=lr, init=init, **kwargs)
