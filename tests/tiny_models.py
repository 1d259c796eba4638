"""A tiny model of every family, its batch, and the loss that training lowers."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM


class Family(NamedTuple):
    build: Callable[[], nn.Module]
    batch: dict[str, Tensor]
    targets: list[str]  # linear layers that the methods adapt

    def output(self, model: nn.Module) -> Tensor:
        result = model(**self.batch)
        return result.logits if "labels" in self.batch else result.sample

    def train(self, model: nn.Module, optimizer: Optimizer, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = self.loss(model)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def loss(self, model: nn.Module) -> Tensor:
        if "labels" in self.batch:
            return model(**self.batch).loss
        return (model(**self.batch).sample - 1).square().mean()


def decoder(**config) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64)
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=32, **config)
    ).eval()


def encoder_decoder() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    layers = dict(encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=48)
    heads = dict(encoder_attention_heads=4, decoder_attention_heads=4)
    return BartForConditionalGeneration(
        BartConfig(d_model=32, vocab_size=64, max_position_embeddings=32, **layers, **heads)
    ).eval()


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def _tokens(rows: int = 4) -> Tensor:
    return torch.randint(3, 64, (rows, 8), generator=torch.Generator().manual_seed(1))


def _latents() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    states = torch.randn(2, 3, 16, generator=generator)
    return dict(sample=sample, timestep=torch.tensor(3), encoder_hidden_states=states)


def _labelled() -> dict[str, Tensor]:
    tokens = _tokens()
    return dict(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens.clone())


FAMILIES = {
    "decoder": Family(decoder, _labelled(), ["q_proj", "v_proj", "up_proj"]),
    "encoder-decoder": Family(encoder_decoder, _labelled(), ["q_proj", "v_proj"]),
    "unet": Family(unet, _latents(), ["to_q", "to_k", "to_v", "to_out.0"]),
}


DECODER = FAMILIES["decoder"]
TARGETS = dict(target_modules=["q_proj", "v_proj"])


def adapted(config=None, **kw):
    return get_peft_model(decoder(), config or LoraConfig(**{"r": 4, **TARGETS, **kw})).eval()


def train(model, optimizer, steps):
    return DECODER.train(model, optimizer, steps)


def output(model):
    with torch.no_grad():
        return DECODER.output(model)
