"""BART that reads images: VL-BART (section 5.2), as VL-Adapter builds it.

The encoder reads the text's tokens and then the cells of one or two images' grids. Everything
else is the stock `BartForConditionalGeneration`: PEFT finds its q_proj, k_proj, v_proj, and
`generate` takes what `encode` returns.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BartConfig, BartForConditionalGeneration
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.bart.modeling_bart import shift_tokens_right

IGNORED = -100  # label of positions without loss


class VLBartConfig(BartConfig):
    """BART's config and the size of the grids; any BART's config.json can be read as one."""

    feature_size: int = 2048
    cells: int = 36
    images: int = 2  # at most, in one item


class VisualEmbedding(nn.Module):
    """Cells as encoder inputs: LayerNorm(W f) + position + order of the image.

    Upstream adds an embedding of boxes, which are all zero for grids and so a constant that the
    positions contain here, and takes positions from rows of the token embedding.
    """

    def __init__(self, config: VLBartConfig):
        super().__init__()
        self.feature = nn.Linear(config.feature_size, config.d_model)
        self.norm = nn.LayerNorm(config.d_model)
        self.position = nn.Embedding(config.cells, config.d_model)
        self.image = nn.Embedding(config.images, config.d_model)

    def forward(self, grids: Tensor) -> Tensor:
        """(batch, images, cells, feature_size) to (batch, images · cells, d_model)."""
        images, cells = grids.shape[1:3]
        if images > self.image.num_embeddings or cells != self.position.num_embeddings:
            raise ValueError(
                f"{images} images of {cells} cells, but the model reads at most "
                f"{self.image.num_embeddings} of {self.position.num_embeddings}"
            )
        embedded = self.norm(self.feature(grids)) + self.position.weight
        return (embedded + self.image.weight[:images, None]).flatten(1, 2)


class VLBart(BartForConditionalGeneration):
    """BART with a visual embedding beside the token embedding of its encoder.

    `VLBart.from_pretrained("facebook/bart-base", feature_size=2048, cells=36)` leaves the visual
    embedding random, as upstream starts.
    """

    config_class = VLBartConfig
    accepts_loss_kwargs = False  # the loss is a mean over items, not over tokens

    def __init__(self, config: VLBartConfig):
        super().__init__(config)
        self.visual_embedding = VisualEmbedding(config)
        self.post_init()

    @classmethod
    def from_config(cls, config: VLBartConfig) -> "VLBart":
        """Random weights, as transformers' auto classes."""
        return cls(config)

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor, grids: Tensor | None = None
    ) -> dict[str, BaseModelOutput | Tensor]:
        """`encoder_outputs` and `attention_mask` of text and images, for `generate` and `forward`.

        input_ids, attention_mask: (batch, tokens). grids: (batch, images, cells, feature_size);
        without them it is BART's own encoder. Cells get neither the text's positions nor its
        LayerNorm, so an item's output does not depend on its padding.
        """
        encoder = self.model.encoder
        states = encoder.embed_tokens(input_ids) + encoder.embed_positions(input_ids)
        states = encoder.layernorm_embedding(states)
        if grids is not None:
            cells = self.visual_embedding(grids.to(states.dtype))
            states = torch.cat([states, cells], 1)
            attention_mask = F.pad(attention_mask, (0, cells.shape[1]), value=1)
        states = F.dropout(states, self.config.dropout, self.training)
        mask = create_bidirectional_mask(
            config=encoder.config, inputs_embeds=states, attention_mask=attention_mask
        )
        for layer in encoder.layers:
            states = layer(states, mask)
        outputs = BaseModelOutput(last_hidden_state=states)
        return {"encoder_outputs": outputs, "attention_mask": attention_mask}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        grids: Tensor | None = None,
        labels: Tensor | None = None,
        scores: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        decoder_input_ids: Tensor | None = None,
        **kwargs,
    ) -> Seq2SeqLMOutput:
        """BART's forward; with `labels` (batch, target tokens) also `item_loss` of them.

        encoder_outputs: of `encode`, in place of input_ids, with its attention_mask.
        """
        encoded = {"encoder_outputs": encoder_outputs, "attention_mask": attention_mask}
        if encoder_outputs is None:
            encoded = self.encode(input_ids, attention_mask, grids)
        if labels is not None and decoder_input_ids is None:
            decoder_input_ids = shift_tokens_right(
                labels, self.config.pad_token_id, self.config.decoder_start_token_id
            )
        output = super().forward(decoder_input_ids=decoder_input_ids, **encoded, **kwargs)
        if labels is not None:
            output.loss = item_loss(output.logits, labels, scores)
        return output


def item_loss(logits: Tensor, labels: Tensor, scores: Tensor | None = None) -> Tensor:
    """Mean over items of (mean over their tokens) × (score of the answer), as upstream.

    logits: (batch, tokens, vocabulary); labels: (batch, tokens), -100 where there is no token;
    scores: (batch,), 1 where missing.
    """
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(labels)
    means = losses.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)
    return (means if scores is None else means * scores).mean()


def example_loss(model: VLBart, rows: int, tokens: int, target_tokens: int) -> Tensor:
    """The loss of inputs of these shapes and one grid each, for the dry run."""
    config, ids = model.config, torch.zeros(rows, tokens, dtype=torch.long)
    return model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        grids=torch.zeros(rows, 1, config.cells, config.feature_size),
        labels=torch.zeros(rows, target_tokens, dtype=torch.long),
    ).loss


def base_folder(folder: str) -> str:
    """The folder of the small preset's base model; FileNotFoundError says how to make it."""
    if not Path(folder, "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{folder} holds no model: run `python base_models/tiny_vl_bart/pretrain.py`"
        )
    return folder
