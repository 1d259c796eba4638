"""OPTrainer: resuming, accumulation, checkpointing, other ways to hand over an optimizer."""

from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from huggingface_hub import ModelCard
from hydra.utils import get_class
from omegaconf import OmegaConf
from peft import LoraConfig, PeftModel, get_peft_model
from schedulefree import AdamWScheduleFree
from tiny_models import FAMILIES, decoder
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

import oplora
from oplora.baselines.controls import MatchedAdamW
from oplora.harness.finetuning import train
from oplora.harness.methods import OptimizerFactory
from oplora.peft import oplora_groups

TARGETS = ["q_proj", "v_proj", "up_proj"]


def data(rows=32):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, 64, (rows, 8), generator=generator)
    return [dict(input_ids=row, labels=row) for row in tokens]


def arguments(folder, cls=TrainingArguments, **kw):
    options = dict(
        use_cpu=True,
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        weight_decay=0.01,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    return cls(str(folder), **{**options, **kw})


def model(dtype=torch.float32, **kw):
    config = LoraConfig(**{"r": 4, "target_modules": TARGETS, "use_dora": True, **kw})
    return get_peft_model(decoder().to(dtype), config)


def adapter(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def difference(first, second):
    return max((first[n] - second[n]).abs().max().item() for n in first)


def test_schedule_free_training_ends_with_the_weights_it_means(tmp_path):
    run = SimpleNamespace(path=tmp_path)
    made = []

    def factory(net):
        made.append(AdamWScheduleFree([p for p in net.parameters() if p.requires_grad], lr=1e-2))
        return made[0]

    training = {
        "_target_": "transformers.TrainingArguments", "max_steps": 3, "report_to": "none",
        "use_cpu": True, "save_strategy": "no",
    }  # fmt: skip
    train(model(), OptimizerFactory(factory), OmegaConf.create(training), run, train_dataset=data())
    assert not made[0].param_groups[0]["train_mode"]


def trained(folder, build=model, trainer_cls=oplora.OPTrainer, resume=None, trainer_kw=None, **kw):
    net = build()
    start = {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}
    trainer = trainer_cls(net, arguments(folder, **kw), train_dataset=data(), **(trainer_kw or {}))
    trainer.train(resume_from_checkpoint=resume)
    result = adapter(trainer)
    assert difference(result, start) > 1e-3, "nothing was trained"
    return trainer, result


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_resumed_run_is_bit_identical(modules_to_save, tmp_path):
    build = partial(model, modules_to_save=modules_to_save)
    options = dict(save_strategy="steps", save_steps=3, warmup_steps=2)
    trainer, whole = trained(tmp_path / "whole", build, **options)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    _, resumed = trained(tmp_path / "resumed", build, resume=str(checkpoint), **options)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    last = PeftModel.from_pretrained(decoder(), tmp_path / "whole" / "checkpoint-6")
    tokens = torch.stack([row["input_ids"] for row in data(4)])
    with torch.no_grad():
        assert torch.equal(last.eval()(tokens).logits, trainer.model.eval()(tokens).logits)


def test_accumulation_4_times_2_equals_1_times_8(tmp_path):
    whole = trained(tmp_path, per_device_train_batch_size=8)[1]
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert difference(trained(tmp_path, **options)[1], whole) <= 1e-5


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant, tmp_path):
    plain = trained(tmp_path)[1]
    kind = dict(use_reentrant=use_reentrant)
    options = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=kind)
    trainer, checkpointed = trained(tmp_path, **options)
    assert trainer.model.is_gradient_checkpointing
    assert difference(plain, checkpointed) == 0.0


def test_defaults_come_from_the_training_arguments(tmp_path):
    trainer, _ = trained(tmp_path, adam_epsilon=1e-6, adam_beta2=0.9)
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is oplora.OPAdamW
    group = optimizer.param_groups[0]
    assert (group["eps"], group["betas"], group["weight_decay"]) == (1e-6, (0.9, 0.9), 0.01)


def rates(trainer):
    return [group["initial_lr"] for group in trainer.optimizer.param_groups]


def test_the_arguments_are_read_when_the_optimizer_is_made(tmp_path):
    build = partial(model, modules_to_save=["lm_head"])
    trainer = oplora.OPTrainer(build(), arguments(tmp_path, max_steps=1), train_dataset=data())
    changed = dict(learning_rate=0.02, weight_decay=0.3, adam_beta1=0.5, adam_epsilon=1e-3)
    for name, value in changed.items():
        setattr(trainer.args, name, value)
    trainer.train()
    assert rates(trainer) == [0.02, 0.02]  # the blocks, and what is trained directly
    for group in trainer.optimizer.param_groups:
        assert (group["weight_decay"], group["eps"]) == (0.3, 1e-3)
        assert group["betas"] == (0.5, 0.999)


