"""AdamW on MLPs without ever forming the gradient of W2: OP-LoRA at the price of its W2."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from oplora import saving
from oplora.arguments import with_keywords_of
from oplora.optimizer import INITIAL, OPOptimizer, Part, Work
from oplora.rank1 import adamw_, foreach_rank1_adamw_
from oplora.stack import MLPStack


class Moments:
    """AdamW's state of a stack, shaped like it: mu and nu of z, W1, b1, b2 and W2, steps by block.

    Moments of W2 are of the rows that are kept, and zero for a row that is new.
    """

    def __init__(self, stack: MLPStack):
        self.stack = stack
        device = stack.tensors.device
        self.steps = [torch.zeros((), dtype=torch.float32, device=device) for _ in stack.trunks]
        self.even = True  # all blocks have made as many steps
        names = ("mu", "nu")
        self.stacked = {
            n: {key: torch.zeros_like(t) for key, t in stack.stacked.items()} for n in names
        }
        self.trunks = {n: stack.per_block(moments) for n, moments in self.stacked.items()}
        self.W2 = {n: [torch.zeros_like(W2) for W2 in stack.rows.W2] for n in names}

    def of_trunks(self, members: list[int], gradients: dict[str, Tensor]) -> tuple:
        """Tensors, gradients, mu, nu and steps of z, W1, b1, b2 for one step more of these blocks.

        Of all blocks at once as long as all have made as many steps.
        """
        self.even &= len(members) == len(self.steps)
        torch._foreach_add_([self.steps[i] for i in members], 1)
        if self.even:
            kinds = (self.stack.stacked, gradients, self.stacked["mu"], self.stacked["nu"])
            return *([kind[n] for n in gradients] for kind in kinds), [self.steps[0]] * 4
        kinds = (self.stack.trunks, self.stack.per_block(gradients), *self.trunks.values())
        steps = [self.steps[i] for i in members for _ in gradients]
        return *([kind[i][n] for i in members for n in gradients] for kind in kinds), steps

    def of_W2(self, members: list[int]) -> dict[str, list[Tensor]]:
        for moments in self.W2.values():
            for i in members:
                if missing := len(self.stack.rows.W2[i]) - len(moments[i]):
                    new = moments[i].new_zeros(missing, moments[i].shape[1])
                    moments[i] = torch.cat([moments[i], new])
        lists = {f"exp_avg{s}": self.W2[n] for s, n in (("s", "mu"), ("_sqs", "nu"))}
        lists["steps"] = self.steps
        return {name: [each[i] for i in members] for name, each in lists.items()}

    def state(self, i: int) -> dict[str, dict[str, Tensor]]:
        """Of block i, by the names of the MLP's tensors and of torch's AdamW."""
        mu, nu = ({**self.trunks[n][i], "W2": self.W2[n][i]} for n in ("mu", "nu"))
        return {
            name: {"step": self.steps[i], "exp_avg": mu[name], "exp_avg_sq": nu[name]}
            for name in mu
        }

    def load(self, i: int, saved: dict[str, dict[str, Tensor]]):
        """Inverse of `state`."""
        self.of_W2([i])
        for name, mine in self.state(i).items():
            for key, value in mine.items():
                # another device may round a unit of W2 on that has no moments yet
                source = saved[name][key]
                (value[: len(source)] if value.ndim else value).copy_(source)


class OPAdamW(OPOptimizer):
    """AdamW on MLPs that predict the given tensors: OP-LoRA at the price of its W2.

    Equal to `OPOptimizer(params, torch.optim.AdamW, …)`, but the rank-1 gradient h ⊗ g of W2 is
    formed a few rows at a time in a scratch that stays in cache, moments exist only for rows
    whose unit was ever on (about half of them), and z, W1, b1 and b2 of all blocks are updated
    in one call. Rows that never were on are not saved: it resumes with the seed and initial
    options it was built with. lite: less than a third of the state, approximately
    (`oplora.rows.SharedRow`). fused, foreach: accepted as AdamW's, but it has its own form. Other
    arguments: `OPOptimizer`.
    """

    @with_keywords_of(OPOptimizer.__init__)
    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        lite: bool = False,
        maximize: bool = False,
        fused: bool | None = None,
        foreach: bool | None = None,
        **mlp_options: Any,
    ):
        self.rows = "shared" if lite else "active"
        adam = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
        super().__init__(params, torch.optim.AdamW, **adam, fused=True, **mlp_options)

    def add_param_group(self, group: dict):
        if group.get("amsgrad", self.defaults.get("amsgrad")):
            raise ValueError(
                "amsgrad needs the whole gradient of W2: use "
                "oplora.OPOptimizer(params, torch.optim.AdamW, amsgrad=True)"
            )
        super().add_param_group(group)

    def _inner_parameters(self, stack: MLPStack) -> list[Tensor]:
        return []

    def _train(self, work: list[Work]):
        self.inner.step()
        for each in work:
            self._adamw(each)

    def _adamw(self, work: Work):
        """AdamW on the MLPs of one stack; each block is predicted while its W2 is in the cache."""
        part, members, stack = work.part, work.members, work.part.stack
        moments = part.moments = part.moments or Moments(stack)
        group = self.param_groups[part.group]
        adam = {k: group[k] for k in ("lr", "betas", "eps", "weight_decay", "maximize")}
        gradients = dict(zip(stack.stacked, (*work.trunk, work.g), strict=True))
        adamw_(*moments.of_trunks(members, gradients), **adam)
        before, gs = stack.h, work.g.split(stack.tensors.sizes)
        stack.refresh()
        if group["weight_decay"]:
            stack.rows.decay(members, 1 - group["lr"] * group["weight_decay"])
        factors, weights = stack.rows.factors(before), stack.rows.weights(stack.h)
        theta = stack.tensors.theta_of_block
        foreach_rank1_adamw_(
            [stack.rows.W2[i] for i in members],
            hs=[factors[i] for i in members],
            gs=[gs[i] for i in members],
            **moments.of_W2(members),
            updated=lambda k: stack.rows.predict(
                members[k], weights[members[k]], theta[members[k]]
            ),
            **adam,
        )
        stack.write(members)

    # State

    def moments_of(self, part: Part, i: int) -> dict[str, dict]:
        part.moments = part.moments or Moments(part.stack)
        return part.moments.state(i)

    def load_moments(self, saved: list[tuple[Part, int, dict[str, dict]]], direct: dict[int, dict]):
        saving.load_inner(self.inner, direct)
        for part in self.parts:
            part.moments = None
        for part, i, moments in saved:
            if moments:
                part.moments = part.moments or Moments(part.stack)
                part.moments.load(i, moments)
        for moments in (part.moments for part in self.parts if part.moments):
            moments.even = len({float(step) for step in moments.steps}) == 1

    def load_state_dict(self, state_dict: dict[str, Any]):
        for mine, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for key in ("seed", *INITIAL):  # not all rows of W2 are saved
                if key in saved and saved[key] != mine[key] and key != "z_dim":
                    raise ValueError(
                        f"the state was saved with {key}={saved[key]}, from which W2 is drawn "
                        f"again; here {key}={mine[key]}: build the optimizer with the saved one"
                    )
        number = state_dict["param_groups"][0].get("restarts", 0)
        if number != self.param_groups[0].get("restarts", 0):
            self.restart(number)
        super().load_state_dict(state_dict)
