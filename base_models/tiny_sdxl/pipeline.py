"""A tiny SDXL: every part of the real one, of the same classes, small enough for a laptop."""

import json
import math
from collections.abc import Iterable, Sequence

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

_TIME_WIDTH = 32  # of the sinusoids of each of the six numbers of micro-conditioning


def tiny_sdxl(
    captions: Iterable[str],
    *,
    image_size: int = 64,
    vae_channels: Sequence[int] = (32, 64, 96, 96),
    vae_layers: int = 1,
    latent_channels: int = 32,
    unet_channels: Sequence[int] = (192,),
    unet_layers: int = 1,
    transformer_layers: Sequence[int] = (2,),
    time_width: int = 192,
    head_width: int = 64,
    text_width: int = 96,
    text_layers: int = 3,
    text_length: int = 20,
    vocabulary: int = 2048,
    seed: int = 0,
) -> StableDiffusionXLPipeline:
    """A complete pipeline with random weights; the tokenizers learn their words from `captions`.

    One entry of vae_channels per resolution: each but the first halves it, as unet_channels do
    below the latents. As in SDXL the U-Net takes both text encoders' penultimate states
    (2 × text_width), a pooled one and six numbers of micro-conditioning; unlike SDXL every
    resolution has attention, transformer_layers deep, and prompts have text_length tokens.
    """
    levels = len(unet_channels)
    if len(transformer_layers) != levels:
        raise ValueError(
            f"transformer_layers {tuple(transformer_layers)} and unet_channels "
            f"{tuple(unet_channels)} must be of one length: one entry per resolution"
        )
    steps = 2 ** (len(vae_channels) + levels - 2)
    if image_size % steps:
        raise ValueError(f"image_size {image_size} cannot be halved down to 1/{steps}")
    if wrong := [width for width in unet_channels if width % head_width]:
        raise ValueError(f"unet_channels {wrong} are no multiples of head_width {head_width}")
    tokenizer = clip_tokenizer(captions, vocabulary, text_length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = _text_config(tokenizer, text_width, text_layers)
        return StableDiffusionXLPipeline(
            vae=_vae(vae_channels, vae_layers, latent_channels, image_size),
            text_encoder=CLIPTextModel(text).eval(),
            text_encoder_2=CLIPTextModelWithProjection(text).eval(),
            tokenizer=tokenizer,
            tokenizer_2=clip_tokenizer(captions, vocabulary, text_length),
            unet=UNet2DConditionModel(
                sample_size=image_size // 2 ** (len(vae_channels) - 1),
                in_channels=latent_channels,
                out_channels=latent_channels,
                block_out_channels=tuple(unet_channels),
                layers_per_block=unet_layers,
                down_block_types=("CrossAttnDownBlock2D",) * levels,
                up_block_types=("CrossAttnUpBlock2D",) * levels,
                norm_num_groups=math.gcd(32, *unet_channels),
                transformer_layers_per_block=tuple(transformer_layers),
                attention_head_dim=tuple(width // head_width for width in unet_channels),
                cross_attention_dim=2 * text_width,
                use_linear_projection=True,
                time_embedding_dim=time_width,
                addition_embed_type="text_time",
                addition_time_embed_dim=_TIME_WIDTH,
                projection_class_embeddings_input_dim=text_width + 6 * _TIME_WIDTH,
            ).eval(),
            scheduler=_scheduler(),
            add_watermarker=False,
        )


def clip_tokenizer(captions: Iterable[str], vocabulary: int, length: int) -> CLIPTokenizer:
    """A tokenizer in CLIP's format whose merges come from `captions`; it can spell any text.

    vocabulary: the most tokens it may have, at least 514 (all bytes, each also as the end of a
    word, and two special tokens). Prompts are padded or cut to `length` tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    single = alphabet + [letter + "</w>" for letter in alphabet]
    if vocabulary < len(single) + 2:
        raise ValueError(f"vocabulary {vocabulary} is too small: at least {len(single) + 2}")
    clip = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    # Letters must have fixed numbers, by which pairs of equal frequency are ordered: otherwise
    # the merges would be others in each process.
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2,
        special_tokens=single,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    merges = merges[: vocabulary - len(single) - 2]
    tokens = single + ["".join(merge) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        model_max_length=length,
    )


def _text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        hidden_act="gelu",
    )


def _vae(channels: Sequence[int], layers: int, latents: int, image_size: int) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=image_size,
        block_out_channels=tuple(channels),
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=layers,
        latent_channels=latents,
        norm_num_groups=math.gcd(8, *channels),
        mid_block_add_attention=False,  # SDXL's has one head over all pixels
        scaling_factor=1.0,  # set from the latents, once the VAE is trained
        force_upcast=False,
    ).eval()


def _scheduler() -> DDIMScheduler:
    """SDXL's noise schedule rescaled to end in pure noise, with velocities as targets.

    Otherwise small images keep their mean colour at the last step, and samples come out grey.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
