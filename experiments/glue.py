"""GLUE (the paper's second text): an encoder with a fresh head learns one of six tasks."""

import time

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from oplora.harness.finetuning import device, fine_tuning, finish, first_batches, train, validate
from oplora.harness.methods import apply_method
from oplora.harness.runs import Run
from oplora.studies.glue.metrics import evaluate, scores
from oplora.studies.glue.tasks import encode


def complete(cfg: DictConfig) -> None:
    if cfg.method.adapter is None:  # full fine-tuning trains everything anyway, at one rate
        cfg.direct_lr = None
    else:
        OmegaConf.update(cfg, "method.adapter", cfg.trained_besides, force_add=True)


@fine_tuning("glue", AutoModelForSequenceClassification, complete)
def main(cfg: DictConfig, run: Run) -> None:
    tokenizer = instantiate(cfg.tokenizer)
    sides = instantiate(cfg.data, _convert_="all")
    encoded = {side: encode(rows, tokenizer, cfg.cutoff) for side, rows in sides.items()}
    collator = DataCollatorWithPadding(tokenizer)
    model = instantiate(cfg.model).to(device())
    held_out = dict(eval_dataset=encoded.get("validation"), data_collator=collator)
    if cfg.fine_tune:
        batches = first_batches(encoded["train"], collator, cfg.training)
        adapted, create_optimizer = apply_method(
            model, cfg.method, batches, direct_lr=cfg.direct_lr
        )
        metrics = train(
            adapted,
            create_optimizer,
            cfg.training,
            run,
            keep_best=cfg.keep_best,
            diagnostics=cfg.diagnostics,
            train_dataset=encoded["train"],
            **held_out,
        )
        if isinstance(adapted, PeftModel):
            adapted.merge_adapter()  # in place: what follows is `model` as it would be shipped
    else:
        metrics = validate(model, cfg.training, run, **held_out)
    start = time.perf_counter()
    if cfg.score_test:
        path, test = run.path / "predictions.jsonl", (sides["test"], encoded["test"])
        rows = evaluate(model, collator, *test, path, **cfg.evaluate)
        metrics |= scores(rows, instantiate(cfg.task.metrics))
    metrics["evaluate_seconds"] = round(time.perf_counter() - start, 1)
    finish(run, metrics)
    print(f"{run.path}: {cfg.task.name} {metrics.get('score', 'not scored')}")


if __name__ == "__main__":
    main()
