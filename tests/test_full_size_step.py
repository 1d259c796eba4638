"""The full-size step: SDXL's own sizes without memory, and whole runs with a tiny U-Net."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

import oplora

SCRIPT = Path(__file__).parent.parent / "scripts" / "full_size_step.py"
TINY = {
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 24,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("full_size_step", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_config_is_that_of_sdxl(script):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(script.sdxl_unet())
        assert unet.num_parameters() == 2_567_463_684
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=4, target_modules=script.ATTENTION))
    report = oplora.parameter_report(unet, 32)
    assert report["adapter_parameters"] == 5_806_080
    assert report["mlp_output_parameters"] == 32 * 5_806_080


@pytest.mark.parametrize("checkpointing", [[], ["--gradient-checkpointing"]])
def test_a_tiny_unet_runs_through(script, tmp_path, capsys, checkpointing):
    config, out = tmp_path / "config.json", tmp_path / "new" / "step.json"
    config.write_text(json.dumps(TINY))
    options = ["--unet", str(config), "--out", str(out), "--resolution", "64", "--steps", "10"]
    assert script.main([*options, *checkpointing]) == 0
    result = json.loads(out.read_text())
    shown = json.loads(capsys.readouterr().out)
    assert shown == {key: value for key, value in result.items() if key != "environment"}
    unet = UNet2DConditionModel.from_config(TINY)
    linears = [
        module
        for name, module in unet.named_modules()
        if any(name.endswith("." + target) for target in script.ATTENTION)
    ]
    rank_4 = 4 * sum(linear.in_features + linear.out_features for linear in linears)
    assert result["adapter_parameters"] == rank_4 > 0
    assert result["mlp_output_parameters"] == 32 * rank_4
    assert result["unet_parameters"] == unet.num_parameters()
    assert result["gradient_checkpointing"] is bool(checkpointing)
    for phase in ("forward", "backward", "optimizer_step"):
        assert len(result[f"{phase}_seconds"]) == 10 and min(result[f"{phase}_seconds"]) >= 0
    assert min(result["losses"][5:]) < result["losses"][0], "the steps train"
    assert result["peak_memory_bytes"] > 2 * result["unet_parameters"]


def test_weights_are_made_in_bfloat16_and_finite(script):
    unet = script.random_unet(TINY, "cpu")
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}
    assert all(p.isfinite().all() for p in unet.parameters())
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    assert attention.to_k.weight.float().std().item() == pytest.approx(24**-0.5, rel=0.1)
    assert attention.to_out[0].bias.eq(0).all() and unet.conv_norm_out.weight.eq(1).all()


@pytest.mark.parametrize("wrong", [["--resolution", "100"], ["--steps", "0"]])
def test_wrong_options_end_with_a_message(script, wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.main(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_help(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    assert "--gradient-checkpointing" in capsys.readouterr().out
