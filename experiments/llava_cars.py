"""LLaVA on Stanford Cars (section 5.3, Table 4): name what a photo shows, through the projector."""

import time

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from transformers import set_seed

from oplora.data.naming import NamingCollator, Pictures
from oplora.entry import experiment
from oplora.finetuning import describe, finish, train
from oplora.methods import apply_method
from oplora.metrics.llava import evaluate, guesses
from oplora.models.llava import Llava
from oplora.runs import open_run


@experiment("llava_cars")
def main(cfg: DictConfig) -> None:
    cfg.alpha = 2 * cfg.rank if cfg.alpha is None else cfg.alpha
    if cfg.dry_run:
        print(describe(cfg, Llava))
        return
    torch.set_num_threads(cfg.runtime.threads)
    with open_run(OmegaConf.to_container(cfg, resolve=True)) as run:
        if run.finished:
            print(f"{run.path} is finished already")
            return
        set_seed(cfg.seed)
        processor = instantiate(cfg.image_processor)
        pictures = {
            side: Pictures(rows, processor)
            for side, rows in instantiate(cfg.data, _convert_="all").items()
        }
        labels = {side: each.labels for side, each in pictures.items()}
        classes = pictures["train"].classes
        tokenizer = instantiate(cfg.tokenizer)
        model = instantiate(cfg.model).to("cuda" if torch.cuda.is_available() else "cpu")
        collator = NamingCollator(
            tokenizer, cfg.prompt, cfg.image_token, model.config.image_seq_length, cfg.cutoff
        )
        pictures = model.cache_features(pictures, 1e9 * cfg.cache.limit_gb, cfg.cache.batch_size)
        metrics = guesses(labels["train"], labels["test"], classes)
        if cfg.fine_tune:
            model, create_optimizer = apply_method(model, cfg.method)
            metrics |= train(
                model,
                create_optimizer,
                cfg.training,
                run,
                train_dataset=pictures["train"],
                eval_dataset=pictures.get("validation"),
                data_collator=collator,
            )
            model = model.merge_and_unload() if isinstance(model, PeftModel) else model
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
