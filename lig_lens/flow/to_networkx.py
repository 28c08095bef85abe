"""A Flow as a graph of networkx."""

from typing import TYPE_CHECKING

from lig_lens.errors import InputError
from lig_lens.flow.compose import shares, span
from lig_lens.flow.data import FlowData

if TYPE_CHECKING:
    import networkx


def graph_of(flow: FlowData, threshold: float, start: int | None, stop: int | None, rule: str) -> "networkx.DiGraph":
    """See `Flow.graph`."""
    import networkx

    rows = span(flow, start, stop)
    if not threshold >= 0:
        raise InputError(f"graph: threshold is {threshold}: give a share of at least 0, such as 0.01.")
    found, into = shares(flow, rule, rows), flow.shares("attn")
    result = networkx.DiGraph(model_name=flow.model_name, rule=rule, threshold=threshold)
    last = flow.layers[rows[-1]] + 1
    for layer in range(flow.layers[rows[0]], last + 1):
        for pos, token in enumerate(flow.tokens):
            result.add_node(("resid", layer, pos), kind="resid", layer=layer, pos=pos, token=token)
    for row in rows:
        layer = flow.layers[row]
        for pos, weight in enumerate(found.skip[row].tolist()):
            if weight and abs(weight) >= threshold:
                result.add_edge(("resid", layer, pos), ("resid", layer + 1, pos), kind="skip", weight=weight)
        strong = (found.heads[row].abs() >= threshold) & (found.heads[row] != 0)
        for head, src, dst in strong.nonzero().tolist():
            node = ("head", layer, head, dst)
            result.add_node(node, kind="head", layer=layer, head=head, pos=dst, token=flow.tokens[dst])
            weight, by_head = float(found.heads[row, head, src, dst]), float(found.heads[row, head, :, dst].sum())
            result.add_edge(
                ("resid", layer, src),
                node,
                kind="attn",
                share=float(into[row, head, src, dst]),
                weight=weight,
            )
            result.add_edge(node, ("resid", layer + 1, dst), kind="mlp", weight=by_head)
    return result
