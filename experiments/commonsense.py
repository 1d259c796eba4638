"""Commonsense reasoning (section 5.4, Table 2): fine-tune a language model, score eight tasks."""

import time

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from peft import PeftModel
from transformers import AutoModelForCausalLM

from oplora.harness.completion import completion_dataset
from oplora.harness.finetuning import fine_tuning, finish, first_batches, train, validate
from oplora.harness.methods import apply_method
from oplora.harness.runs import Run
from oplora.studies.commonsense.metrics import held_out_nll, summary


@fine_tuning("commonsense", AutoModelForCausalLM)
def main(cfg: DictConfig, run: Run) -> None:
    torch.set_float32_matmul_precision(cfg.matmul_precision)
    tokenizer = instantiate(cfg.tokenizer)
    sides = instantiate(cfg.data, _convert_="all")(tokenizer, seed=cfg.seed)
    encoded = {
        side: completion_dataset(sides[side], tokenizer, **cfg.encoding)
        for side in ("train", "validation")
    }
    collator = instantiate(cfg.collator)(tokenizer)
    model = instantiate(cfg.model)
    held_out = dict(eval_dataset=encoded["validation"], data_collator=collator)
    if cfg.fine_tune:
        batches = first_batches(encoded["train"], collator, cfg.training)
        model, create_optimizer = apply_method(model, cfg.method, batches, direct_lr=cfg.direct_lr)
        metrics = train(
            model,
            create_optimizer,
            cfg.training,
            run,
            keep_best=bool(cfg.keep_best),
            diagnostics=cfg.diagnostics,
            train_dataset=encoded["train"],
            **held_out,
        )
    else:
        metrics = validate(model, cfg.training, run, **held_out)
    torch.set_float32_matmul_precision("highest")  # the merged weights differ by little
    model = model.float()  # half-precision weights would round small updates away in the merge
    model = model.merge_and_unload() if isinstance(model, PeftModel) else model
    model = model.to(getattr(torch, cfg.score_dtype))
    start = time.perf_counter()
    metrics["validation_nll"] = held_out_nll(model, tokenizer, sides["validation"])
    if cfg.score_test:
        predictions = run.path / "predictions.jsonl"
        score = instantiate(cfg.evaluate)
        metrics |= summary(score(model, tokenizer, sides["test"], predictions))
    metrics["evaluate_seconds"] = round(time.perf_counter() - start, 1)
    finish(run, metrics)
    print(f"{run.path}: validation NLL {metrics['validation_nll']:.4f}")


if __name__ == "__main__":
    main()
