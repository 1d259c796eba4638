"""LLaVA on cached features is LLaVA on images; the projector alone trains, in float32."""

import json
import sys
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_emoji import emoji_packages
from tiny_language_model import tiny_llama
from tiny_llava import (
    SIDE,
    TOKENS,
    WIDTH,
    save_llava,
    tiny_config,
    tiny_llava,
    tokenizer_with_image,
)
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from base_models.tiny_llava import model as small
from base_models.tiny_llava import pretrain
from oplora.studies.llava_cars.model import Llava, load


class Picture(NamedTuple):
    id: str
    pixel_values: Tensor


def pictures(count):
    generator = torch.Generator().manual_seed(1)
    return [Picture(str(n), torch.randn(3, SIDE, SIDE, generator=generator)) for n in range(count)]


def inputs(model, rows):
    ids = [model.config.image_token_id] * TOKENS + [5, 6, 7]
    return {
        "input_ids": torch.tensor([ids] * len(rows)),
        "attention_mask": torch.ones(len(rows), len(ids), dtype=torch.long),
        "pixel_values": torch.stack([row.pixel_values for row in rows]),
    }


@pytest.mark.parametrize("layer", [-2, -1, [-2, -1]])
def test_cached_features_give_the_stock_models_logits_and_answers(tmp_path, layer):
    model = tiny_llava(vision_feature_layer=layer)
    stock = LlavaForConditionalGeneration(tiny_config(vision_feature_layer=layer)).eval()
    stock.load_state_dict(model.state_dict())
    rows = pictures(5)
    with torch.no_grad():
        expected = stock(**inputs(stock, rows)).logits
        assert model(**inputs(model, rows)).logits.equal(expected)
        said = stock.generate(**inputs(stock, rows), max_new_tokens=4, do_sample=False)
        cached = model.cache_features({"train": rows[:3], "test": rows[3:]}, 1e9, batch_size=2)
        assert not any("vision_tower" in name for name, _ in model.named_parameters())
        rows = cached["train"] + cached["test"]
        assert [row.id for row in rows] == list("01234")
        assert rows[0].pixel_values.shape == (TOKENS, WIDTH * (2 if layer == [-2, -1] else 1))
        assert torch.allclose(model(**inputs(model, rows)).logits, expected, atol=1e-5)
        again = model.generate(**inputs(model, rows), max_new_tokens=4, do_sample=False)
    assert again.equal(said)


def test_features_beyond_the_limit_are_not_cached():
    model, rows = tiny_llava(), pictures(3)
    needed = 3 * TOKENS * WIDTH * 4
    assert model.cache_features({"train": rows}, needed - 1, 2)["train"] is rows
    assert model.cache_features({"train": rows}, needed, 2)["train"] is not rows


def test_full_fine_tuning_trains_the_projector_and_saves_no_language_model(tmp_path):
    model = tiny_llava().requires_grad_(True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("multi_modal_projector" in name for name in trained)
    assert len(trained) == 4
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert any("vision_tower" in name for name in names)
    assert not any("language" in name or "lm_head" in name for name in names)


def test_bfloat16_keeps_the_projector_in_float32(tmp_path):
    save_llava(tmp_path)
    model = Llava.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.model.multi_modal_projector.parameters()} == {torch.float32}
    assert model.lm_head.weight.dtype == model.model.vision_tower.dtype == torch.bfloat16
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["linear_1", "linear_2"]))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 4 and {p.dtype for p in trained} == {torch.float32}
    rows = pictures(2)
    for cached in (False, True):
        if cached:
            rows = model.cache_features({"all": rows}, 1e9, 2)["all"]
        adapted(**inputs(model, rows)).logits.float().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        assert adapted.generate(**inputs(model, rows), max_new_tokens=2).shape[0] == 2


def test_all_weights_of_a_stock_checkpoint_are_found(tmp_path):
    save_llava(tmp_path)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    found = Llava.from_pretrained(tmp_path).state_dict()
    assert found.keys() == stock.keys()
    assert all(found[name].equal(weight) for name, weight in stock.items())


