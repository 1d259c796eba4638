"""The loss surface around an adapter: its steepest direction, and how well it is conditioned."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, jacfwd, jvp, vmap
from torch.nn import functional

from oplora.studies.rotated_mnist.network import Layer, loss


def power_iteration(
    gradient: Callable[[Tensor], Tensor], at: Tensor, iterations: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The Hessian's eigenvalue of largest modulus and its unit vector, shaped like `at`.

    gradient: of the loss, as a function of its argument.
    """
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(at.shape, generator=generator, dtype=at.dtype)
    for _ in range(iterations):
        v = v / v.norm()
        Hv = jvp(gradient, (at,), (v,))[1]
        eigenvalue = (v * Hv).sum()
        v = Hv
    return eigenvalue, v / v.norm()


def along_top(
    layers: list[Layer], thetas: list[Tensor], x: Tensor, labels: Tensor, iterations: int
) -> Tensor:
    """|vᵀg|, the top eigenvalue and |g| of every member (3, members) (second text, Table 5).

    thetas: a layer (members, P). H and g: of the loss on all of x, in the adapter's own values.
    """
    sizes = [theta.shape[-1] for theta in thetas]
    gradient = grad(lambda theta: loss(layers, theta.split(sizes), x, labels))

    def of_one(theta: Tensor) -> Tensor:
        eigenvalue, v = power_iteration(gradient, theta, iterations)
        g = gradient(theta)
        return torch.stack([(v @ g).abs(), eigenvalue, g.norm()])

    return vmap(of_one, out_dims=1, randomness="same")(torch.cat(thetas, -1))


def condition(matrix: Tensor) -> float:
    """Largest over smallest singular value."""
    sigma = torch.linalg.svdvals(matrix)
    return (sigma[0] / sigma[-1]).item()


def hessian_condition(function: Callable[[Tensor], Tensor], at: Tensor) -> float:
    """Of the Hessian, which is positive definite: largest over smallest eigenvalue, exactly."""
    H = jacfwd(grad(function))(at).reshape(at.numel(), at.numel())
    eigenvalues = torch.linalg.eigvalsh(H)
    return (eigenvalues[-1] / eigenvalues[0]).item()


def condition_numbers(
    layer: Layer, theta: Tensor, x: Tensor, labels: Tensor, damping: float, iterations: int = 100
) -> dict[str, float]:
    """Of the Hessian of a last layer's loss in A, in B and in W = W0 + s B A (second text, Eq. 3).

    x (n, in): what comes into the layer. The loss has a term damping/2 ‖W‖²: softmax does not see
    a shift that all logits share, so that without it no Hessian in W is positive definite, and
    with it its least eigenvalue is `damping`.
    """
    W0, bias, x, theta = (t.double() for t in (layer.W, layer.bias, x, theta))
    A, B = layer.tensors(theta)

    def of_weight(W: Tensor) -> Tensor:
        return functional.cross_entropy(x @ W.T + bias, labels) + damping / 2 * W.square().sum()

    def merged(A: Tensor, B: Tensor) -> Tensor:
        return W0 + layer.scaling * B @ A

    top, _ = power_iteration(grad(of_weight), merged(A, B), iterations)
    return {
        "H_W": top.item() / damping,
        "H_A": hessian_condition(lambda A: of_weight(merged(A, B)), A),
        "H_B": hessian_condition(lambda B: of_weight(merged(A, B)), B),
        "A": condition(A),
        "B": condition(B),
    }