def test_the_choice_of_an_optimizer_is_checked_when_it_is_made(tmp_path):
    trainer = oplora.OPTrainer(model(), arguments(tmp_path), train_dataset=data())
    trainer.args.optim = "sgd"
    with pytest.raises(ValueError, match="optimizer_factory=partial"):
        trainer.train()


def test_every_trial_of_a_search_trains_at_its_own_rate(tmp_path):
    def trial(lr):  # as Trainer's hyperparameter_search changes args and trains again
        trainer.args.learning_rate = lr
        trainer.train()
        return rates(trainer), adapter(trainer)

    options = dict(model_init=lambda: model(), train_dataset=data())
    trainer = oplora.OPTrainer(args=arguments(tmp_path), **options)
    for lr in (1e-3, 3e-3, 1e-2):
        chosen, tried = trial(lr)
        alone = oplora.OPTrainer(args=arguments(tmp_path, learning_rate=lr), **options)
        alone.train()
        assert chosen == [lr]
        assert difference(tried, adapter(alone)) == 0.0


def test_a_trial_of_trainers_own_search_sets_the_rate(tmp_path):
    options = dict(model_init=lambda: model(), train_dataset=data())
    trainer = oplora.OPTrainer(args=arguments(tmp_path, max_steps=1), **options)
    trainer.hp_search_backend, trainer.hp_name = HPSearchBackend.OPTUNA, None
    # hyperparameter_search without its backends, none of which is installed
    trainer.hp_space = params = lambda trial: trial.params
    with mock.patch("transformers.integrations.hp_params", params):
        for number, lr in enumerate((2e-3, 5e-3)):
            trainer.train(trial=SimpleNamespace(number=number, params={"learning_rate": lr}))
            assert rates(trainer) == [lr]


@pytest.mark.parametrize("last", [oplora.OPTrainerMixin, oplora.OPTrainer])
def test_a_trainer_in_front_of_the_mixin_is_refused(last):
    class Own(Seq2SeqTrainer):
        def create_optimizer(self, model=None):
            return super().create_optimizer()

    before = Seq2SeqTrainer if last is oplora.OPTrainerMixin else Own
    with pytest.raises(TypeError, match=r"class Wrong\(OPTrainerMixin, (Trainer|Own)\)"):
        type("Wrong", (before, last), {})


def test_classes_in_the_right_order_are_made():
    class Harmless(Seq2SeqTrainer):
        pass

    class Own(oplora.OPTrainerMixin, Harmless):
        def create_optimizer(self, model=None):
            return super().create_optimizer(model)

    assert issubclass(type("Further", (Own,), {}), Harmless)
    assert issubclass(type("Mixin", (oplora.OPTrainerMixin,), {}), oplora.OPTrainerMixin)


def test_a_finished_optimizer_without_mlps_is_refused(tmp_path):
    net = model()
    plain = torch.optim.AdamW(net.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match=r"optimizers=\(AdamW, …\) would train without the MLPs"):
        oplora.OPTrainer(net, arguments(tmp_path), optimizers=(plain, None))
    made = oplora.create_oplora_optimizer(net, lr=1e-3)
    trainer = oplora.OPTrainer(net, arguments(tmp_path), optimizers=(made, None))
    assert trainer.create_optimizer() is made
    factory = partial(oplora.create_oplora_optimizer, lr=1e-2)
    with pytest.raises(ValueError, match="leave it out"):
        oplora.OPTrainer(
            net, arguments(tmp_path), optimizers=(made, None), optimizer_factory=factory
        )


def test_logs_tell_the_multiplier_and_the_sizes(tmp_path):
    trainer, _ = trained(
        tmp_path, eval_strategy="steps", eval_steps=3, trainer_kw=dict(eval_dataset=data(4))
    )
    optimizer = trainer.optimizer.optimizer
    (stack,) = optimizer.stacks
    norms = [torch.relu(t["W1"] @ t["z"] + t["b1"]).abs().sum() for t in stack.trunks]
    history = trainer.state.log_history
    steps = [entry["op_multiplier"] for entry in history if "loss" in entry]
    assert len(steps) == 6 and steps[-1] == pytest.approx(1 + float(sum(norms)) / len(norms))
    assert steps[0] != steps[-1]
    sizes = (history[-1]["adapter_parameters"], history[-1]["mlp_parameters"])
    assert sizes == (optimizer.adapter_parameters, optimizer.mlp_parameters)
    assert not any("op_multiplier" in entry for entry in history if "eval_loss" in entry)


def test_saved_adapters_say_how_they_were_trained(tmp_path):
    trainer, _ = trained(tmp_path, save_strategy="steps", save_steps=3)
    trainer.save_model(str(tmp_path / "saved"))
    trainer.save_model(str(tmp_path / "saved"))
    trainer.save_model()
    trainer.create_model_card()  # as push_to_hub: Trainer writes the card anew
    for name in ("checkpoint-3", "saved", ""):
        card = ModelCard.load(tmp_path / name / "README.md")
        assert {"op-lora", "lora"} <= set(card.data.tags)
        assert card.text.count("Trained with [OP-LoRA]") == 1
        assert f"(oplora {oplora.__version__}, OPAdamW, mlp_width=32)" in card.text
    trainer.model.save_pretrained(tmp_path / "own")
    assert "op-lora" in ModelCard.load(tmp_path / "own" / "README.md").data.tags


