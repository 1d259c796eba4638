"""HF Trainer with an optimizer that is built from the model."""

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import ModelCard
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer

import oplora
from oplora.adamw import OPAdamW
from oplora.optimizer import OPOptimizer
from oplora.peft import create_oplora_optimizer

ADAMW = ("adamw_torch", "adamw_torch_fused")
TAG = "op-lora"  # of saved adapters
TAGGED = (OPOptimizer, OPAdamW)  # what a subclass writes may be no MLP's (the controls)
_HEADING = "## Training procedure"


class OPTrainerMixin:
    """Put in front of any Trainer class: `class MyTrainer(OPTrainerMixin, Seq2SeqTrainer): pass`.

    optimizer_factory: a callable model -> optimizer; without it `create_oplora_optimizer` with
    the learning rate, weight decay, betas and epsilon of the TrainingArguments, whose `optim`
    must then be an AdamW, and `direct_lr` for what is trained besides the adapters (None: the
    learning rate). It is called with the prepared model: Trainer's own `optimizers=` is not
    allowed under FSDP.
    The TrainingArguments are read when the optimizer is made, as Trainer does: what
    `hyperparameter_search` and `trainer.args.learning_rate = …` change until then counts.
    Logs of training gain `op_multiplier`, the last one the sizes of adapter and MLPs; saved
    adapters the tag "op-lora" and a sentence in their model card.
    FSDP1 and DeepSpeed raise ValueError.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(OPTrainerMixin)]
        for base in before:
            foreign = issubclass(base, Trainer) and not issubclass(base, OPTrainerMixin)
            if foreign and "create_optimizer" in vars(base):
                raise TypeError(
                    f"class {cls.__name__} would train without MLPs: {base.__name__} stands before "
                    "OPTrainerMixin and makes the optimizer. Name the mixin first: "
                    f"class {cls.__name__}(OPTrainerMixin, {base.__name__})"
                )

    def __init__(
        self,
        *args,
        optimizer_factory: Callable[[nn.Module], Optimizer] | None = None,
        direct_lr: float | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        if optimizer_factory is not None and direct_lr is not None:
            raise ValueError(
                f"direct_lr={direct_lr} would be ignored: give it in optimizer_factory"
            )
        self.optimizer_factory = optimizer_factory
        self.direct_lr = direct_lr
        self._check_optimizer_choice()
        if self.optimizer is not None and (optimizer_factory or self._op() is None):
            raise ValueError(
                f"optimizers=({type(self.optimizer).__name__}, …) would train without the MLPs: "
                "leave it out, or give its maker as optimizer_factory"
            )
        if self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed is not supported: use DDP or FSDP2")
        if self.is_fsdp_enabled:
            self._check_fsdp()

    def _check_optimizer_choice(self):
        other = self.optimizer_cls_and_kwargs or self.args.optim not in ADAMW
        if other and self.optimizer_factory is None:
            raise ValueError(
                f"optim={str(self.args.optim)!r} or optimizer_cls_and_kwargs would be ignored: "
                "give optimizer_factory=partial(create_oplora_optimizer, optimizer_cls=…, lr=…)"
            )

    def _check_fsdp(self):
        version = self.accelerator.state.fsdp_plugin.fsdp_version
        if version != 2:
            raise ValueError(
                f"FSDP{version} flattens the adapters: use FSDP2 (fsdp_version: 2 in fsdp_config)"
            )

    # The optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            self.optimizer = self._make_optimizer(self.model if model is None else model)
            if type(self._op()) in TAGGED:
                self._tag()
        return self.optimizer

    def _make_optimizer(self, model: nn.Module) -> Optimizer:
        self._check_optimizer_choice()
        if self.optimizer_factory is not None:
            return self.optimizer_factory(model)
        return create_oplora_optimizer(
            model,
            lr=self.args.learning_rate,
            direct_lr=self.direct_lr,
            weight_decay=self.args.weight_decay,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
        )

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None):
        # Trainer wants an optimizer before FSDP2 replaces the parameters and calls this right
        # afterwards: whatever the first one knew about the parameters is void.
        if self.is_fsdp_enabled and optimizer is None:
            self.optimizer.optimizer = self._make_optimizer(self.model)
        return super().create_scheduler(num_training_steps, optimizer)

    def _op(self) -> OPOptimizer | None:
        """The optimizer without accelerate's wrapper, if it has MLPs."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer if isinstance(optimizer, OPOptimizer) and optimizer.stacks else None

    # What is told about the training

    def log(self, logs: dict[str, float], *args, **kwargs):
        """As Trainer's, with the MLPs' mean multiplier, and at the end the sizes.

        op_multiplier: 1 + ‖h‖₁, averaged over blocks: how many times the step of the MLP's last
        layer moves the adapter, when all gradients have one sign.
        """
        op = self._op()
        if op is not None and "loss" in logs:
            logs["op_multiplier"] = multiplier(op)
        if op is not None and "train_runtime" in logs:
            logs["adapter_parameters"] = op.adapter_parameters
            logs["mlp_parameters"] = op.mlp_parameters
        return super().log(logs, *args, **kwargs)

    def _tag(self):
        model = self.accelerator.unwrap_model(self.model)
        if hasattr(model, "get_base_model"):  # PEFT takes the tags from it
            model = model.get_base_model()
        if hasattr(model, "add_model_tags"):
            model.add_model_tags(TAG)

    def _save(self, output_dir: str | None = None, *args, **kwargs):
        super()._save(output_dir, *args, **kwargs)
        self._describe(output_dir or self.args.output_dir)

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        self._describe(self.args.output_dir)

    def _describe(self, folder: str):
        """Add to the model card there, if one was written, how the adapter was trained."""
        path, op = Path(folder) / "README.md", self._op()
        if type(op) not in TAGGED or not path.exists() or not self.args.should_save:
            return
        card = ModelCard.load(path)
        card.data.tags = sorted({*(card.data.tags or []), TAG})
        sentence = training_sentence(op)
        if sentence not in card.text:
            heading = "" if _HEADING in card.text else f"{_HEADING}\n\n"
            before, mark, after = card.text.partition("### Framework versions")
            card.text = f"{before.rstrip()}\n\n{heading}{sentence}\n\n{mark}{after}"
        card.save(path)


class OPTrainer(OPTrainerMixin, Trainer):
    """`transformers.Trainer` that trains the model's adapters through MLPs."""


def multiplier(optimizer: OPOptimizer) -> float:
    """1 + ‖h‖₁ of the MLPs' hidden units, averaged over blocks."""
    blocks = [stack.h.sum(1) + 1 for stack in optimizer.stacks]
    return sum(float(block.sum()) for block in blocks) / sum(len(block) for block in blocks)


def training_sentence(optimizer: OPOptimizer) -> str:
    """What a saved adapter's model card says about its training."""
    widths = sorted({group["mlp_width"] for group in optimizer.param_groups} - {0})
    return (
        f"Trained with [OP-LoRA](https://arxiv.org/abs/2412.10362) (oplora {oplora.__version__}, "
        f"{type(optimizer).__name__}, mlp_width={', '.join(map(str, widths))}): while it was "
        "trained, MLPs predicted this adapter; they are gone, and what is here is a plain adapter."
    )
