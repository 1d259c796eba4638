"""RunLoRA (arXiv 2312.03415): what the order of a LoRA layer's products saves, against PEFT's.

For y = x W^T + s (x A^T) B^T and the gradients of x, A and B: every product with B A can go
through the rank or through W + s B A, and those of A and B through the rank or dW = dy^T x.
"""

from itertools import product

import torch
from benchmark_training import DEVICE, seconds, spread
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm

ROUNDS = 7
LAYERS = {  # model: rank, rows, tokens of each, (how many a transformer layer, d_in, d_out)
    "SmolLM2-135M": (8, 16, 32, [(1, 576, 576), (2, 576, 192), (1, 576, 1536), (1, 1536, 576)]),
    "LLaMA-7B": (32, 2, 128, [(3, 4096, 4096), (1, 4096, 11008), (1, 11008, 4096)]),
}
FORWARD = ("rank", "merged")
BACKWARD = tuple(product(FORWARD, ("rank", "full")))  # of dx; of dA and dB


class Ordered(torch.autograd.Function):
    """A LoRA layer in a given order; x (tokens, d_in), W (d_out, d_in) frozen, no bias."""

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float, order: tuple) -> Tensor:
        ctx.save_for_backward(x, W, A, B)
        ctx.s, ctx.order = s, order[1]
        if order[0] == "merged":
            return x @ torch.addmm(W, B, A, alpha=s).T
        return torch.addmm(x @ W.T, x @ A.T, B.T, alpha=s)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, W, A, B = ctx.saved_tensors
        s, (of_x, of_factors) = ctx.s, ctx.order
        dyB = dy @ B if "rank" in (of_x, of_factors) else None  # (tokens, r)
        if of_x == "merged":
            dx = dy @ torch.addmm(W, B, A, alpha=s)
        else:
            dx = torch.addmm(dy @ W, dyB, A, alpha=s)
        if of_factors == "full":
            dW = dy.T @ x
            return dx, None, s * (B.T @ dW), s * (dW @ A.T), None, None
        return dx, None, s * (dyB.T @ x), s * (dy.T @ (x @ A.T)), None, None


def runlora() -> dict:
    """Forward and backward of PEFT's lora.Linear over RunLoRA's, layer by layer; float32.

    The fastest of two forward and four backward orders is chosen first; then both are timed in
    turn, a round as many calls as take 0.3 s. A model's ratio is that of a round's sums over a
    transformer layer's adapted layers.
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
    peft, ordered = layer(rank, tokens, d_in, d_out)
    peft()
    calls = max(1, round(0.3 / seconds(peft)))
    timed = lambda call: seconds(lambda: [call() for _ in range(calls)]) / calls  # noqa: E731
    fastest = lambda order: min(timed(lambda: ordered(order)) for _ in range(2))  # noqa: E731
    forward = min(FORWARD, key=lambda way: fastest((way, BACKWARD[0])))
    backward = min(BACKWARD, key=lambda way: fastest((forward, way)))
    order = (forward, backward)
    pairs = [(timed(peft), timed(lambda: ordered(order))) for _ in range(ROUNDS)]
    case = {
        "count": count,
        "d_in": d_in,
        "d_out": d_out,
        "order": {"y": forward, "dx": backward[0], "dA, dB": backward[1]},
        "peft_seconds": spread([a for a, _ in pairs]),
        "peft_over_runlora": spread([a / b for a, b in pairs]),
    }
    return case, pairs


def layer(rank: int, tokens: int, d_in: int, d_out: int):
    """Forward and backward of one layer by PEFT, and in a given order: y, dx, dA, dB."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(d_in, d_out, bias=False)).to(DEVICE)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"]))
    lora = model.base_model.model[0]
    A, B = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    nn.init.normal_(B, std=0.02)
    x = torch.randn(tokens, d_in, device=DEVICE, requires_grad=True)
    dy = torch.randn(tokens, d_out, device=DEVICE)

    def run(call) -> tuple[Tensor, ...]:
        y = call()
        return y, *torch.autograd.grad(y, (x, A, B), dy)

    def ordered(order: tuple):
        return run(lambda: Ordered.apply(x, lora.base_layer.weight, A, B, 2.0, order))

    return lambda: run(lambda: lora(x)), ordered
