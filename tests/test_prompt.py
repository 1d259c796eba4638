"""Prompts: packed rows, Residual Prompt Tuning and OP against definitions, use by stock PEFT."""

import pytest
import torch
from safetensors.torch import save_file
from test_export import PEFT_USER, in_another_process
from test_methods import PROMPTS, method
from test_relatives import CUT, FAMILY, SAVED, fit
from tiny_models import FAMILIES, decoder, train
from torch import nn

import oplora
from oplora.baselines.prompt import add_prompt, create_residual_prompt_optimizer, prompt_config
from oplora.generators import create_generator_optimizer
from oplora.harness.completion import PackingCollator
from oplora.harness.methods import apply_method
from oplora.mlp import AdapterMLP, generator_for


def prompted(tokens=3):
    torch.manual_seed(0)
    return add_prompt(decoder(), prompt_config(tokens)).eval()


def weight(model):
    return model.prompt_encoder["default"].embedding.weight


def test_a_packed_row_is_each_text_alone():
    """Loss and the prompt's gradient are those of PEFT on one text after another."""
    model, lengths = prompted(), [4, 7, 2]
    ids = torch.randint(64, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    texts = [text.tolist() for text in ids.split(lengths)]
    rows = [{"input_ids": text, "labels": [-100, *text[1:]]} for text in texts]
    model(**PackingCollator()(rows)).loss.backward()
    packed, model.prompt_encoder.default.embedding.weight.grad = weight(model).grad, None
    for text in texts:
        one = torch.tensor([text])
        labels = one.clone()
        labels[0, 0] = -100
        share = (len(text) - 1) / (sum(lengths) - len(lengths))
        (share * model(input_ids=one, labels=labels).loss).backward()
    torch.testing.assert_close(packed, weight(model).grad, rtol=1e-4, atol=1e-7)
    assert packed.abs().max() > 1e-4


def test_a_mask_says_who_sees_whom():
    """Two continuations of one text in one row: each as if it stood alone behind it."""
    model = prompted()
    root, a, b = [5, 6, 7], [8, 9], [10, 11]
    see = torch.ones(7, 7).tril().bool()
    see[5:, 3:5] = False
    mask = torch.zeros(1, 1, 7, 7).masked_fill(~see, torch.finfo(torch.float32).min)
    positions = torch.tensor([[0, 1, 2, 3, 4, 3, 4]])
    with torch.no_grad():
        both = model(
            input_ids=torch.tensor([root + a + b]), position_ids=positions, attention_mask=mask
        ).logits
        alone = [model(input_ids=torch.tensor([root + each])).logits[:, 3:] for each in (a, b)]
    torch.testing.assert_close(both[:, :5], alone[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(both[:, 5:], alone[1][:, 3:], rtol=0, atol=1e-5)


def lockstep(create, twin, steps=8, **adam):
    """Train a prompt in the optimizer, and by twin(P) -> (prompt, parameters) in the graph.

    On a loss of the prompt alone: a Llama computes its norms in float32.
    """
    model = prompted().double()
    first = weight(model).detach().clone()
    values, parameters = twin(first.clone())
    optimizer, theirs = create(model), torch.optim.AdamW(parameters, **adam)
    mix, target = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(2)).double()
    loss = lambda prompt: (torch.tanh(prompt @ mix.T) @ mix - target).square().mean()  # noqa: E731
    for _ in range(steps):
        torch.testing.assert_close(weight(model), values(), rtol=0, atol=1e-12)
        optimizer.zero_grad()
        loss(model.get_prompt(1)[0]).backward()
        optimizer.step()
        theirs.zero_grad()
        loss(values()).backward()
        theirs.step()
    assert (weight(model) - first).abs().max() > 1e-2


def test_residual_prompt_tuning_is_a_shared_mlp_with_a_skip_connection():
    adam = dict(lr=1e-2, weight_decay=0.1)

    def twin(P):
        torch.manual_seed(3)
        first, second = nn.Linear(32, 8), nn.Linear(8, 32)
        P, norm = nn.Parameter(P), nn.LayerNorm(32)
        parts = [part.double() for part in (first, second, norm)]

        def values():
            return P + torch.stack([norm(second(torch.relu(first(token)))) for token in P])

        return values, [P, *(p for part in parts for p in part.parameters())]

    def create(model):
        return create_residual_prompt_optimizer(
            model, torch.optim.AdamW, bottleneck=8, seed=3, **adam
        )

    lockstep(create, twin, **adam)


def test_op_predicts_a_prompt():
    adam = dict(lr=1e-3, weight_decay=0.1)

    def twin(P):
        name = "base_model.prompt_encoder.default.embedding.weight"
        mlp = AdapterMLP([P], 5, ["keep"], generator=generator_for(0, name.partition(".")[2]))
        return lambda: mlp()[0], list(mlp.parameters())

    lockstep(lambda model: create_generator_optimizer(model, mlp_width=5, **adam), twin, **adam)
    model = prompted()
    optimizer = oplora.create_oplora_optimizer(model, lr=1e-2, mlp_width=8)
    assert optimizer.adapter_parameters == weight(model).numel() == 3 * 32
    before = weight(model).detach().clone()
    losses = train(model, optimizer, 8)
    assert losses[-1] < losses[0] and not torch.equal(weight(model), before)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    root = tmp_path_factory.mktemp("prompts")
    FAMILY.build().save_pretrained(root)
    save_file(FAMILY.batch, root / "batch.safetensors")
    return root, {name: fit(name, root / name) for name in PROMPTS}


def test_it_learns_and_is_a_prompt_of_stock_peft(fitted):
    root, runs = fitted
    paths = {name: root / name / "adapter" for name in PROMPTS}
    outputs = in_another_process(PEFT_USER, root, list(paths.values()))
    for name, (expected, metrics) in runs.items():
        losses = [loss for _, loss in metrics["train_loss"]]
        assert losses[-1] < losses[0], name
        assert metrics["adapter_parameters"] == 10 * 32
        assert (metrics["mlp_parameters"] > 0) is (name != "prompt")
        assert (outputs[str(paths[name])] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("name", PROMPTS)
def test_a_cut_run_ends_as_an_undisturbed_one(name, fitted, tmp_path):
    assert SAVED < CUT
    with pytest.raises(KeyboardInterrupt):
        fit(name, tmp_path, cut=True)
    again, resumed = fit(name, tmp_path)
    assert resumed["resumed"] == f"checkpoint-{SAVED}"
    assert torch.equal(again, fitted[1][name][0])


@pytest.mark.parametrize("family", ["encoder-decoder", "unet"])
def test_other_models_are_refused(family):
    with pytest.raises(ValueError, match="a prompt is for language models"):
        apply_method(FAMILIES[family].build(), method("prompt", FAMILIES[family]))


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match="trains no bias"):
        prompt_config(3, bias="all")
    with pytest.raises(ValueError, match="2 rows with position_ids"):
        prompted()(input_ids=torch.ones(2, 3).long(), position_ids=torch.arange(3).expand(2, 3))
    with pytest.raises(ValueError, match="one prompt and nothing else"):
        create_residual_prompt_optimizer(FAMILY.build(), torch.optim.AdamW, lr=0.1)
    model = prompted()
    weight(model).requires_grad_(False)
    with pytest.raises(ValueError, match="only prompt tuning has a tensor"):
        oplora.create_oplora_optimizer(model, lr=0.1)
