"""OP for PEFT models: which tensors one MLP predicts, and from what they start.

The only file that knows PEFT's internals. A block is one adapted layer with all tensors that one
adapter trains there, or a prompt's tokens; parameters outside adapted layers (modules_to_save,
biases, trainable tokens, …) are trained directly.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from peft import PeftType, PromptEmbedding
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from oplora.adamw import OPAdamW
from oplora.arguments import check_optimizer, with_keywords_of
from oplora.optimizer import OPOptimizer
from oplora.scale import ScaleAdamW
from oplora.tensors import whole

# What wrappers put into parameter names: without it a name, and so the MLP that it seeds, is the
# same compiled or not, checkpointed or not.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}
_FACTORS = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}


class Block(NamedTuple):
    """The tensors that one adapter trains in one layer, and its config (None if unknown)."""

    names: list[str]
    tensors: list[Tensor]
    kinds: list[str]  # PEFT's name of each tensor's role: "lora_A", "lora_magnitude_vector", …
    config: object


@with_keywords_of(OPOptimizer.__init__)
def create_oplora_optimizer(
    model: nn.Module | Sequence[nn.Module],
    optimizer_cls: type[Optimizer] = torch.optim.AdamW,
    *,
    lr: float,
    mlp_width: int = 32,
    start: str = "auto",
    shared_trunk: bool = True,
    init: str = "author",
    direct_lr: float | None = None,
    layer_lr: dict[str, float] | None = None,
    **kwargs,
) -> OPOptimizer:
    """An optimizer with one MLP per adapted layer (OP-LoRA, section 4).

    model: any module with PEFT adapters (PeftModel, diffusers' add_adapter), or a list of them
        that are trained together, after wrapping with DDP or FSDP2. What it trains outside
        adapted layers rides along directly, biases and norms without weight decay.
    optimizer_cls: AdamW gives `OPAdamW`, any other class `OPOptimizer` with it.
    start: "auto" takes the paper's start (B zero, A from the MLP) where PEFT's default
        initialisation left one factor of LoRA zero, else "keep"; "paper" insists on it and raises
        ValueError where it would replace trained values; "keep" leaves every value as it is, and
        so does "still", with W2 zero for every tensor. The model's output at step 0 is the same
        in all of them.
    shared_trunk: False gives every tensor an MLP of its own (two trunks for LoRA).
    init: "author", the start of the paper's code, or "text", its text's (`oplora.mlp.initial_mlp`).
    direct_lr: the learning rate of what is trained besides the adapters; None: lr.
    layer_lr: other learning rates for layers, by regular expressions of which the first that is
        found in the name of a layer's first tensor counts.
    kwargs: of optimizer_cls and of `OPOptimizer` (z_dim, z_std, seed, clip, …).
    """
    groups = oplora_groups(
        model,
        mlp_width,
        start,
        shared_trunk=shared_trunk,
        init=init,
        direct_lr=direct_lr,
        layer_lr=layer_lr,
    )
    if optimizer_cls is torch.optim.AdamW:
        return OPAdamW(groups, lr=lr, init=init, **kwargs)
    return OPOptimizer(groups, optimizer_cls, lr=lr, init=init, **kwargs)


@with_keywords_of(create_oplora_optimizer)
def create_oplora_lite_optimizer(
    model: nn.Module | Sequence[nn.Module],
    optimizer_cls: type[Optimizer] = torch.optim.AdamW,
    **options,
) -> OPAdamW:
    """`create_oplora_optimizer` with one row in place of W2, approximately; for AdamW alone."""
    if optimizer_cls is not torch.optim.AdamW:
        check_optimizer(optimizer_cls)
        raise ValueError(f"the Lite form needs optimizer=adamw, not {optimizer_cls.__name__}")
    return create_oplora_optimizer(model, lite=True, **options)


@with_keywords_of(ScaleAdamW.__init__)
def create_scale_optimizer(
    model: nn.Module | Sequence[nn.Module],
    optimizer_cls: type[Optimizer] = torch.optim.AdamW,
    *,
    lr: float = 1e-3,
    direct_lr: float | None = None,
    **kwargs,
) -> ScaleAdamW:
    """AdamW with a learned scale of its steps for every adapted layer, in place of an MLP.

    model, direct_lr: as for `create_oplora_optimizer`. optimizer_cls: for callers that name one;
    only AdamW. lr: of the first step; what is found afterwards depends little on it.
    kwargs: of `ScaleAdamW` (betas, eps, weight_decay, eta, line_betas).
    """
    if optimizer_cls is not torch.optim.AdamW:
        check_optimizer(optimizer_cls)
        raise ValueError(f"the scale needs optimizer=adamw, not {optimizer_cls.__name__}")
    model = _unwrap(model)
    blocks, others = _found_blocks(model)
    pairs = [list(zip(block.names, block.tensors, strict=True)) for block in blocks]
    direct = {"scaled": False, "lr": lr if direct_lr is None else direct_lr}
    groups = [{"params": pairs}, *({**group, **direct} for group in decay_groups(model, others))]
    return ScaleAdamW(groups, lr=lr, **kwargs)


def oplora_groups(
    model: nn.Module | Sequence[nn.Module],
    mlp_width: int = 32,
    start: str = "auto",
    *,
    shared_trunk: bool = True,
    init: str = "author",
    direct_lr: float | None = None,
    layer_lr: dict[str, float] | None = None,
) -> list[dict]:
    """Parameter groups for `OPOptimizer`: all blocks, then what is trained directly."""
    model = _unwrap(model)
    blocks, others = _found_blocks(model)
    starts = [starts_of(block, start, init) for block in blocks]
    pairs = [list(zip(block.names, block.tensors, strict=True)) for block in blocks]
    if not shared_trunk:
        pairs = [[pair] for block in pairs for pair in block]
        starts = [[s] for block in starts for s in block]
    groups = []
    for lr, members in _by_rate([block[0][0] for block in pairs], layer_lr or {}).items():
        group = {
            key: [each[i] for i in members] for key, each in (("params", pairs), ("start", starts))
        }
        groups.append({**group, "mlp_width": mlp_width, **({} if lr is None else {"lr": lr})})
    rate = {} if direct_lr is None else {"lr": direct_lr}
    direct = [{**group, "mlp_width": 0, **rate} for group in decay_groups(model, others)]
    return groups + direct


def _found_blocks(model: nn.Module) -> tuple[list[Block], list[tuple[str, Tensor]]]:
    """`adapter_blocks`, of which there must be some."""
    blocks, others = adapter_blocks(model)
    if not blocks:
        raise ValueError(
            "the model trains no tensor of an adapted layer: add an adapter (get_peft_model, "
            "add_adapter), activate it (set_adapter) and do not freeze it; of prompt-learning "
            "methods only prompt tuning has a tensor of its own"
        )
    return blocks, others


def _by_rate(names: list[str], layer_lr: dict[str, float]) -> dict[float | None, list[int]]:
    """Numbers of names by the rate of the first pattern that is found in them; None: no pattern."""
    found: dict[float | None, list[int]] = {}
    unused = set(layer_lr)
    for number, name in enumerate(names):
        pattern = next((p for p in layer_lr if re.search(p, name)), None)
        unused.discard(pattern)
        found.setdefault(layer_lr.get(pattern), []).append(number)
    if unused:
        raise ValueError(f"layer_lr: {min(unused)!r} is in no name of a layer, as in {names[0]}")
    return found


def parameter_report(
    model: nn.Module,
    mlp_width: int = 0,
    *,
    z_dim: int = 128,
    shared_trunk: bool = True,
    optimizer_cls: type[Optimizer] = torch.optim.AdamW,
    moments: int = 2,
    lite: bool = False,
) -> dict[str, int]:
    """Counts of parameters and an estimate of the optimizer's memory, also of meta tensors.

    mlp_width: 0 for methods without MLPs. moments: tensors that the optimizer keeps per
    parameter (AdamW 2, momentum 1, SGD 0). lite: of `OPAdamW(…, lite=True)`.
    `mlp_parameters` is everything in the MLPs, `mlp_output_parameters` their W2 alone, which is
    what the paper counts. `optimizer_state_bytes` contains MLPs and moments; under AdamW W2's and
    its moments' rows of half of the hidden units, which are expected to be active. The Lite form
    trains one row in place of W2, and keeps about a quarter of it (the active rows of A).
    """
    blocks, others = adapter_blocks(model)
    tensors = [tensor for block in blocks for tensor in block.tensors]
    adapter = sum(tensor.numel() for tensor in tensors)
    count = (len(blocks) if shared_trunk else len(tensors)) if mlp_width else 0
    trunks = count * (z_dim + mlp_width * z_dim + mlp_width)
    output = adapter if lite else mlp_width * adapter
    mlp = trunks + output + (adapter if mlp_width else 0)
    inactive = output // 2 if optimizer_cls is torch.optim.AdamW and not lite else 0
    held = mlp - inactive
    held += mlp_width * adapter // 4 if lite else 0
    direct = [tensor for _, tensor in others] + ([] if mlp_width else tensors)
    direct_bytes = sum(tensor.numel() * tensor.element_size() for tensor in direct)
    return {
        "adapter_parameters": adapter,
        "other_trained_parameters": sum(tensor.numel() for _, tensor in others),
        "mlp_parameters": mlp,
        "mlp_output_parameters": output,
        "optimizer_state_bytes": 4 * (held + moments * (mlp - inactive)) + moments * direct_bytes,
    }


def adapter_blocks(model: nn.Module) -> tuple[list[Block], list[tuple[str, Tensor]]]:
    """Blocks of the trained adapters, and (name, tensor) pairs of what else is trained.

    A tensor that several layers share (VB-LoRA's bank) is a block of its own.
    """
    model = _unwrap(model)
    modules = list(model.named_modules())
    configs = {
        path: module.peft_config
        for path, module in modules
        if isinstance(getattr(module, "peft_config", None), dict)
    }
    found: dict[tuple[str, str], dict[int, tuple[str, Tensor, str]]] = {}
    layers_of: dict[int, set[str]] = {}
    for path, layer in modules:
        if type(layer) is PromptEmbedding and layer.embedding.weight.requires_grad:
            name, weight = f"{_plain_name(path)}.embedding.weight", layer.embedding.weight
            found[path, path.rpartition(".")[2]] = {id(weight): (name, weight, "prompt")}
            layers_of[id(weight)] = {path}
        if not isinstance(layer, BaseTunerLayer) or isinstance(layer, TrainableTokensLayer):
            continue
        for name, tensor, kind, adapter in _layer_tensors(path, layer):
            if layer.merged:
                raise ValueError(f"{name} is merged into its layer: call unmerge_adapter() first")
            found.setdefault((path, adapter), {})[id(tensor)] = (name, tensor, kind)
            layers_of.setdefault(id(tensor), set()).add(path)
    blocks, shared = [], {}
    for (path, adapter), entries in found.items():
        config = _config(configs, path, adapter)
        own = [e for key, e in entries.items() if len(layers_of[key]) == 1]
        if own:
            blocks.append(Block(*map(list, zip(*own, strict=True)), config))
        for key, (name, tensor, kind) in entries.items():
            if len(layers_of[key]) > 1:
                shared.setdefault(key, Block([name], [tensor], [kind], config))
    others = [
        (_plain_name(name), tensor)
        for name, tensor in model.named_parameters()
        if tensor.requires_grad and id(tensor) not in layers_of
    ]
    return blocks + list(shared.values()), others


def decay_groups(model: nn.Module, pairs: list[tuple[str, Tensor]]) -> list[dict]:
    """Parameter groups of these tensors: biases and norms without weight decay, as HF Trainer."""
    exempt = {
        id(tensor)
        for module in model.modules()
        for name, tensor in module.named_parameters(recurse=False)
        if "bias" in name or "norm" in type(module).__name__.lower()
    }
    decayed = [pair for pair in pairs if id(pair[1]) not in exempt]
    spared = [pair for pair in pairs if id(pair[1]) in exempt]
    groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def create_plain_optimizer(model: nn.Module, optimizer_cls: type[Optimizer], **kwargs) -> Optimizer:
    """`optimizer_cls` on all trained parameters, biases and norms without weight decay."""
    pairs = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = decay_groups(model, pairs)
    for group in groups:
        group["params"] = [tensor for _, tensor in group["params"]]
    return optimizer_cls(groups, **kwargs)


def _unwrap(model: nn.Module | Sequence[nn.Module]) -> nn.Module:
    if isinstance(model, list | tuple):
        return nn.ModuleList(_unwrap(each) for each in model)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"a {type(model).__name__} is no model: give the module with the adapter, or give "
            "tensors to oplora.OPAdamW"
        )
    if type(model).__name__ == "DeepSpeedEngine":
        raise ValueError("DeepSpeed is not supported: use DDP or FSDP2")
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError("FSDP1 flattens the adapters: use FSDP2 (fully_shard, fsdp_version: 2)")
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    return model


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _layer_tensors(path: str, layer: BaseTunerLayer):
    """(name, tensor, kind, adapter) of everything that adapters train in this layer."""
    for kind in layer.adapter_layer_names:
        container = getattr(layer, kind, None)
        if not isinstance(container, nn.Module):
            continue
        for name, tensor in container.named_parameters():  # "<adapter>" or "<adapter>.weight"
            if tensor.requires_grad:
                parts = [path, kind, name] if path else [kind, name]
                yield _plain_name(".".join(parts)), tensor, kind, name.split(".")[0]
    # "<kind>.<adapter>" of our own adapters, which PEFT would save as LoRA's if it found them
    for name, tensor in getattr(layer, "beside_adapter", {}).items():
        yield _plain_name(f"{path}.{name}"), tensor, *name.split(".")


def _config(configs: dict[str, dict], path: str, adapter: str):
    """The adapter's config from the innermost model around the layer that has one."""
    for prefix in sorted(configs, key=len, reverse=True):
        if (not prefix or path.startswith(prefix + ".")) and adapter in configs[prefix]:
            return configs[prefix][adapter]
    return None


def starts_of(block: Block, start: str, init: str) -> list[str]:
    """A start for every tensor of the block (`oplora.mlp.initial_mlp`)."""
    if start not in ("auto", "paper", "keep", "still"):
        raise ValueError(f"start={start!r} is unknown: use 'auto', 'paper', 'keep' or 'still'")
    zero = [_is_zero(tensor) for tensor in block.tensors]
    is_factor = [  # not lora_bias
        kind in _FACTORS and tensor.ndim > 1
        for kind, tensor in zip(block.kinds, block.tensors, strict=True)
    ]
    lora = getattr(block.config, "peft_type", None) == PeftType.LORA
    possible = lora and any(z and f for z, f in zip(zero, is_factor, strict=True))
    if start == "paper" and not possible:
        raise ValueError(
            f"start='paper' would replace values of {block.names[0]} that count: it needs LoRA "
            "with one factor zero, as PEFT's default initialisation leaves it. Use start='auto'"
        )
    # Other initialisations that leave B zero (EVA) have chosen A on purpose.
    default = lora and block.config.init_lora_weights in (True, "gaussian")
    replace = possible and (start == "paper" or (start == "auto" and default))
    # In the paper's code DoRA's magnitude is ‖W0‖ plus an offset that starts at zero.
    other = "still" if start == "still" or (replace and init == "author") else "keep"
    return [
        "still" if z else "random" if replace and factor else other
        for z, factor in zip(zero, is_factor, strict=True)
    ]


def _is_zero(tensor: Tensor) -> bool:
    # Meta and quantised tensors have no values to look at: the optimizer refuses them by name.
    return not (tensor.is_meta or tensor.element_size() < 2) and not whole(tensor).any()
