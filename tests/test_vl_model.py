"""VL-BART: the joint encoder against stock BART, the loss, and what every method trains."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from peft import PeftModel
from tiny_vl import CELLS, SIZE, TASKS, TinyGrids, items, tiny_bart, tiny_tokenizer, tiny_vl_bart

import oplora
from oplora.harness.methods import apply_method
from oplora.studies.vl_bart.batches import MultitaskBatches, VLCollator
from oplora.studies.vl_bart.model import VLBart, base_folder, item_loss

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@pytest.fixture
def model():
    return tiny_vl_bart()


@pytest.fixture(scope="module")
def batch():
    data = MultitaskBatches(items({"nlvr": 4}), {"nlvr": 4}, None)
    return VLCollator(tiny_tokenizer(), TinyGrids(), TASKS)([data[0]])


@pytest.fixture(scope="module")
def tokens():
    ids = torch.randint(5, 300, (3, 7), generator=torch.manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 4:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


def test_without_images_it_is_stock_bart(model, tokens):
    stock = tiny_bart()
    stock.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "visual_embedding" not in k}
    )
    decoder_input_ids = torch.tensor([[2, 0, 9]] * 3)
    expected = stock(**tokens, decoder_input_ids=decoder_input_ids).logits
    torch.testing.assert_close(
        model(**tokens, decoder_input_ids=decoder_input_ids).logits, expected
    )
    generated = [
        m.generate(**given, num_beams=3, max_length=8, do_sample=False)
        for m, given in ((stock, tokens), (model, model.encode(**tokens)))
    ]
    assert torch.equal(*generated)


def test_images_follow_the_text_with_their_own_embedding(model, tokens):
    grids = torch.randn(3, 2, CELLS, SIZE)
    states = []
    model.model.encoder.layers[0].register_forward_pre_hook(lambda m, inputs: states.append(inputs))
    encoded = model.encode(**tokens, grids=grids)
    hidden = states[0][0]
    assert hidden.shape == (3, 7 + 2 * CELLS, 16) == encoded["encoder_outputs"][0].shape
    assert encoded["attention_mask"].sum(1).tolist() == [
        7 + 2 * CELLS,
        4 + 2 * CELLS,
        7 + 2 * CELLS,
    ]
    visual = model.visual_embedding
    for image in range(2):
        for cell in range(CELLS):
            expected = visual.norm(visual.feature(grids[1, image, cell]))
            expected = expected + visual.position.weight[cell] + visual.image.weight[image]
            torch.testing.assert_close(hidden[1, 7 + image * CELLS + cell], expected)


def test_padding_changes_nothing(model, tokens):
    grids = torch.randn(3, 1, CELLS, SIZE)
    decoder_input_ids = torch.tensor([[2, 0, 9]] * 3)
    whole = model(**tokens, grids=grids, decoder_input_ids=decoder_input_ids).logits[1]
    alone = model(
        input_ids=tokens["input_ids"][1:2, :4],
        attention_mask=tokens["attention_mask"][1:2, :4],
        grids=grids[1:2],
        decoder_input_ids=decoder_input_ids[1:2],
    ).logits[0]
    torch.testing.assert_close(whole, alone)


@pytest.mark.parametrize("shape", [(3, 3, CELLS, SIZE), (3, 1, CELLS + 1, SIZE)])
def test_wrong_grids_are_refused(model, tokens, shape):
    with pytest.raises(ValueError, match=rf"{shape[1]} images of {shape[2]} cells.*2 of 9"):
        model.encode(**tokens, grids=torch.zeros(shape))


def test_loss_is_the_mean_of_items_weighted_by_score():
    logits = torch.randn(3, 4, 10, generator=torch.manual_seed(0))
    labels = torch.tensor([[1, 2, -100, -100], [3, 4, 5, 6], [7, -100, -100, -100]])
    scores = torch.tensor([1.0, 0.3, 0.0])
    total = 0.0
    for row, (targets, score) in enumerate(zip(labels, scores)):
        kept = [k for k in range(4) if targets[k] >= 0]
        losses = [-logits[row, k].log_softmax(-1)[targets[k]] for k in kept]
        total += score * sum(losses) / len(losses)
    torch.testing.assert_close(item_loss(logits, labels, scores), total / 3)
    empty = torch.full((1, 2), -100)
    assert item_loss(logits[:1, :2], empty) == 0  # an answer without tokens is no NaN


def test_saved_and_loaded(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    assert torch.equal(VLBart.from_pretrained(tmp_path)(**batch).logits, model(**batch).logits)
    tiny_bart().save_pretrained(tmp_path / "stock")
    fresh = VLBart.from_pretrained(tmp_path / "stock", feature_size=SIZE, cells=CELLS)
    assert torch.equal(fresh.model.shared.weight, tiny_bart().model.shared.weight)
    assert fresh(**batch).loss.isfinite()
    assert base_folder(str(tmp_path)) == str(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere.*base_models/tiny_vl_bart"):
        base_folder("nowhere")


def adapted(model, method, **besides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        options = ["preset=small", f"method={method}", "rank=2", "alpha=2", "mlp_width=4"]
        cfg = compose("vl_bart", options)
    if cfg.method.adapter is not None:
        OmegaConf.update(cfg, "method.adapter", besides or cfg.trained_besides, force_add=True)
    return apply_method(model, cfg.method)


@pytest.mark.parametrize("method", ["lora", "dora", "oplora", "opdora", "lora_matched", "full"])
def test_adapter_visual_embedding_and_biases_are_trained(model, batch, method):
    peft, create_optimizer = adapted(model, method)
    optimizer = create_optimizer(peft)
    trained = {n: p for n, p in peft.named_parameters() if p.requires_grad}
    if method != "full":
        besides = {n for n in trained if "lora_" not in n}
        biases = {n for n, _ in peft.named_parameters() if "bias" in n and "original" not in n}
        visual = {n for n in trained if "visual_embedding.modules_to_save" in n}
        assert len(visual) == 6 and besides == biases | visual
        assert len(trained) - len(besides) == (3 if "dora" in method else 2) * 3 * 2  # q, k
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert set(groups) == {id(p) for p in trained.values()}
    for name, parameter in trained.items():
        group = groups[id(parameter)]
        if "bias" in name or "norm" in name:
            assert group["weight_decay"] == 0, name
        elif "lora_" not in name:
            assert group["weight_decay"] == 0.01, name
        if isinstance(optimizer, oplora.OPOptimizer):
            assert (group["mlp_width"] > 0) == ("lora_" in name), name
    before = {name: parameter.clone() for name, parameter in trained.items()}
    peft.train()
    for _ in range(2):
        peft(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    still = [name for name, parameter in trained.items() if torch.equal(parameter, before[name])]
    # Gradients of key biases vanish: softmax does not see what all keys share.
    assert all("k_proj" in name and "bias" in name for name in still), still


def test_the_saved_adapter_holds_all_that_was_trained(model, batch, tmp_path):
    base = tiny_vl_bart()
    peft, create_optimizer = adapted(model, "opdora")
    optimizer = create_optimizer(peft)
    for _ in range(3):
        peft(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = peft(**batch).logits
    assert not torch.allclose(expected, base(**batch).logits, atol=1e-3)
    peft.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, expected)
    assert peft.merge_and_unload() is model  # in place
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-4, rtol=1e-4)


def test_what_is_trained_besides_is_a_switch(model):
    peft, _ = adapted(model, "lora", modules_to_save=["visual_embedding"])
    trained = {n for n, p in peft.named_parameters() if p.requires_grad and "lora_" not in n}
    assert trained and all("visual_embedding" in name for name in trained)
