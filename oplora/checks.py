"""Wrong input to the optimizers: refused early, with the value and the remedy."""

from torch import Tensor


def check_choice(name: str, value, choices: tuple):
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: use {' or '.join(map(repr, choices))}")


def check_tensor(tensor, name: str, known: set[int]):
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, not a tensor")
    if id(tensor) in known:
        raise ValueError(f"{name} is given twice: a tensor belongs to one block of one group")
    known.add(id(tensor))
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
    if getattr(tensor, "_is_flat_param", False) or type(tensor).__name__ == "FlatParameter":
        raise ValueError(f"{name} is an FSDP1 flat parameter: use FSDP2 (fsdp_version: 2)")
