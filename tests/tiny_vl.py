"""A tiny BART with its tokenizer, and records in the files that VL-Adapter trains on."""

import json
from pathlib import Path

import h5py
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from oplora.studies.vl_bart.batches import VLItem
from oplora.studies.vl_bart.model import VLBart, VLBartConfig

SENTENCES = ["vqa: gqa: gpa: nlvr: caption: is the shape red? true false yes no a red circle."]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
CELLS, SIZE = 9, 6  # of a grid
TASKS = {
    "vqa": {"prefix": "vqa: ", "input_tokens": 20, "target_tokens": 10},
    "gqa": {"prefix": "gpa: ", "input_tokens": 20, "target_tokens": None},
    "nlvr": {"prefix": "nlvr: ", "input_tokens": None, "target_tokens": None},
    "caption": {"prefix": "caption: ", "input_tokens": 40, "target_tokens": 40},
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE as BART's, with BART's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, SPECIAL)))


SIZES = dict(
    vocab_size=330,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    max_position_embeddings=64,
)


def tiny_bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    return BartForConditionalGeneration(BartConfig(**SIZES, init_std=0.3)).eval()


def tiny_vl_bart(**options) -> VLBart:
    torch.manual_seed(0)
    config = VLBartConfig(**SIZES, init_std=0.3, feature_size=SIZE, cells=CELLS, **options)
    return VLBart(config).eval()


class TinyGrids:
    """Features by the image's name: "7" has those drawn with seed 7; anything else has none."""

    def __contains__(self, image):
        return image.isdigit()

    def __call__(self, image):
        if image not in self:
            raise FileNotFoundError(f"no features of {image!r}")
        return torch.randn(CELLS, SIZE, generator=torch.Generator().manual_seed(int(image)))


def items(counts: dict[str, int]) -> dict[str, list[VLItem]]:
    """So many items of every task."""
    made = {
        "vqa": lambda n: (("1",), (("red", 1.0), ("blue", 0.3)), ("red",) * 10),
        "gqa": lambda n: (("2",), (("yes", 1.0),), ()),
        "nlvr": lambda n: (("3", str(n)), ((("false", "true")[n % 2], 1.0),), ()),
        "caption": lambda n: ((str(n),), (("a red circle.", 1.0),), ("a red circle.", "red.")),
    }
    return {
        task: [VLItem(f"{task}/{n}", task, f"is shape {n} red?", *made[task](n)) for n in range(k)]
        for task, k in counts.items()
    }


def write_records(folder: Path, rows: int = 5, cells: int = 16) -> None:
    """VL-Adapter's `datasets` folder with a handful of records, and grids of 4×4 cells."""

    def write(path, content):
        path = folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))

    def image(group, name):
        path = folder / group / "clip_features/data_clip_RN101_att" / f"{name}.h5"
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            file[f"{name}/features"] = torch.randn(cells, SIZE).numpy()
        return name

    torch.manual_seed(0)
    coco = [image("COCO", f"COCO_val2014_{n:012d}") for n in range(rows)]
    annotations, captions = [], []
    for base, split in enumerate(("train", "val", "test")):
        records = []
        for n in range(rows):
            key = 1000 * base + n
            label = {"red": 1, "blue": 0.3} if n else {}
            records.append(
                {"question_id": key, "img_id": coco[n], "sent": "is it red?", "label": label}
            )
            answers = [{"answer": "red", "answer_id": k} for k in range(10)]
            annotations.append({"question_id": key, "answers": answers})
            sentences = [{"raw": f" a red circle {k}. "} for k in range(2)]
            captions.append({"filename": f"{coco[n]}.jpg", "split": split, "sentences": sentences})
        write(f"vqa/karpathy_{split}.json", records)
    captions[0]["split"] = "restval"
    write("vqa/v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    write("COCO/dataset_coco.json", {"images": captions})
    for split, group in (("train", "VG"), ("valid", "VG"), ("testdev", "GQA")):
        records = [
            {"question_id": f"{split}{n}", "img_id": image(group, f"{split}{n}"),
             "sent": "is it red?", "label": {"yes": 1.0}}
            for n in range(rows)
        ]  # fmt: skip
        write(f"GQA/{split}.json", records)
    for split in ("train", "valid", "test"):
        records = [
            {"identifier": f"{split}-{n}", "uid": f"nlvr2_{split}_{n}", "sent": "both are red.",
             "img0": image("nlvr", f"{split}{n}-img0"), "img1": image("nlvr", f"{split}{n}-img1"),
             "label": n % 2}
            for n in range(rows)
        ]  # fmt: skip
        write(f"nlvr/{split}.json", records)
