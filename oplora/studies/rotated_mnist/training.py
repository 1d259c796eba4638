"""All learning rates and seeds of a method as one batched program.

Member (rate r, seed s) is [r, s] of every tensor. All start as the method's own PEFT model and
optimizer do with that seed, take the same step at the same time, and never interact: one that
diverges disturbs nobody.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional
from torch.optim import Optimizer
from tqdm import tqdm

from oplora.generators import GeneratorOptimizer
from oplora.mlp import AdapterMLP, generator_for
from oplora.optimizer import INITIAL, OPOptimizer
from oplora.peft import adapter_blocks
from oplora.studies.rotated_mnist.network import Layer, gradients, layers_of, logits

DIVERGED = 1e3  # a loss of this many times the base's is recorded as diverged


class Direct(nn.Module):
    """The adapter's tensors are the parameters."""

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__()
        self.tensors = nn.ParameterList(tensor.detach().clone() for tensor in tensors)

    def forward(self) -> list[Tensor]:
        return list(self.tensors)


@dataclass(frozen=True)
class Member:
    """How a run of one seed starts: the frozen layers and what predicts their adapters."""

    layers: list[Layer]
    generators: list[nn.Module]  # one a layer

    @property
    def is_direct(self) -> bool:
        return isinstance(self.generators[0], Direct)

    @classmethod
    def direct(cls, model: nn.Module) -> "Member":
        """The adapter itself is trained."""
        blocks, _ = adapter_blocks(model)
        return cls(layers_of(model), [Direct(block.tensors) for block in blocks])

    @classmethod
    def of(cls, model: nn.Module, optimizer: Optimizer) -> "Member":
        """What this optimizer trains of this model, before its first step."""
        if isinstance(optimizer, GeneratorOptimizer):
            return cls(layers_of(model), [module for _, module in optimizer.modules])
        if not isinstance(optimizer, OPOptimizer):
            return cls.direct(model)
        (stack,), group = optimizer.stacks, optimizer.param_groups[0]
        options = {key: group[key] for key in INITIAL}
        generators = [
            AdapterMLP(
                block.tensors,
                stack.width,
                starts,
                generator=generator_for(group["seed"], block.names[0]),
                **options,
            )
            for block, starts in zip(adapter_blocks(model)[0], stack.starts, strict=True)
        ]
        return cls(layers_of(model), generators)


