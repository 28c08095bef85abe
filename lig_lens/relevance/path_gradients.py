"""Gradients at attention patterns, averaged along the path to the prompt."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.blocks.messages import by_head
from lig_lens.errors import ConvergenceWarning, warn_caller
from lig_lens.integrate.onward import OfPositions
from lig_lens.models.running import Hook, leaf_at, torch_hooks
from lig_lens.relevance.explained import Explained

_FEWEST_NODES, _MOST_NODES = 8, 128


def path_pattern_gradients(what: Explained) -> Float[Tensor, "layer head src dst"]:
    """Mean of `dF/dp_ji` along each block's path: Gauss's rule with ever more nodes, until it stays within `tol`.

    Warns:
        ConvergenceWarning: a block for which that takes more nodes than there may be.
    """
    found, missed = [], []
    for layer in what.layers:
        integrand = OfPositions(what.entry(layer), what.down, what.budget)
        n_nodes, mean = _FEWEST_NODES, _mean(what, layer, integrand, _FEWEST_NODES)
        while True:
            n_nodes, before = 2 * n_nodes, mean
            mean = _mean(what, layer, integrand, n_nodes)
            change = float((mean - before).abs().max())
            if change <= what.budget.tol * float(mean.abs().max()):
                break
            if 2 * n_nodes > min(_MOST_NODES, what.budget.max_nodes):
                missed.append(layer)
                break
        found.append(mean)
    if missed:
        warn_caller(
            f"Mean gradients at the attention patterns of blocks {missed} missed tol={what.budget.tol:g}: raise tol, "
            "or take at='end'.",
            ConvergenceWarning,
        )
    return torch.stack(found)


def _mean(what: Explained, layer: int, integrand: OfPositions, n_nodes: int) -> Float[Tensor, "head src dst"]:
    nodes, weights = np.polynomial.legendre.leggauss(n_nodes)
    a = torch.as_tensor((nodes + 1) / 2).to(integrand.first)
    weight = torch.as_tensor(weights / 2).to(integrand.first)
    parts = zip(torch.split(a, integrand.chunk), torch.split(weight, integrand.chunk), strict=True)
    return torch.stack([torch.einsum("n,nhij->hij", w, _at(what, layer, integrand, x)) for x, w in parts]).sum(0)


def _at(
    what: Explained, layer: int, integrand: OfPositions, a: Float[Tensor, "item"]
) -> Float[Tensor, "item head src dst"]:
    """Gradients at points of the path."""
    values, messages = what.values[layer], what.messages(layer)
    n_pos, n_heads, d_head = values.heads.z.shape
    read: dict[str, Tensor] = {}

    def at_v(v: Tensor) -> None:
        read.setdefault("v", v)

    hooks: dict[str, Hook] = {values.heads.nodes.z_path: leaf_at(read, "z"), messages.v_path: at_v}
    with torch.enable_grad():
        resid = integrand.resid(a).requires_grad_()
        value = integrand.value(resid, torch_hooks(values.call.modules, hooks))
        (gradient,) = torch.autograd.grad(value.sum(), read["z"], materialize_grads=True)
    v = by_head(read["v"].detach(), len(a), n_pos, n_heads, d_head)
    return torch.einsum("njhe,nihe->nhij", gradient.reshape(len(a), n_pos, n_heads, d_head), v)
