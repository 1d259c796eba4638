"""The scripts beside the VL-BART experiment: its base model and CLIP features."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from base_models.tiny_vl_bart import pretrain
from oplora.harness.assets import AssetError, ChecksumError, fetch
from oplora.studies.vl_bart import easy_vqa
from oplora.studies.vl_bart.grids import H5Grids
from oplora.studies.vl_bart.model import VLBart

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for n in range(5):
        Image.new("RGB", (60, 40), (51 * n, 0, 255)).save(folder / f"COCO_{n}.jpg", quality=100)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_features_are_upstreams_files_and_a_cut_run_goes_on(images, tmp_path):
    extract, out, seen = script("extract_clip_features").extract, tmp_path / "out", []

    def cells(pixels):
        seen.append(len(pixels))
        assert pixels.shape[1:] == (3, 224, 224) and 0 <= pixels.min() <= pixels.max() <= 1
        return pixels.mean((2, 3))[:, :1, None].expand(-1, 49, 8)

    assert extract(images, out, cells, batch_size=2) == 5 and seen == [2, 2, 1]
    grids = H5Grids(str(out), cells=36, feature_size=8)
    assert grids("COCO_2").shape == (36, 8)
    assert grids("COCO_2").unique().item() == pytest.approx(0.4, abs=0.01)  # red 102 of 255
    (out / "COCO_3.h5").unlink()
    assert extract(images, out, cells) == 1 and seen[3:] == [1]
    assert sorted(path.name for path in out.iterdir()) == [f"COCO_{n}.h5" for n in range(5)]


def test_damaged_images_and_empty_folders_are_named(images, tmp_path):
    module = script("extract_clip_features")
    (images / "COCO_3.jpg").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"COCO_3\.jpg is damaged"):
        module.extract(images, tmp_path / "out", lambda pixels: pixels, batch_size=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no image"):
        module.extract(tmp_path / "empty", tmp_path / "out", None)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        module.extract(tmp_path / "nowhere", tmp_path / "out", None)


class AnyGrids:
    def __contains__(self, image):
        return True

    def __call__(self, image):
        return torch.randn(9, 320, generator=torch.Generator().manual_seed(hash(image) % 1000))


@pytest.mark.assets
def test_a_base_model_is_trained_and_saved_at_once(tmp_path, monkeypatch, capsys):
    try:
        folder = fetch("easy-vqa")
    except ChecksumError:
        raise
    except AssetError as error:
        pytest.skip(str(error))
    out = tmp_path / "base"
    counts = {"vqa": 150, "gqa": 150, "nlvr": 150, "caption": 150}
    monkeypatch.setattr(pretrain, "ITEMS", counts)
    monkeypatch.setattr(pretrain, "HELD_OUT", 20)
    monkeypatch.setattr(easy_vqa, "grids", lambda size, cells: AnyGrids())
    arguments = ["--out", str(out), "--epochs", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["pretrain", *arguments])
    pretrain.main()
    facts = json.loads((out / "pretraining.json").read_text())
    assert facts == json.loads(capsys.readouterr().out[-len(json.dumps(facts, indent=1)) - 1 :])
    assert {"gqa neither (new)", "vqa color (seen)"} <= set(facts["scores"]["families"])
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    model, tokenizer = VLBart.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer) and model.config.feature_size == 320
    assert (out / "model.safetensors").stat().st_size < 10e6
    ids = [getattr(model.config, f"{name}_token_id") for name in ("bos", "pad", "eos")]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "<pad>", "</s>"]
    sides = easy_vqa.sides({"train": 100, "validation": 100, "test": 100}, folder)
    for each in (each for tasks in sides.values() for each in tasks.values()):
        for item in each:
            for text in (f"{item.task}: {item.text}", item.answers[0][0]):
                assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text
    with pytest.raises(SystemExit):  # it is never overwritten
        pretrain.main()