class Body(nn.Module):
    """What autograd goes through in a generator: h where theta = W2 h + b2, else theta itself."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.has_head = type(module).forward is AdapterMLP.forward

    def forward(self) -> Tensor:
        if self.has_head:
            return self.module.hidden()
        return torch.cat([value.flatten() for value in self.module()])


class Generators:
    """What predicts the adapters of one layer, of all members.

    The gradient of W2, h ⊗ g, is formed here in place; autograd finds that of the rest.
    """

    def __init__(self, modules: list[nn.Module], rates: int):
        self.body = Body(modules[0])
        weights, buffers = (
            {
                name: value.detach().repeat(rates, *[1] * value.ndim)
                for name, value in stacked.items()
            }
            for stacked in stack_module_state(modules)
        )
        for value in weights.values():
            value.grad = torch.zeros_like(value)
        self.weights, self.buffers = weights, buffers
        if self.body.has_head:
            self.W2, self.b2 = weights["W2"], weights["b2"]
        self.inner = {
            name: value.requires_grad_()
            for name, value in weights.items()
            if not (self.body.has_head and name in ("W2", "b2"))
        }
        self.predict()

    @torch.enable_grad()
    def predict(self) -> None:
        """Set theta (rates, seeds, P)."""

        def one(tensors: dict[str, Tensor]) -> Tensor:
            return functional_call(self.body, {f"module.{k}": t for k, t in tensors.items()}, ())

        self.out = vmap(vmap(one))(self.inner | self.buffers)
        self.theta = self.out.detach()
        if self.body.has_head:
            self.theta = (self.W2 @ self.theta.unsqueeze(-1)).squeeze(-1) + self.b2

    def pull_back(self, g: Tensor) -> None:
        """Set the gradients of the weights, from that of theta."""
        for value in self.inner.values():
            value.grad.zero_()
        if self.body.has_head:
            torch.mul(g.unsqueeze(-1), self.out.detach().unsqueeze(-2), out=self.W2.grad)
            self.b2.grad.copy_(g)
            g = (g.unsqueeze(-2) @ self.W2).squeeze(-2)
        self.out.backward(g)


@dataclass(frozen=True)
class Trained:
    """All members of a method after training."""

    thetas: list[Tensor]  # a layer: (rates, seeds, P)
    losses: Tensor  # (rates, seeds, steps), of the batches; NaN after divergence
    diverged: Tensor  # (rates, seeds)
    snapshots: list[Tensor]  # a layer: (points, rates, seeds, P), first and last step among them
    snapshot_steps: list[int]
    trained_parameters: int  # of one member


@torch.no_grad()
def adapt(
    members: Sequence[Member],
    rates: list[float],
    seeds: list[int],
    images: Tensor,
    labels: Tensor,
    *,
    optimizer: Callable[..., Optimizer],
    epochs: int,
    batch_size: int,
    points: int,
    progress: str | None = None,
) -> Trained:
    """Train all members; a member's images come in the order that its seed gives.

    members: one a seed. optimizer: torch.optim.AdamW with options other than the rate. The last
    incomplete batch of an epoch is left out. points: intervals between snapshots.
    """
    layers = members[0].layers
    for layer, *others in zip(*(member.layers for member in members), strict=True):
        if not all(torch.equal(layer.W, other.W) for other in others):
            raise ValueError("this method changes the frozen weights with the seed: choose another")
    stacks = [
        Generators(list(modules), len(rates))
        for modules in zip(*(member.generators for member in members), strict=True)
    ]
    weights = [value for stack in stacks for value in stack.weights.values()]
    groups = []
    for r, rate in enumerate(rates):
        views = [value.detach()[r] for value in weights]
        for view, value in zip(views, weights, strict=True):
            view.grad = value.grad[r]
        groups.append({"params": views, "lr": rate})
    update = optimizer(groups, fused=True)
    gs = [torch.empty_like(stack.theta) for stack in stacks]
    alive = torch.ones(len(rates), len(seeds), dtype=torch.bool)
    per_epoch = len(images) // batch_size
    steps = epochs * per_epoch
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    losses, snapshots, marks = [], [], [round(i * steps / points) for i in range(points + 1)]
    silent = None if progress else True  # None: where there is no terminal
    for step in tqdm(range(steps + 1), progress, disable=silent, mininterval=2):
        thetas = [stack.theta for stack in stacks]
        if step in marks:
            snapshots.append([theta.clone() for theta in thetas])
        if step == steps:
            break
        if step % per_epoch == 0:
            orders = [torch.randperm(len(images), generator=stream) for stream in streams]
        found = torch.empty(len(rates), len(seeds))
        for s, order in enumerate(orders):  # a seed's members share their images
            batch = order[step % per_epoch * batch_size :][:batch_size]
            of_seed = ([each[:, s] for each in tensors] for tensors in (thetas, gs))
            found[:, s] = gradients(layers, *of_seed, images[batch], labels[batch])
        if step == 0:
            limit = DIVERGED * found
        alive &= found < limit
        losses.append(torch.where(alive, found, torch.nan))
        for stack, g in zip(stacks, gs, strict=True):
            stack.pull_back(g)
        update.step()
        for stack in stacks:
            stack.predict()
    return Trained(
        thetas,
        torch.stack(losses, -1),
        ~alive,
        [torch.stack(each) for each in zip(*snapshots, strict=True)],
        marks,
        sum(value[0, 0].numel() for value in weights),
    )


def alone(
    model: nn.Module,
    optimizer: Optimizer,
    seed: int,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    batch_size: int,
) -> None:
    """Train one member as anyone would: what `adapt` equals."""
    stream = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=stream)
        for batch in order[: len(images) // batch_size * batch_size].split(batch_size):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


@torch.no_grad()
def evaluate(
    layers: list[Layer], thetas: list[Tensor], images: Tensor, labels: Tensor, piece: int = 512
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and share of right answers of every member, (rates, seeds) each."""
    losses = torch.zeros(thetas[0].shape[:2])
    right = torch.zeros_like(losses)
    for s in range(losses.shape[1]):
        of_seed = [theta[:, s] for theta in thetas]
        for x, y in zip(images.split(piece), labels.split(piece), strict=True):
            scores = logits(layers, of_seed, x)
            each = functional.cross_entropy(
                scores.flatten(0, 1), y.repeat(len(scores)), reduction="none"
            )
            losses[:, s] += each.view(len(scores), -1).sum(-1)
            right[:, s] += (scores.argmax(-1) == y).sum(-1)
    return losses / len(images), right / len(images)
