"""Rules of composition: how much of a block goes from a source to a destination through a head, or past all heads.

A rule is a class here, and a line in `RULES`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.errors import InputError
from lig_lens.flow.data import FlowData
from lig_lens.registry import Entry, Registry


@dataclass(frozen=True)
class Edges:
    """Weights of all edges within blocks: through heads, and past them at the destination's own position."""

    heads: Float[Tensor, "layer head src dst"]
    skip: Float[Tensor, "layer dst"]


@dataclass(frozen=True)
class HeadMaps:
    """The attn and mlp maps of a Flow that has both, as they stand in it.

    Attributes:
        flow: that they are of.
        attn: contribution of a source to a head's output.
        mlp: contribution of a head to the block's output.
        past: contribution of skip connection and bias to the block's output.
    """

    flow: FlowData
    attn: Float[Tensor, "layer head src dst"]
    mlp: Float[Tensor, "layer head dst"]
    past: Float[Tensor, "layer dst"]


def head_maps(flow: FlowData) -> HeadMaps:
    """The maps that are composed.

    Raises:
        InputError: the Flow lacks one.
    """
    flow.check_square("compose")
    if flow.attn is None or flow.mlp is None or flow.skip is None or flow.bias is None:
        raise InputError(
            f"compose needs the attn and mlp maps of one Flow, and this one has {', '.join(flow.maps)}: ask "
            "attribute() for maps=('attn', 'mlp') and a target of each destination's vector, such as 'l2'."
        )
    return HeadMaps(flow, flow.attn, flow.mlp, flow.skip + flow.bias)


class Rule(ABC):
    """How the edges within a block are weighed.

    Attributes:
        signed: whether weights have the signs of contributions, which alone compare with a block map.
        conserves: whether what enters a destination adds up to what the mlp map explains of it.
        in_explorer: whether the explorer, which composes in the browser, knows it too.
    """

    signed = True
    conserves = False
    in_explorer = False

    @abstractmethod
    def edges(self, maps: HeadMaps) -> Edges:
        """Weights in float64, in the units of the rule."""


class Product(Rule):
    """The paper's (arXiv 2606.21564): `attn[h, i, j] mlp[h, j]` through heads, and nothing past them."""

    in_explorer = True

    def edges(self, maps: HeadMaps) -> Edges:
        """Products of both contributions; the unit is that of the target, squared."""
        return Edges(maps.attn.double() * maps.mlp.double()[:, :, None], torch.zeros_like(maps.past).double())


class Conserving(Rule):
    """Ours: `attn[h, i, j] / sum_i attn[h, i, j] * mlp[h, j]` through heads, and `skip[j] + bias[j]` past them.

    What the mlp map explains is dealt out to sources, none made and none lost. Where a head's output does not move
    along its path (an `itb` path of the first token of a causal model, say), the destination itself gets what the mlp
    map says of that head.
    """

    conserves = in_explorer = True

    def edges(self, maps: HeadMaps) -> Edges:
        """Parts of the mlp map, in its unit."""
        shares = _column_shares(maps.flow, maps.flow.shares("attn").double())
        return Edges(shares * maps.mlp.double()[:, :, None], maps.past.double())


class Sizes(Rule):
    """Ours: as `Conserving`, of absolute values: `|attn[h, i, j]| / sum_i |attn[h, i, j]| * |mlp[h, j]|`.

    Nothing can cancel, so that shares lie between 0 and 1 and stay so through all layers. Signs are lost: it says how
    much comes from where, not what for.
    """

    signed = False

    def edges(self, maps: HeadMaps) -> Edges:
        """Sizes, in the unit of the mlp map."""
        shares = _column_shares(maps.flow, maps.attn.double().abs())
        return Edges(shares * maps.mlp.double().abs()[:, :, None], maps.past.double().abs())


def _column_shares(flow: FlowData, attn: Float[Tensor, "layer head src dst"]) -> Float[Tensor, "layer head src dst"]:
    """Columns divided by their sums; where there is none, the destination itself gets all."""
    total = attn.sum(-2, keepdim=True)
    rests = total == 0
    shares = torch.where(rests, 0.0, attn / total.masked_fill(rests, 1.0))
    columns = torch.arange(len(flow.destinations))
    shares[:, :, list(flow.destinations), columns] += rests[:, :, 0].double()
    return shares


RULES: Registry[Entry] = Registry("rule", product=Entry(Product), conserving=Entry(Conserving), sizes=Entry(Sizes))


def rule_of(name: str) -> Rule:
    """The rule of a name.

    Raises:
        InputError: unknown name.
    """
    rule: Rule = RULES[name]
    return rule
