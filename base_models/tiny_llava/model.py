"""The small preset's LLaVA: SmolLM2-135M reads a tiny CLIP-type tower through a projector.

Only tower and projector are trained here (base_models/tiny_llava/pretrain.py) and lie in the base
model's folder; SmolLM2 comes from its package.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel, LlavaConfig

from oplora.studies.llava_cars.model import Llava, with_language

SIDE, PATCH = 60, 20  # 9 image tokens, as the language model's time grows with every one


def tower_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=3,
        image_size=SIDE,
        patch_size=PATCH,
    )


def assemble(
    tower: CLIPVisionModel, language_model: str, dtype: torch.dtype, image_token_id: int
) -> Llava:
    """A model of a trained tower, the language model in a folder and a random projector.

    dtype: of the language model.
    """
    language = AutoModelForCausalLM.from_pretrained(language_model, dtype=dtype)
    language.config._name_or_path = ""  # not a path of this machine
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=image_token_id,
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        vision_feature_layer=-1,  # the layer that was trained to tell images apart
    )
    model = with_language(Llava(config), language)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    return model.requires_grad_(True)


class TowerTraining(nn.Module):
    """Two views of every emoji find one another, and each gives an ImageNet network's features.

    size: of those features. The loss is InfoNCE over the batch plus one minus their cosine.
    """

    def __init__(self, size: int, temperature: float = 0.1):
        super().__init__()
        self.tower = CLIPVisionModel(tower_config())
        width = self.tower.config.hidden_size
        self.imitate = nn.Linear(width, size)
        self.temperature = temperature

    def pooled(self, pixel_values: Tensor) -> Tensor:
        """(views, width): the mean of the tokens that the projector will read."""
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        return states[-1][:, 1:].mean(1)

    def forward(self, pixel_values: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """pixel_values: (emoji, 2, 3, side, side); teacher: (emoji, 2, size)."""
        pooled = self.pooled(pixel_values.flatten(0, 1))
        # of the tokens themselves: behind a head of their own they collapse to a few directions,
        # in which a projector cannot tell a hundred emoji apart
        first, second = F.normalize(pooled, dim=1).unflatten(0, (-1, 2)).unbind(1)
        similar = first @ second.T / self.temperature
        own = torch.arange(len(first), device=similar.device)
        contrast = (F.cross_entropy(similar, own) + F.cross_entropy(similar.T, own)) / 2
        imitation = F.cosine_similarity(self.imitate(pooled), teacher.flatten(0, 1)).mean()
        return {"loss": contrast + 1 - imitation}


class Spelling(nn.Module):
    """The projector learns to write captions: each image token becomes one token's embedding.

    What the language model is to read later costs next to nothing to learn without it.
    embeddings: the input embeddings (tokens, size) of all tokens that captions have. The loss is
    the cross-entropy of the cosines to them, and how far lengths are from their mean length.
    """

    def __init__(self, projector: nn.Module, embeddings: Tensor, temperature: float = 0.05):
        super().__init__()
        self.projector, self.temperature = projector, temperature
        self.length = embeddings.norm(dim=1).mean().item()
        self.register_buffer("directions", F.normalize(embeddings, dim=1), persistent=False)

    def forward(self, features: Tensor, spelled: Tensor) -> dict[str, Tensor]:
        """features: (images, image tokens, size); spelled: (images, image tokens), which token."""
        written = self.projector(features).flatten(0, 1)
        cosines = F.normalize(written, dim=1) @ self.directions.T
        loss = F.cross_entropy(cosines / self.temperature, spelled.flatten())
        return {"loss": loss + 0.1 * (written.norm(dim=1) / self.length - 1).square().mean()}
