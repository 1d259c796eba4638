"""RoSA (arXiv 2401.04679): LoRA, and a sparse addition to W in places that gradients choose."""

from pathlib import Path

import torch
from peft import PeftModel, ShiraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.optim import Optimizer
from transformers import TrainerCallback

from oplora.baselines.products import lora_layers
from oplora.peft import create_plain_optimizer


class Sparse:
    """`values` (count,) that are added to a layer's W in flat `places`.

    One more tensor of the layer's adapter, which is not in PEFT's files. W holds the sum with its
    `first` values there, in its precision, so the forward pass is LoRA's own; it is frozen except
    between a forward pass and its gradient.
    """

    def __init__(self, layer: LoraLayer, adapter: str, density: float):
        base = layer.get_base_layer()
        self.weight, self.places, self.squares, self.wanted = base.weight, None, 0, False
        if not self.weight.is_floating_point():
            raise ValueError(f"rosa cannot add to weights of {self.weight.dtype}: do not quantise")
        values = self.weight.new_zeros(max(1, int(density * self.weight.numel())))
        dtype = torch.promote_types(values.dtype, torch.float32)
        self.values = nn.Parameter(values.to(dtype))
        layer.sparse, layer.beside_adapter = self, {f"sparse.{adapter}": self.values}
        base.register_forward_pre_hook(self._ask)
        self.weight.requires_grad_(True).register_post_accumulate_grad_hook(self._receive)
        self.weight.requires_grad_(False)

    def _ask(self, base: nn.Module, inputs: tuple):
        self.weight.requires_grad_(self.wanted and torch.is_grad_enabled())

    def _receive(self, weight: Tensor):
        gradient, weight.grad = weight.grad.to(self.values.dtype), None
        weight.requires_grad_(False)
        if self.places is None:
            self.squares += gradient.square().cpu()
        else:
            part, before = gradient.flatten()[self.places], self.values.grad
            self.values.grad = part if before is None else before + part

    @torch.no_grad()
    def take(self, places: Tensor | None, values: Tensor | int = 0):
        if self.places is not None:  # another state is loaded
            self.weight.view(-1)[self.places] = self.first.to(self.weight.dtype)
        self.values[:], self.places, self.squares = values, places, 0
        if places is not None:
            self.places = places.to(self.weight.device)
            self.first = self.weight.flatten()[self.places].to(self.values.dtype)

    @torch.no_grad()
    def write(self):
        if self.places is not None:
            self.weight.view(-1)[self.places] = (self.first + self.values).to(self.weight.dtype)


def create_rosa_optimizer(
    model: PeftModel, optimizer_cls: type[Optimizer], *, density: float, warmup_steps: int, **kwargs
) -> Optimizer:
    """The plain optimizer, which also moves a share `density` of every adapted weight.

    As the released code's schedules "wl…": LoRA alone for warmup_steps, one more step in which
    squared gradients are summed (a copy of the weights on the CPU), from then on LoRA and the
    places of the largest sums. Places and values are in the optimizer's state.
    """
    if not 0 < density <= 1 or not isinstance(warmup_steps, int) or warmup_steps < 0:
        raise ValueError(f"{density=} must be above 0 and up to 1, {warmup_steps=} whole, from 0")
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ValueError("rosa exchanges no gradients of weights: train in one process")
    layers, adapter = lora_layers(model)
    parts = {name: Sparse(layer, adapter, density) for name, layer in layers.items()}
    model.rosa = nn.ParameterList(part.values for part in parts.values())  # clipped with the rest
    optimizer = create_plain_optimizer(model, optimizer_cls, **kwargs)

    def reach(step: int):
        optimizer.rosa = {"step": step, "warmup": warmup_steps}
        for part in parts.values():
            part.wanted = step >= warmup_steps
            if step > warmup_steps and part.places is None:
                part.take(part.squares.flatten().topk(len(part.values)).indices)
            part.write()

    def save(optimizer: Optimizer, state: dict):
        chosen = {name: (part.places, part.values.detach()) for name, part in parts.items()}
        state["rosa"] = {**optimizer.rosa, "chosen": chosen}

    def load(optimizer: Optimizer, state: dict):
        for name, chosen in state["rosa"]["chosen"].items():
            parts[name].take(*chosen)
        reach(state["rosa"]["step"])

    optimizer.register_step_post_hook(lambda *_: reach(optimizer.rosa["step"] + 1))
    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)
    reach(0)
    return optimizer


class EnoughSteps(TrainerCallback):
    """Refuses a training that would end before its sparse part begins."""

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        warmup = getattr(optimizer, "optimizer", optimizer).rosa["warmup"]
        if state.max_steps <= warmup + 1:
            raise ValueError(f"warmup_steps={warmup} leaves rosa none of {state.max_steps} steps")


def save_sparse(model: PeftModel, folder: Path) -> None:
    """Save the sparse part in folder/sparse as PEFT's SHiRA, which is merged before LoRA is added.

    SHiRA has r (d_in + d_out) values in every layer: zeros fill them up.
    """
    layers, adapter = lora_layers(model)
    parts = {name: layer.sparse for name, layer in layers.items()}
    rank, state = max(-(-len(p.values) // sum(p.weight.shape)) for p in parts.values()), {}
    for name, part in parts.items():
        part.write()  # where the best weights were loaded
        more = rank * sum(part.weight.shape) - len(part.values)
        places = torch.unravel_index(pad(part.places, (0, more)), part.weight.shape)
        state[f"{name}.shira_indices"] = torch.stack(places).int()
        state[f"{name}.shira_weight"] = pad(part.values.detach(), (0, more))
    of_lora = model.peft_config[adapter].to_dict()
    same = ("target_modules", "task_type", "base_model_name_or_path")
    config = ShiraConfig(r=rank, inference_mode=True, **{key: of_lora[key] for key in same})
    config.save_pretrained(folder / "sparse")
    save_file(state, folder / "sparse/adapter_model.safetensors", metadata={"format": "pt"})