def plain(net):
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)


def matched(net):
    return MatchedAdamW(oplora_groups(net), lr=1e-3)


@pytest.mark.parametrize("factory", [plain, matched])
def test_adapters_trained_without_mlps_are_not_called_so(factory, tmp_path):
    options = dict(save_strategy="steps", trainer_kw=dict(optimizer_factory=factory))
    trainer, _ = trained(tmp_path, **options)
    card = ModelCard.load(tmp_path / "checkpoint-6" / "README.md")
    assert "op-lora" not in card.data.tags and "OP-LoRA" not in card.text
    told = any("op_multiplier" in entry for entry in trainer.state.log_history)
    assert told == (factory is matched)  # its step sizes are those of MLPs


@pytest.mark.parametrize(
    "options", [dict(optim="sgd"), dict(trainer_kw=dict(optimizer_cls_and_kwargs=(1, {})))]
)
def test_an_optimizer_that_would_be_ignored_is_refused(options, tmp_path):
    with pytest.raises(ValueError, match="optimizer_factory=partial"):
        trained(tmp_path, **options)


def test_any_factory_and_any_trainer(tmp_path):
    class SequenceTrainer(oplora.OPTrainerMixin, Seq2SeqTrainer):
        pass

    def build():
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        return get_peft_model(FAMILIES["encoder-decoder"].build(), config)

    seen = []

    def factory(net):
        seen.append(net)
        return oplora.create_oplora_optimizer(net, torch.optim.SGD, lr=0.3, mlp_width=4)

    trainer, _ = trained(
        tmp_path,
        build,
        SequenceTrainer,
        trainer_kw=dict(optimizer_factory=factory),
        cls=Seq2SeqTrainingArguments,
    )
    assert seen == [trainer.model]
    assert isinstance(trainer.optimizer.optimizer.inner, torch.optim.SGD)


def test_stock_trainer_takes_the_finished_optimizer(tmp_path):
    def stock(net, args, **kw):
        optimizer = oplora.create_oplora_optimizer(net, lr=3e-3, weight_decay=0.01, eps=1e-8)
        return Trainer(net, args, optimizers=(optimizer, None), **kw)

    assert difference(trained(tmp_path)[1], trained(tmp_path, trainer_cls=stock)[1]) == 0.0


def test_stock_trainer_takes_the_class_alone(tmp_path):
    choice = (get_class("oplora.OPAdamW"), dict(lr=3e-3, mlp_width=8))
    options = dict(trainer_kw=dict(optimizer_cls_and_kwargs=choice), save_strategy="steps")
    trainer, whole = trained(tmp_path / "a", trainer_cls=Trainer, save_steps=3, **options)
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is oplora.OPAdamW
    assert all(len(block) == 1 for stack in optimizer.stacks for block in stack.tensors.blocks)
    starts = [start for stack in optimizer.stacks for (start,) in stack.starts]
    assert sorted(starts) == ["keep"] * 12 + ["still"] * 6  # A and the magnitude; B
    resumed = trained(
        tmp_path / "b",
        trainer_cls=Trainer,
        save_steps=3,
        resume=str(tmp_path / "a" / "checkpoint-3"),
        **options,
    )[1]
    assert difference(whole, resumed) == 0.0


class Refusing(oplora.OPTrainer):
    """A trainer whose accelerator says that it runs under FSDP or DeepSpeed."""

    def __init__(self, *args, deepspeed=False, fsdp_version=None, **kw):
        self.fake = (deepspeed, fsdp_version)
        super().__init__(*args, **kw)

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.is_deepspeed_enabled, version = self.fake
        self.is_fsdp_enabled = version is not None
        plugin = type("Plugin", (), {"fsdp_version": version})
        self.accelerator.state._shared_state["fsdp_plugin"] = plugin if version else None


@pytest.mark.parametrize(
    "fake, saving, words",
    [
        (dict(deepspeed=True), "no", "DeepSpeed is not supported"),
        (dict(fsdp_version=1), "no", "fsdp_version: 2"),
    ],
)
def test_what_does_not_work_is_refused(fake, saving, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        Refusing(model(), arguments(tmp_path, save_strategy=saving), **fake)


def test_under_fsdp2_the_optimizer_is_made_again_after_wrapping(tmp_path):
    trainer = oplora.OPTrainer(model(), arguments(tmp_path))
    trainer.optimizer = AcceleratedOptimizer(trainer.create_optimizer())
    first = trainer.optimizer.optimizer
    trainer.is_fsdp_enabled = True
    trainer.create_scheduler(10)
    assert trainer.optimizer.optimizer is not first
    assert trainer.lr_scheduler.optimizer is trainer.optimizer
