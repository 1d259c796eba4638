"""Train the small preset's LLaVA: a tiny vision tower, then its projector to SmolLM2.

python base_models/tiny_llava/pretrain.py          → results/base_models/tiny_llava
The tower learns from emoji of two vendors to tell them apart in any guise and to imitate an
ImageNet network; the projector then learns to write their names in the language model's input
embeddings, and after that through the frozen language model, but of the classes of
configs/llava_cars/small.yaml only the kind (oplora/studies/llava_cars/emoji_names.py). Options of
that file can be overridden (data.classes=50). Cut off, it goes on from its last checkpoint.
"""

import argparse
import json
import random
import shutil
import sys
from functools import cache
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import (
    CLIPVisionModel,
    LlavaImageProcessorPil,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from oplora.harness.assets import fetch
from oplora.harness.checkpoints import whole_checkpoint
from oplora.studies.llava_cars.emoji_names import (
    TEST,
    TRAINED,
    VALIDATION,
    augmented,
    base_captions,
    class_names,
    drawings_of,
)
from oplora.studies.llava_cars.model import Llava
from oplora.studies.llava_cars.naming import NamingCollator, Picture
from oplora.studies.sdxl.images import EfficientNetLite0, features

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # base_models is not installed
from base_models.tiny_llava.model import SIDE, Spelling, TowerTraining, assemble

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "results" / "base_models" / "tiny_llava"
COPIES = 8  # of every drawing that the projector learns from; all but one are augmented
Drawing = tuple[str, str, Image.Image, str]  # style, id, image, caption


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--tower-steps", type=int, default=1500)
    parser.add_argument("--spelling-steps", type=int, default=4000)
    parser.add_argument("--projector-steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("overrides", nargs="*", help="of configs/llava_cars/small.yaml")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists: delete it first")
    torch.set_num_threads(arguments.threads)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("llava_cars", ["preset=small", *arguments.overrides])
    drawings = list(base_captions(cfg.data.classes))
    work = arguments.out.with_name(f".{arguments.out.name}.partial")
    tower = train_tower(drawings, work / "tower", arguments.tower_steps)
    steps = {"spelling": arguments.spelling_steps, "projector": arguments.projector_steps}
    model = train_projector(cfg, tower.tower, drawings, work, steps)
    facts = {
        "tower": {"steps": arguments.tower_steps, "parameters": parameters(tower.tower)},
        "projector": {
            "steps": steps,
            "parameters": parameters(model.model.multi_modal_projector),
        },
        "nearest_is_same_emoji": found_across_vendors(tower, cfg),
    }
    save(model, facts, work, arguments.out)
    print(json.dumps(facts, indent=1))


class Views(Dataset):
    """Rows of two augmented views of an emoji, each of any drawing of it, with teacher features.

    Rows are drawn from their number alone, and no batch holds an emoji twice, unless it reaches
    into the next round over all emoji.
    """

    def __init__(self, drawings: list[Drawing], teacher: Tensor, rows: int):
        self.by_id: dict[str, list[int]] = {}
        for position, (_, id, _, _) in enumerate(drawings):
            self.by_id.setdefault(id, []).append(position)
        self.drawings, self.teacher, self.rows = drawings, teacher, rows
        self.process = image_processor()
        self.order = cache(self._order)

    def __len__(self) -> int:
        return self.rows

    def _order(self, turn: int) -> list[str]:
        return random.Random(turn).sample(list(self.by_id), len(self.by_id))

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        turn, place = divmod(row, len(self.by_id))
        id = self.order(turn)[place]
        chance = random.Random(f"views {row}")
        chosen = [chance.choice(self.by_id[id]) for _ in range(2)]
        views = [augmented(self.drawings[n][2], chance) for n in chosen]
        pixels = self.process(views, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "teacher": self.teacher[chosen]}


def train_tower(drawings: list[Drawing], folder: Path, steps: int) -> TowerTraining:
    """The trained tower with its heads."""
    set_seed(0)
    encoder = EfficientNetLite0(fetch("efficientnet-lite0"))
    teacher = F.normalize(features([image for _, _, image, _ in drawings], encoder), dim=1)
    training = TowerTraining(teacher.shape[1])
    fit(
        training,
        Views(drawings, teacher, 64 * steps),
        folder,
        steps,
        train_sampling_strategy="sequential",  # the data set draws the order itself
        per_device_train_batch_size=64,
        learning_rate=1e-3,
        weight_decay=0.05,
    )
    return training.eval()


def train_projector(
    cfg: DictConfig,
    tower: CLIPVisionModel,
    drawings: list[Drawing],
    work: Path,
    steps: dict[str, int],
) -> Llava:
    """LLaVA with a projector that says what the drawings show."""
    set_seed(0)
    tokenizer, dtype = instantiate(cfg.tokenizer), instantiate(cfg.model.dtype)
    token = tokenizer.convert_tokens_to_ids(cfg.image_token)
    model = assemble(tower, instantiate(cfg.folder), dtype, token)
    projector = model.model.multi_modal_projector
    pictures = model.cache_features({"all": captioned(drawings)}, float("inf"), 64)["all"]
    rows = Spelled(pictures, tokenizer)
    embeddings = model.get_input_embeddings().weight.detach()[rows.tokens].float()
    fit(
        Spelling(projector, embeddings),
        rows,
        work / "spelling",
        steps["spelling"],
        per_device_train_batch_size=128,
        learning_rate=2e-3,
        logging_steps=100,
        save_steps=1000,
    )
    collator = NamingCollator(
        tokenizer, cfg.prompt, cfg.image_token, model.config.image_seq_length, cfg.cutoff
    )
    fit(
        model,
        pictures,
        work / "projector",
        steps["projector"],
        collator,
        per_device_train_batch_size=8,
        learning_rate=5e-4,
    )
    whole = assemble(tower, instantiate(cfg.folder), dtype, token)  # the other has lost its tower
    whole.model.multi_modal_projector.load_state_dict(projector.state_dict())
    return whole


class Spelled(Dataset):
    """Features of pictures with a caption's token for each of the image tokens.

    A line break stands where the caption has ended. `tokens` are all that occur, `spelled` counts
    in them.
    """

    def __init__(self, pictures: list[Picture], tokenizer: PreTrainedTokenizerBase):
        self.pictures, count = pictures, len(pictures[0].pixel_values)
        (filler,) = tokenizer.encode("\n")
        captions = {picture.label for picture in pictures}
        ids = {c: (tokenizer.encode(f" {c}") + [filler] * count)[:count] for c in captions}
        self.tokens = sorted({token for row in ids.values() for token in row})
        number = {token: n for n, token in enumerate(self.tokens)}
        self.spelled = {c: torch.tensor([number[t] for t in row]) for c, row in ids.items()}

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        picture = self.pictures[row]
        return {"features": picture.pixel_values, "spelled": self.spelled[picture.label]}


def captioned(drawings: list[Drawing]) -> list[Picture]:
    """The drawings as they are and augmented, with their captions."""
    chance, process = random.Random(0), image_processor()
    pictures = []
    for copy in range(COPIES):
        for style, id, image, caption in drawings:
            shown = augmented(image, chance) if copy else image
            pixels = process(shown, return_tensors="pt")["pixel_values"][0]
            pictures.append(Picture(f"{style}/{id}", caption, pixels))
    return pictures


def image_processor() -> LlavaImageProcessorPil:
    side = {"height": SIDE, "width": SIDE}
    return LlavaImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side)


