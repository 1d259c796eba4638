"""Prompt tuning of packed rows, and Residual Prompt Tuning, which saves a plain prompt."""

import torch
from peft import PeftModel, PeftModelForCausalLM, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from oplora.generators import GeneratorOptimizer
from oplora.peft import adapter_blocks


class PromptedModel(PeftModelForCausalLM):
    """PEFT's prompt tuning that also takes packed rows: all that is in one sees one prompt.

    With position_ids (1, T), which restart where a text begins, or with a mask (1, 1, T, T) that is
    0 where a token sees another; PEFT ignores both. Logits are of the T tokens, or of
    logits_to_keep (K,). Without position_ids it is PEFT's own forward pass.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: Tensor | None = None,
        **kwargs,
    ):
        if position_ids is None:
            kept = {} if logits_to_keep is None else {"logits_to_keep": logits_to_keep}
            return super().forward(input_ids, attention_mask, **kept, **kwargs)
        if len(input_ids) != 1:
            raise ValueError(f"{len(input_ids)} rows with position_ids: pack them into one")
        if attention_mask is None:
            text = (position_ids[0] == 0).cumsum(0)
            visible = (text[:, None] == text).tril()
        else:
            visible = attention_mask[0, 0] == 0
        embedded = self.word_embeddings(input_ids)
        prompt = self.get_prompt(1).to(embedded.dtype)  # (1, P, d)
        count, length = prompt.shape[1], input_ids.shape[1]
        hidden = torch.ones(count + length, count + length, device=visible.device).triu(1).bool()
        hidden[count:, count:] = ~visible
        first = torch.arange(count, device=position_ids.device)[None]
        tokens = torch.arange(length, device=visible.device)
        return self.base_model(
            inputs_embeds=torch.cat([prompt, embedded], 1),
            position_ids=torch.cat([first, position_ids + count], 1),
            attention_mask=hidden[None, None] * torch.finfo(embedded.dtype).min,
            logits_to_keep=count + (tokens if logits_to_keep is None else logits_to_keep),
            **kwargs,
        )

    def merge_and_unload(self):
        """Itself: a prompt is no part of the weights."""
        return self


def prompt_config(tokens: int, **kwargs) -> PromptTuningConfig:
    """Of so many tokens, at first random ones of the vocabulary."""
    if kwargs:
        raise ValueError(
            f"a prompt trains no {', '.join(kwargs)}: it is for language models (commonsense)"
        )
    start = dict(task_type="CAUSAL_LM", prompt_tuning_init="SAMPLE_VOCAB")
    return PromptTuningConfig(num_virtual_tokens=tokens, **start)


def add_prompt(model: nn.Module, adapter: PromptTuningConfig, data=None) -> PromptedModel:
    if type(model).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ValueError(
            f"a prompt is for language models (commonsense), not for a {type(model).__name__}"
        )
    model = get_peft_model(model, adapter)
    model.__class__ = PromptedModel
    return model


class ResidualPrompt(nn.Module):
    """P + Φ(P) of learned tokens P (n, d): Φ is Linear, ReLU, Linear, LayerNorm on each token.

    Residual Prompt Tuning (arXiv 2305.03937), with weights as torch.nn starts them: at first the
    prompt is not P.
    """

    def __init__(self, prompt: Tensor, bottleneck: int, seed: int):
        super().__init__()
        width = prompt.shape[1]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = nn.Linear(width, bottleneck), nn.ReLU(), nn.Linear(bottleneck, width)
        self.P = nn.Parameter(prompt.detach().clone())
        self.mlp = nn.Sequential(*layers, nn.LayerNorm(width)).to(prompt)

    def forward(self) -> list[Tensor]:
        return [self.P + self.mlp(self.P)]


def create_residual_prompt_optimizer(
    model: PeftModel,
    optimizer_cls: type[Optimizer],
    *,
    bottleneck: int = 800,
    seed: int = 0,
    **options,
) -> GeneratorOptimizer:
    """`optimizer_cls` on P and Φ; the model holds P + Φ(P), a prompt as PEFT's.

    bottleneck: Φ's inner width, by default as in the released code. ValueError: no prompt.
    """
    blocks, others = adapter_blocks(model)
    if [block.kinds for block in blocks] != [["prompt"]] or others:
        raise ValueError("residual_prompt needs a model that trains one prompt and nothing else")
    (prompt,) = blocks[0].tensors
    module = ResidualPrompt(prompt, bottleneck, seed)
    return GeneratorOptimizer([([prompt], module)], optimizer_cls, **options)
