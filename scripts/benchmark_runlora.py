"""RunLoRA (arXiv 2312.03415): what the order of a LoRA layer's products saves, against PEFT's."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from benchmark_training import DEVICE, seconds, spread
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm

from oplora.baselines.runlora import cheapest, use_runlora

ROUNDS = 7
LAYERS = {  # model: rank, rows, tokens of each, (how many a transformer layer, d_in, d_out)
    "SmolLM2-135M": (8, 16, 32, [(1, 576, 576), (2, 576, 192), (1, 576, 1536), (1, 1536, 576)]),
    "LLaMA-7B": (32, 2, 128, [(3, 4096, 4096), (1, 4096, 11008), (1, 11008, 4096)]),
}


def runlora() -> dict:
    """Forward and backward of PEFT's lora.Linear over RunLoRA's, layer by layer; float32.

    Both are timed in turn, a round as many calls as take 0.3 s. A model's ratio is that of a
    round's sums over a transformer layer's adapted layers.
    """
    models = []
    for model, (rank, rows, tokens, layers) in LAYERS.items():
        found = [_case(rank, rows * tokens, *layer) for layer in tqdm(layers, model)]
        sums = [[(count * a, count * b) for (count, *_), (a, b) in zip(layers, times, strict=True)]
                for times in zip(*(pairs for _, pairs in found), strict=True)]  # fmt: skip
        ratios = [sum(p for p, _ in each) / sum(r for _, r in each) for each in sums]
        cases = [case for case, _ in found]
        sizes = {"model": model, "rank": rank, "rows": rows, "tokens": tokens}
        models.append({**sizes, "layers": cases, "peft_over_runlora": spread(ratios)})
    return {"rounds": ROUNDS, "models": models}


def _case(rank: int, tokens: int, count: int, d_in: int, d_out: int):
    """What is told of a layer, and (PEFT's, RunLoRA's) seconds of a call by round."""
    peft, ordered = calls_of(rank, tokens, d_in, d_out)
    peft()
    calls = max(1, round(0.3 / seconds(peft)))
    timed = lambda call: seconds(lambda: [call() for _ in range(calls)]) / calls  # noqa: E731
    timed(ordered)
    pairs = [(timed(peft), timed(ordered)) for _ in range(ROUNDS)]
    order = cheapest(tokens, d_in, d_out, rank)
    case = {
        "count": count,
        "d_in": d_in,
        "d_out": d_out,
        "order": {"y": order.y, "dx": order.dx, "dA, dB": order.factors},
        "peft_seconds": spread([a for a, _ in pairs]),
        "peft_over_runlora": spread([a / b for a, b in pairs]),
    }
    return case, pairs


def calls_of(rank: int, tokens: int, d_in: int, d_out: int) -> list[Callable]:
    """Forward and backward of one layer by PEFT, and by RunLoRA: y, dx, dA, dB."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(d_in, d_out, bias=False)).to(DEVICE)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"]))
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight, std=0.02)
    x = torch.randn(tokens, d_in, device=DEVICE, requires_grad=True)
    dy = torch.randn(tokens, d_out, device=DEVICE)

    def call(layer: nn.Module) -> tuple[Tensor, ...]:
        trained = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        y = layer(x)
        return y, *torch.autograd.grad(y, (x, *trained), dy)

    both = (model, use_runlora(copy.deepcopy(model)))
    return [partial(call, each.base_model.model[0]) for each in both]