def fit(
    model: nn.Module,
    rows: Dataset | list[Picture],
    folder: Path,
    steps: int,
    collator: NamingCollator | None = None,
    **options,
) -> None:
    """Train the model, from the last whole checkpoint in `folder` if there is one."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        remove_unused_columns=False,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        save_total_limit=1,
        use_cpu=True,
        report_to="none",
        **{"save_steps": 100, "logging_steps": 20, **options},
    )
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
    trainer.train(resume_from_checkpoint=whole_checkpoint(folder))


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def found_across_vendors(tower: TowerTraining, cfg: DictConfig) -> dict[str, float]:
    """Share of the classes' drawings in a style whose nearest trained drawing is of their class."""
    names = class_names(cfg.data.classes)
    process = image_processor()

    def pooled(style: str) -> tuple[list[str], Tensor]:
        ids, images = zip(*drawings_of(style, names), strict=True)
        pixels = process(list(images), return_tensors="pt")["pixel_values"]
        return list(ids), F.normalize(tower.pooled(pixels), dim=1)

    known = [pooled(style) for style in TRAINED]
    gallery = torch.cat([rows for _, rows in known])
    owners = [id for ids, _ in known for id in ids]
    shares = {}
    for style in (VALIDATION, TEST):
        ids, rows = pooled(style)
        nearest = (rows @ gallery.T).argmax(1).tolist()
        hits = [owners[n] == id for n, id in zip(nearest, ids, strict=True)]
        shares[style] = sum(hits) / len(hits)
    return shares


def save(model: Llava, facts: dict, work: Path, out: Path) -> None:
    """Everything in one folder that appears at once; the weights in half precision."""
    for part in ("tower", "spelling", "projector"):
        shutil.rmtree(work / part, ignore_errors=True)
    model.half().save_pretrained(work)
    image_processor().save_pretrained(work)
    (work / "pretraining.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    work.rename(out)


if __name__ == "__main__":
    main()
