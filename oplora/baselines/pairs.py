"""Pairs of LoRA factors for optimizers that update lora_A and lora_B together.

`PairOptimizer` batches the pairs of equal shapes and gives every other parameter to AdamW;
`lora_groups` finds the pairs of a PEFT model.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from oplora.arguments import check_adamw
from oplora.saving import load_uncast
from oplora.tensors import check_gradients

# Values in one stacked batch of factors: bounds the temporary memory, and keeps a GPU busy.
BATCH_VALUES = 2**25


class PairOptimizer(Optimizer):
    """Base of optimizers that update lora_A and lora_B together.

    A group with pairs=True (the default) lists A1, B1, A2, B2, … with A (r, d_in), B (d_out, r);
    tensors or (name, tensor) tuples. A group with pairs=False is updated as by torch.optim.AdamW.
    A pair of which a gradient is missing is skipped; one with NaN or Inf in a gradient raises
    FloatingPointError before anything is changed. State is at least fp32, whatever the adapter is.
    Refused with ValueError: unpaired factors, sharded tensors (FSDP, DeepSpeed ZeRO-3).
    """

    def __init__(self, params: Iterable, **defaults: Any):
        super().__init__(params, {**defaults, "pairs": True})

    def add_param_group(self, group: dict):
        super().add_param_group(group)
        try:
            check_group(self.param_groups[-1], self._names(len(self.param_groups) - 1))
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_gradients(
            (name, p.grad)
            for index, group in enumerate(self.param_groups)
            for name, p in zip(self._names(index), group["params"], strict=True)
        )
        for group in self.param_groups:
            if group["pairs"]:
                for As, Bs in self._batches(group):
                    self._update(group, As, Bs)
            else:
                params = [p for p in group["params"] if p.grad is not None]
                self._adamw(group, params, [p.grad for p in params])
        return loss

    def _update(self, group: dict, As: list[Tensor], Bs: list[Tensor]):
        """Update pairs of one shape, dtype, device and step count."""
        raise NotImplementedError

    def _batches(self, group: dict) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Pairs with both gradients, those that can be stacked together."""
        kinds: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
        for A, B in zip(group["params"][::2], group["params"][1::2], strict=True):
            if A.grad is not None and B.grad is not None:
                kind = (A.shape, B.shape, A.dtype, A.device, self._steps(A))
                kinds.setdefault(kind, []).append((A, B))
        for pairs in kinds.values():
            size = max(1, BATCH_VALUES // max(pairs[0][0].numel(), pairs[0][1].numel()))
            for first in range(0, len(pairs), size):
                As, Bs = zip(*pairs[first : first + size], strict=True)
                yield list(As), list(Bs)

    def _steps(self, param: Tensor) -> int:
        """Updates that this parameter has had."""
        return int(self.state[param]["step"]) if param in self.state else 0

    def _adamw(self, group: dict, params: list[Tensor], grads: list[Tensor]):
        """torch.optim.AdamW on fp32 copies of params of lower precision, with state in fp32."""
        work = [p if p.dtype == compute_dtype(p) else p.to(compute_dtype(p)) for p in params]
        for p, w in zip(params, work, strict=True):
            if "step" not in self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32)
                for name in ("exp_avg", "exp_avg_sq"):
                    self.state[p][name] = torch.zeros_like(w)
        states = [self.state[p] for p in params]
        adamw(
            work,
            [g.to(w.dtype) for g, w in zip(grads, work, strict=True)],
            *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")),
            [],
            [state["step"] for state in states],
            amsgrad=False,
            maximize=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            **{key: group[key] for key in ("lr", "eps", "weight_decay")},
        )
        for p, w in zip(params, work, strict=True):
            if p is not w:
                p.copy_(w)

    def _names(self, index: int) -> list[str]:
        group = self.param_groups[index]
        unnamed = [f"parameter {i} of group {index}" for i in range(len(group["params"]))]
        return group.get("param_names", unnamed)

    def load_state_dict(self, state_dict: dict[str, Any]):
        """Resume exactly, with the state's own dtypes."""
        load_uncast(self, state_dict, super().load_state_dict)


def pair_groups(model: nn.Module, *, by_scaling: bool, **of_others: Any) -> list[dict]:
    """Parameter groups of a LoRA model for a `PairOptimizer`, from `lora_groups`.

    by_scaling: a group for every s, with it as "scaling", else one for all pairs. of_others:
    options of the group of what else is trained, by AdamW.
    """
    pairs, others = lora_groups(model)
    groups = [{"params": params, "scaling": s} for s, params in pairs.items()]
    if not by_scaling:
        groups = [{"params": [named for params in pairs.values() for named in params]}]
    return groups + ([{"params": others, "pairs": False, **of_others}] if others else [])


