"""LLaVA on Stanford Cars (section 5.3, Table 4): name what a photo shows, through the projector."""

import time

from hydra.utils import instantiate
from omegaconf import DictConfig
from peft import PeftModel

from oplora.harness.finetuning import device, fine_tuning, finish, first_batches, train, validate
from oplora.harness.methods import apply_method
from oplora.harness.runs import Run
from oplora.studies.llava_cars.metrics import evaluate, guesses
from oplora.studies.llava_cars.model import Llava
from oplora.studies.llava_cars.naming import NamingCollator, Pictures


def complete(cfg: DictConfig) -> None:
    cfg.alpha = 2 * cfg.rank if cfg.alpha is None else cfg.alpha


@fine_tuning("llava_cars", Llava, complete)
def main(cfg: DictConfig, run: Run) -> None:
    processor = instantiate(cfg.image_processor)
    pictures = {
        side: Pictures(rows, processor)
        for side, rows in instantiate(cfg.data, _convert_="all").items()
    }
    labels = {side: each.labels for side, each in pictures.items()}
    classes = pictures["train"].classes
    tokenizer = instantiate(cfg.tokenizer)
    model = instantiate(cfg.model).to(device())
    collator = NamingCollator(
        tokenizer, cfg.prompt, cfg.image_token, model.config.image_seq_length, cfg.cutoff
    )
    pictures = model.cache_features(pictures, 1e9 * cfg.cache.limit_gb, cfg.cache.batch_size)
    metrics = guesses(labels["train"], labels["test"], classes)
    held_out = dict(eval_dataset=pictures.get("validation"), data_collator=collator)
    if cfg.fine_tune:
        batches = first_batches(pictures["train"], collator, cfg.training)
        model, create_optimizer = apply_method(model, cfg.method, batches, direct_lr=cfg.direct_lr)
        metrics |= train(
            model,
            create_optimizer,
            cfg.training,
            run,
            diagnostics=cfg.diagnostics,
            train_dataset=pictures["train"],
            **held_out,
        )
        model = model.merge_and_unload() if isinstance(model, PeftModel) else model
    else:
        metrics |= validate(model, cfg.training, run, **held_out)
    start = time.perf_counter()
    if cfg.score_test:
        predictions = run.path / "predictions.jsonl"
        metrics |= evaluate(
            model, tokenizer, collator, pictures["test"], classes, predictions, **cfg.evaluate
        )
    metrics["evaluate_seconds"] = round(time.perf_counter() - start, 1)
    finish(run, metrics)
    print(f"{run.path}: test accuracy {metrics.get('accuracy', 'not scored')}")


if __name__ == "__main__":
    main()
