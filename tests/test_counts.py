"""Parameter counts: the paper's from models without memory, and the optimizer's own."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import oplora
from oplora.peft import create_oplora_lite_optimizer


def llama_7b():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
        )
    )


def llava_7b():
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=llama_7b().config)
    )


def bart_base():
    sides = ("encoder", "decoder")
    sizes = {f"{s}_{k}": v for s in sides for k, v in dict(layers=6, ffn_dim=3072).items()}
    heads = {f"{s}_attention_heads": 12 for s in sides}
    return BartForConditionalGeneration(BartConfig(vocab_size=50265, d_model=768, **sizes, **heads))


def sdxl_unet():
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
COMMONSENSE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
PROJECTOR = r".*multi_modal_projector\.linear_[12]"


@pytest.mark.parametrize(
    "build, rank, targets, width, millions, op_millions",
    [
        (llama_7b, 32, COMMONSENSE, 32, 56.10, 1795),
        (sdxl_unet, 4, ATTENTION, 32, 5.806, 186),
        (bart_base, 128, ["q_proj", "v_proj"], 32, 7.08, 226),
        (bart_base, 128, ["q_proj", "v_proj"], 4, 7.08, 28),
        (llava_7b, 16, PROJECTOR, 768, 0.213, 164),
        (llava_7b, 64, PROJECTOR, 768, 0.852, 654),
    ],
)
def test_counts_of_the_paper(build, rank, targets, width, millions, op_millions):
    with torch.device("meta"):
        model = build()
    model = get_peft_model(model, LoraConfig(r=rank, target_modules=targets))
    plain = oplora.parameter_report(model)
    op = oplora.parameter_report(model, width)
    digits = 3 if millions < 7 else 2
    assert round(plain["adapter_parameters"] / 1e6, digits) == millions
    assert plain["adapter_parameters"] == op["adapter_parameters"]
    assert round(op["mlp_output_parameters"] / 1e6) == op_millions
    assert plain["mlp_parameters"] == plain["other_trained_parameters"] == 0
    assert plain["optimizer_state_bytes"] == 8 * plain["adapter_parameters"]


@pytest.mark.parametrize("shared_trunk", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("cls, moments", [(torch.optim.AdamW, 2), (torch.optim.SGD, 0)])
def test_the_report_agrees_with_the_optimizer(shared_trunk, weight_decay, cls, moments):
    family = FAMILIES["decoder"]
    config = LoraConfig(
        r=4, target_modules=family.targets, use_dora=True, modules_to_save=["lm_head"]
    )
    model = get_peft_model(family.build(), config)
    options = dict(mlp_width=32, shared_trunk=shared_trunk)
    report = oplora.parameter_report(model, moments=moments, optimizer_cls=cls, **options)
    adam = dict(lr=1e-3, weight_decay=weight_decay)
    optimizer = oplora.create_oplora_optimizer(model, cls, **adam, **options)
    family.loss(model).backward()
    optimizer.step()
    assert report["adapter_parameters"] == optimizer.adapter_parameters
    assert report["mlp_parameters"] == optimizer.mlp_parameters
    direct = [p for g in optimizer.param_groups if not g["mlp_width"] for p in g["params"]]
    assert report["other_trained_parameters"] == sum(p.numel() for p in direct) == 64 * 32
    trained, _ = model.get_nb_trainable_parameters()
    assert report["adapter_parameters"] + report["other_trained_parameters"] == trained
    assert report["optimizer_state_bytes"] == pytest.approx(optimizer.state_bytes(), rel=0.1)


def test_the_report_of_the_lite_form():
    family = FAMILIES["decoder"]
    model = get_peft_model(family.build(), LoraConfig(r=4, target_modules=family.targets))
    report = oplora.parameter_report(model, mlp_width=32, lite=True)
    optimizer = create_oplora_lite_optimizer(model, lr=1e-3, mlp_width=32)
    family.loss(model).backward()
    optimizer.step()
    assert report["mlp_parameters"] == optimizer.mlp_parameters
    assert report["optimizer_state_bytes"] == pytest.approx(optimizer.state_bytes(), rel=0.1)


def test_full_fine_tuning_has_no_adapter():
    model = FAMILIES["decoder"].build()
    report, count = oplora.parameter_report(model), sum(p.numel() for p in model.parameters())
    assert report["adapter_parameters"] == report["mlp_parameters"] == 0
    assert report["other_trained_parameters"] == count
    assert report["optimizer_state_bytes"] == 8 * count
