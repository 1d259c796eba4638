"""VL-BART (section 5.2, Table 3): train visual questions, statements and captions together."""

import time
from functools import partial
from inspect import signature

import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel

from oplora.harness.finetuning import fine_tuning, finish, first_batches, train, validate
from oplora.harness.methods import apply_method
from oplora.harness.runs import Run
from oplora.studies.vl_bart.batches import MultitaskBatches, VLCollator, check_images
from oplora.studies.vl_bart.metrics import EpochScores
from oplora.studies.vl_bart.model import VLBart


def complete(cfg: DictConfig) -> None:
    if cfg.method.adapter is None:  # full fine-tuning trains everything anyway, at one rate
        cfg.direct_lr = None
        return
    options = {key: value for key, value in cfg.trained_besides.items() if value is not None}
    known = signature(get_object(cfg.method.adapter._target_)).parameters
    if "bias" in options and not known.keys() & {"bias", "kwargs"}:
        raise ValueError(
            f"method={cfg.method.name} trains no biases beside its adapter: add "
            "trained_besides.bias=null"
        )
    OmegaConf.update(cfg, "method.adapter", options, force_add=True)


@fine_tuning("vl_bart", VLBart, complete)
def main(cfg: DictConfig, run: Run) -> None:
    if cfg.matmul_precision:
        torch.set_float32_matmul_precision(cfg.matmul_precision)
    tokenizer = instantiate(cfg.tokenizer)
    sides = instantiate(cfg.data, _convert_="all")
    grids = instantiate(cfg.grids)
    check_images((i for side in sides.values() for each in side.values() for i in each), grids)
    collator = VLCollator(tokenizer, grids, cfg.tasks)
    model = instantiate(cfg.model)
    evaluate = partial(instantiate(cfg.evaluate), model, tokenizer, collator.inputs)
    equal = dict.fromkeys(cfg.tasks, cfg.evaluate.batch_size)  # Trainer averages over batches
    held_out = dict(
        eval_dataset=MultitaskBatches(sides["validation"], equal, None), data_collator=collator
    )
    if cfg.fine_tune:
        rows = MultitaskBatches(sides["train"], cfg.batch_sizes, cfg.seed)
        batches = first_batches(rows, collator, cfg.training)
        adapted, create_optimizer = apply_method(
            model, cfg.method, batches, direct_lr=cfg.direct_lr
        )
        epochs = EpochScores(
            run.path, cfg.training.num_train_epochs, partial(evaluate, sides["validation"])
        )
        metrics = train(
            adapted,
            create_optimizer,
            cfg.training,
            run,
            diagnostics=cfg.diagnostics,
            train_dataset=rows,
            callbacks=[epochs],
            **held_out,
        )
        metrics["epochs"] = epochs.history()
        if isinstance(adapted, PeftModel):
            adapted.merge_adapter()  # in place: what follows is `model` as it would be shipped
    else:
        metrics = validate(model, cfg.training, run, **held_out)
    start = time.perf_counter()
    if cfg.score_test:
        metrics |= evaluate(sides["test"], run.path / "predictions.jsonl")
    metrics["evaluate_seconds"] = round(time.perf_counter() - start, 1)
    finish(run, metrics)
    print(f"{run.path}: validation loss {metrics['validation_loss'][-1][1]:.4f}")


if __name__ == "__main__":
    main()