def test_adapter_is_loaded_by_the_stock_model(tmp_path):
    save_llava(tmp_path / "base")
    model = Llava.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["linear_1", "linear_2"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(tmp_path / "adapter")
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
    batch = inputs(model, pictures(2))
    with torch.no_grad():
        before = stock(**batch).logits
        loaded = PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()(**batch).logits
        assert torch.allclose(loaded, adapted.eval()(**batch).logits, atol=1e-5)
    assert not torch.allclose(loaded, before, atol=1e-2)


def test_tower_that_cannot_tell_views_apart_has_the_loss_of_a_guess(monkeypatch):
    torch.manual_seed(0)
    training = small.TowerTraining(size=6)
    monkeypatch.setattr(training, "pooled", lambda pixels: torch.ones(len(pixels), 192))
    pixels, teacher = torch.randn(3, 2, 3, small.SIDE, small.SIDE), torch.randn(3, 2, 6)
    loss = training(pixels, teacher)["loss"]
    imitation = torch.cosine_similarity(
        training.imitate(training.pooled(pixels.flatten(0, 1))), teacher.flatten(0, 1)
    ).mean()
    assert loss.item() == pytest.approx(torch.log(torch.tensor(3.0)).item() + 1 - imitation.item())


def test_spelling_costs_nothing_where_every_token_is_the_right_embedding():
    embeddings = torch.eye(4, 6) * 3
    spelling = small.Spelling(torch.nn.Identity(), embeddings, temperature=0.01)
    spelled = torch.tensor([[2, 0], [1, 1]])
    assert spelling(embeddings[spelled], spelled)["loss"].item() == pytest.approx(0, abs=1e-6)
    # another's embedding is 1 / 0.01 worse, half the length costs 0.1 / 4
    assert spelling(embeddings[spelled + 1], spelled)["loss"].item() == pytest.approx(100)
    assert spelling(embeddings[spelled] / 2, spelled)["loss"].item() == pytest.approx(0.025)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_saved_is_loaded_with_the_language_model_of_another_folder(tmp_path, dtype):
    tiny_llama(50).save_pretrained(tmp_path / "language")
    tower, language = small.TowerTraining(6).tower, str(tmp_path / "language")
    model = small.assemble(tower, language, dtype, 49).eval()
    model.save_pretrained(tmp_path / "base")
    loaded = load(str(tmp_path / "base"), language, dtype).eval()
    assert loaded.lm_head.weight.dtype == dtype
    assert model.model.multi_modal_projector.linear_1.weight.dtype == torch.float32
    pixels = torch.randn(2, 3, small.SIDE, small.SIDE)
    ids = torch.tensor([[49] * model.config.image_seq_length + [5, 6]] * 2)
    with torch.no_grad():
        mine, theirs = (m(input_ids=ids, pixel_values=pixels).logits for m in (model, loaded))
    assert mine.equal(theirs) and mine.shape == (2, 11, 50)
    names = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert len(names) == 4 and all("projector" in name for name in names)


def test_a_missing_base_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"base_models/tiny_llava/pretrain\.py"):
        load(str(tmp_path), "nowhere", torch.float32)


def test_pretraining_writes_a_base_that_loads_and_leaves_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("OPLORA_CACHE", str(tmp_path / "cache"))
    emoji_packages(tmp_path / "cache")
    tokenizer, language = tokenizer_with_image(), tmp_path / "language"
    tokenizer.save_pretrained(language)
    tiny_llama(len(tokenizer)).save_pretrained(language)
    monkeypatch.setattr(pretrain, "EfficientNetLite0", lambda folder: None)  # the teacher
    monkeypatch.setattr(pretrain, "fetch", lambda name: None)
    monkeypatch.setattr(pretrain, "features", lambda images, _: torch.rand(len(images), 6))
    out = tmp_path / "out" / "tiny_llava"
    command = [
        "pretrain.py", f"--out={out}", "--tower-steps=2", "--spelling-steps=2",
        "--projector-steps=2",
        "data.classes=4", "image_token='<image>'", "~folder",
        f"+folder={{_target_: os.path.join, _args_: ['{language}']}}",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    pretrain.main()
    assert [path.name for path in out.parent.iterdir()] == ["tiny_llava"]
    assert str(tmp_path) not in (out / "config.json").read_text()
    facts = json.loads((out / "pretraining.json").read_text())
    assert facts["tower"]["steps"] == facts["projector"]["steps"]["spelling"] == 2
    assert set(facts["nearest_is_same_emoji"]) == {"google2017", "fluent"}
    model = load(str(out), str(language), torch.bfloat16)
    assert model.config.image_seq_length == 9
    assert model.model.vision_tower.dtype == torch.float32  # half on disk
    with pytest.raises(SystemExit):  # nothing is overwritten
        pretrain.main()
