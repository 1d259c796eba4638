"""Wrong input to the optimizers: refused early, with the value and the remedy."""

from torch import Tensor
from torch.optim import Optimizer

from oplora.shards import local


def check_choice(name: str, value, choices: tuple):
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: use {' or '.join(map(repr, choices))}")


def check_optimizer(optimizer_cls):
    """Can this class train MLPs: elementwise, within one step, on the weights that it evaluates?"""
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"{optimizer_cls!r} is no optimizer class: give one as torch.optim.AdamW")
    name = optimizer_cls.__name__
    if name == "LBFGS":
        raise ValueError("LBFGS evaluates the loss within a step: use a first-order optimizer")
    if name in ("Muon", "SparseAdam"):
        raise ValueError(f"{name} is not for the dense tensors of any shape that an MLP has")
    if hasattr(optimizer_cls, "eval"):
        raise ValueError(
            f"{name} evaluates other weights than it trains (schedule-free), which the MLPs "
            "cannot follow: use AdamW, or train the adapter directly"
        )


def places(tensor: Tensor) -> list:
    """What no other tensor of an optimizer may share: identity, and where its values begin."""
    mine = local(tensor)
    start = (mine.device, mine.untyped_storage().data_ptr(), mine.storage_offset())
    return [id(tensor), *([start] if mine.numel() else [])]


def check_tensor(tensor, name: str, known: dict):
    """known: names of the tensors so far, by their `places`; this one's are added."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, not a tensor")
    if id(tensor) in known:
        raise ValueError(f"{name} is given twice: a tensor belongs to one block of one group")
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise ValueError(f"{name} has dtype {tensor.dtype}: quantised tensors cannot be predicted")
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device: load the model before its optimizer")
    if not tensor.requires_grad:
        raise ValueError(f"{name} is frozen: set requires_grad=True or leave it out")
    if not tensor.is_leaf:
        raise ValueError(f"{name} is computed from other tensors: give the parameter itself")
    if hasattr(tensor, "ds_id"):
        raise ValueError(
            f"{name} belongs to DeepSpeed ZeRO-3, which is not supported: use DDP or FSDP2"
        )
    for place in places(tensor):
        if place in known:
            raise ValueError(
                f"{name} shares its memory with {known[place]} (as PEFT's ensure_weight_tying "
                "makes it): two MLPs cannot predict one value, leave one of them out"
            )
        known[place] = name
    if getattr(tensor, "_is_flat_param", False) or type(tensor).__name__ == "FlatParameter":
        raise ValueError(f"{name} is an FSDP1 flat parameter: use FSDP2 (fsdp_version: 2)")
