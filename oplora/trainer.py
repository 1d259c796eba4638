"""HF Trainer with an optimizer that is built from the model."""

from collections.abc import Callable
from functools import partial

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer

from oplora.peft import create_oplora_optimizer

ADAMW = ("adamw_torch", "adamw_torch_fused")


class OPTrainerMixin:
    """Put in front of any Trainer class: `class MyTrainer(OPTrainerMixin, Seq2SeqTrainer): pass`.

    optimizer_factory: a callable model -> optimizer; without it `create_oplora_optimizer` with
    the learning rate, weight decay, betas and epsilon of the TrainingArguments, whose `optim`
    must then be an AdamW, and `direct_lr` for what is trained besides the adapters (None: the
    learning rate). It is called with the prepared model: Trainer's own `optimizers=` is not
    allowed under FSDP.
    FSDP1 and DeepSpeed raise ValueError.
    """

    def __init__(
        self,
        *args,
        optimizer_factory: Callable[[nn.Module], Optimizer] | None = None,
        direct_lr: float | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        other = kwargs.get("optimizer_cls_and_kwargs") or self.args.optim not in ADAMW
        if other and optimizer_factory is None:
            raise ValueError(
                f"optim={str(self.args.optim)!r} or optimizer_cls_and_kwargs would be ignored: "
                "give optimizer_factory=partial(create_oplora_optimizer, optimizer_cls=…, lr=…)"
            )
        if optimizer_factory is not None and direct_lr is not None:
            raise ValueError(
                f"direct_lr={direct_lr} would be ignored: give it in optimizer_factory"
            )
        self.optimizer_factory = optimizer_factory or partial(
            create_oplora_optimizer,
            lr=self.args.learning_rate,
            direct_lr=direct_lr,
            weight_decay=self.args.weight_decay,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
        )
        if self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed is not supported: use DDP or FSDP2")
        if self.is_fsdp_enabled:
            self._check_fsdp()

    def _check_fsdp(self):
        version = self.accelerator.state.fsdp_plugin.fsdp_version
        if version != 2:
            raise ValueError(
                f"FSDP{version} flattens the adapters: use FSDP2 (fsdp_version: 2 in fsdp_config)"
            )
        if self.args.save_strategy != "no" and not self.args.save_only_model:
            raise ValueError(
                "checkpoints of the optimizer are not supported under FSDP2: set "
                "save_only_model=True or save_strategy='no'"
            )

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            self.optimizer = self.optimizer_factory(self.model if model is None else model)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None):
        # Trainer wants an optimizer before FSDP2 replaces the parameters and calls this right
        # afterwards: whatever the first one knew about the parameters is void.
        if self.is_fsdp_enabled and optimizer is None:
            self.optimizer.optimizer = self.optimizer_factory(self.model)
        return super().create_scheduler(num_training_steps, optimizer)


class OPTrainer(OPTrainerMixin, Trainer):
    """`transformers.Trainer` that trains the model's adapters through MLPs."""