def lora_groups(model: nn.Module) -> tuple[dict[float, list[tuple]], list[tuple]]:
    """Named A1, B1, A2, B2, … by their scaling s, and all other trainable parameters.

    Pairs are the weights of lora_A and lora_B where both are nn.Linear and W = W0 + s B A, so
    also those of quantised and of DoRA layers. Others, for AdamW: LoRA on convolutions,
    embeddings and stacked experts, block-diagonal factors, DoRA magnitudes, biases,
    modules_to_save. ValueError: no pair at all, or a pair of which only one factor is trainable.
    """
    others = {n: p for n, p in model.named_parameters() if p.requires_grad}
    name_of = {p: n for n, p in others.items()}
    pairs: dict[float, list[tuple]] = {}
    for layer_name, layer in model.named_modules():
        # an expert stack (PEFT's ParamWrapper) folds several products B A into one pair
        if not isinstance(layer, LoraLayer) or getattr(layer, "num_experts", 1) > 1:
            continue
        for adapter, lora_A in layer.lora_A.items():
            lora_B = layer.lora_B[adapter]
            if not (isinstance(lora_A, nn.Linear) and isinstance(lora_B, nn.Linear)):
                continue
            names = [name_of.get(w) for w in (lora_A.weight, lora_B.weight)]
            if any(names) and not all(n in others for n in names):
                raise ValueError(
                    f"{layer_name}: only one of lora_A and lora_B ({adapter}) is trainable, or one "
                    "is shared between layers. Train both of every layer, or use AdamW"
                )
            if all(names):
                named = [(n, others.pop(n)) for n in names]
                pairs.setdefault(layer.scaling[adapter], []).extend(named)
    if not pairs:
        raise ValueError("the model has no trainable LoRA on a Linear layer: use AdamW for it")
    return pairs, list(others.items())


def stack(tensors: list[Tensor]) -> Tensor:
    """Stacked, in at least fp32."""
    return torch.stack(tensors).to(compute_dtype(tensors[0]))


def compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def above_rounding(w: Tensor, dtype: torch.dtype) -> Tensor:
    """Which eigenvalues w (n, r), ascending, of F^T F count as other than zero.

    Those above r eps times the largest, as in torch.linalg.pinv of F^T F: singular values of F
    above about 1e-3 of the largest in fp32.
    """
    return w > w.shape[-1] * torch.finfo(dtype).eps * w[..., -1:]


def check_group(group: dict, names: list[str]):
    """ValueError for hyperparameters out of range and for factors that do not pair up."""
    check_adamw(group)
    for key in ("scaling", "delta"):
        if not group.get(key, 1) > 0:
            raise ValueError(f"{key}={group[key]} must be positive")
    if group.get("moments", "factor") not in ("equivalent", "factor"):
        raise ValueError(f"moments={group['moments']!r} is unknown: use 'equivalent' or 'factor'")
    for p, name in zip(group["params"], names, strict=True):
        if hasattr(p, "full_tensor") or hasattr(p, "ds_id"):
            raise ValueError(f"{name} is sharded (FSDP or DeepSpeed ZeRO-3): use DDP")
        if not p.is_floating_point():
            raise ValueError(f"{name} has dtype {p.dtype}: only floating point can be trained")
    if group["pairs"]:
        _check_pairs(group["params"], names)


def _check_pairs(params: list[Tensor], names: list[str]):
    if len(params) % 2:
        raise ValueError(
            f"{names[-1]} is unpaired: list lora_A and lora_B of every layer in turn, and other "
            "parameters in a group with pairs=False"
        )
    for i in range(0, len(params), 2):
        A, B = params[i : i + 2]
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            raise ValueError(
                f"{names[i]} {tuple(A.shape)} and {names[i + 1]} {tuple(B.shape)} are no pair: "
                "expected lora_A (r, d_in), then lora_B (d_out, r)"
            )
        if A.dtype != B.dtype or A.device != B.device:
            raise ValueError(
                f"{names[i]} ({A.dtype}, {A.device}) and {names[i + 1]} ({B.dtype}, {B.device}) "
                "differ: bring both to one dtype and device"
            )
