"""What the command line prints: a Flow in a few lines, and the table of a model's boundaries."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from rich.cells import cell_len
from rich.text import Text

from lig_lens.blocks.block import BlockBoundaries
from lig_lens.flow.data import Edge
from lig_lens.flow.describe import Facts, describe
from lig_lens.flow.effects import Effects
from lig_lens.flow.flow import Flow
from lig_lens.relevance.prompts import of_one_prompt
from lig_lens.relevance.relevance import Relevance
from lig_lens.show.tables import PLAIN_WIDTH, new_table, rendered
from lig_lens.show.text import show_token
from lig_lens.show.words import asked_of, certainty_of, ends_of, moving, names_of

if TYPE_CHECKING:
    import pandas

_EDGES_PER_LAYER = 3


class _Row(NamedTuple):
    layer: str
    edge: str
    by: str
    contribution: str
    share: str
    gap: str


def summarize(flow: Flow, width: int | None = None) -> str:
    """Write a Flow in lines: per layer the strongest source → destination edges, their heads, and gaps.

    Args:
        flow: any Flow; edges come from its attn map, else from block, else the parts of its mlp map.
        width: of the terminal in columns; None for text that is piped, which is never wrapped.
    """
    edge_map = next(name for name in ("attn", "block", "mlp") if name in flow.maps)
    table = new_table("layer", "source → destination" if edge_map != "mlp" else "position", "by")
    for name in ("contribution", "share", "worst gap"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in _rows(flow, edge_map):
        table.add_row(*[Text(cell) for cell in row])
    facts = describe(flow)
    return "\n".join([*_header(flow, facts, width), "", rendered(table, width), "", _convergence(facts)])


def _header(flow: Flow, facts: Facts, width: int | None) -> list[str]:
    counts = f"{_count(facts.n_tokens, 'token')}, {_count(facts.n_layers, 'layer')} of {facts.model}"
    if facts.n_destinations < facts.n_tokens or not flow.is_square:
        counts += f", {_count(facts.n_destinations, 'destination')}"
    baselines = ", ".join(f"{name} from {baseline}" for name, baseline in facts.baselines.items())
    named = (("target", facts.target), ("tol", facts.tol))
    asked = ", ".join(f"{name} {value}" for name, value in named if value is not None) + moving(facts)
    texts = (flow.tokens,) if flow.is_square else (flow.tokens, flow.dst_tokens)
    tokens = " → ".join(" ".join(show_token(token) for token in text) for text in texts)
    return [
        line
        for line in (counts, _cut(tokens, width or PLAIN_WIDTH), "; ".join(filter(None, (baselines, asked))))
        if line
    ]


def _rows(flow: Flow, edge_map: str) -> list[_Row]:
    rows = []
    # The third token pair comes at latest after two that every head carries.
    enough = (_EDGES_PER_LAYER - 1) * flow.columns(edge_map).shape[1] + 1
    for place, layer in enumerate(flow.layers):
        gap = max(float(flow.gap[name][place].max()) for name in flow.maps)
        for number, edge in enumerate(_distinct(flow.top(enough, edge_map, layer))):
            first = number == 0
            rows.append(
                _Row(
                    str(layer) if first else "",
                    _edge_label(edge, edge_map),
                    _carrier(edge),
                    f"{edge.contribution:+#.3g}",
                    f"{edge.share:.0%}",
                    f"{gap:.1e}" if first else "",
                )
            )
    return rows


def _distinct(edges: Sequence[Edge]) -> list[Edge]:
    """Keep the first few edges, with the strongest carrier of each, so that one token pair fills one line."""
    seen: dict[tuple[int, int], Edge] = {}
    for edge in edges:
        if edge.contribution != 0:
            seen.setdefault((edge.src, edge.dst), edge)
    return list(seen.values())[:_EDGES_PER_LAYER] or list(edges[:1])


def _edge_label(edge: Edge, edge_map: str) -> str:
    dst = f"{show_token(edge.dst_token, 20)} ({edge.dst})"
    return dst if edge_map == "mlp" else f"{show_token(edge.src_token, 20)} ({edge.src}) → {dst}"


def _carrier(edge: Edge) -> str:
    return edge.part if edge.head is None else f"head {edge.head}"


def _convergence(facts: Facts) -> str:
    within = "the tolerance" if facts.tol is None else f"tol {facts.tol}"
    gaps = ", ".join(f"{name} {gap:.1e}" for name, gap in facts.gaps.items())
    if facts.missed:
        miss = f"{facts.missed:,} of {facts.cells:,} {facts.counted} miss {within}: allow more nodes or a larger tol."
        return f"Worst gaps: {gaps}; {miss}"
    return f"Worst gaps: {gaps}; all {facts.cells:,} {facts.counted} add up within {within}."


def boundaries_table(model_name: str, blocks: Sequence[BlockBoundaries], width: int | None = None) -> str:
    """Lay out `describe_boundaries`: one row per block, hook names without the block's own."""
    table = new_table("block", "layout", "heads", "d_head", "norms", "engine")
    nodes = ("resid_pre", "hook_z", "resid_mid", "resid_post")
    for node in nodes:
        table.add_column(node, overflow="fold")
    for block in blocks:
        heads = str(block.n_heads)
        if block.n_key_value_heads != block.n_heads:
            heads += f" ({block.n_key_value_heads} kv)"
        names = [(getattr(block, node) or "-").split(f"blocks.{block.layer}.")[-1] for node in nodes]
        cells = [
            block.layer,
            block.layout,
            heads,
            block.d_head,
            ", ".join(block.norms) or "-",
            block.engine,
            *names,
        ]
        table.add_row(*[Text(str(cell)) for cell in cells])
    prefix = blocks[0].resid_post.partition(".")[0] if blocks else "blocks"
    title = f"{model_name}: {_count(len(blocks), 'block')}; hooks are named {prefix}.N.…"
    return f"{title}\n\n{rendered(table, width)}"


def relevance_table(
    relevances: "Relevance | Sequence[Relevance]", k: int | None = None, width: int | None = None
) -> str:
    """Write what positions do in lines, in the order of the prompt: one column of scores for each Relevance.

    Args:
        relevances: one, or several of one prompt.
        k: positions to show, those with the largest scores in absolute value (of the first, where there are several).
        width: of the terminal in columns; None for text that is piped, which is never wrapped.

    Raises:
        InputError: k below 1, no Relevance, or Relevances of different prompts.
    """
    several = of_one_prompt("relevance_table", relevances)
    first, names = several[0], names_of(several)
    shown = range(len(first.tokens)) if k is None else sorted(number for number, _, _ in first.top(k))
    table = new_table("position", "token")
    for name in ["score"] if len(several) == 1 else names:
        table.add_column(name, justify="right", no_wrap=True)
    for at in shown:
        scores = [f"{float(one.scores[at]):+#.3g}" for one in several]
        table.add_row(str(at), Text(show_token(first.tokens[at])), *scores)
    size = (
        f"{_count(len(first.tokens), 'token')}, {_count(len(first.layers), 'layer')} of {first.model_name or 'a model'}"
    )
    lines = [_cut(" ".join(show_token(token) for token in first.tokens), width or PLAIN_WIDTH)]
    lines += [" · ".join([f"{asked_of(one)}: {ends_of(one)}", *certainty_of(one)]) for one in several]
    left = len(first.tokens) - len(shown)
    more = [f"{_count(left, 'position')} with smaller scores not shown."] if left else []
    return "\n".join([size, *lines, "", rendered(table, width), *more])


def _cut(text: str, width: int) -> str:
    if cell_len(text) <= width:
        return text
    while text and cell_len(text) > width - 1:
        text = text[:-1]
    return text + "…"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def summarize_effects(effects: Effects, k: int, width: int | None = None) -> str:
    """Write the k strongest effects in lines.

    Args:
        effects: what an intervention found.
        k: how many.
        width: of the terminal; None for text that is piped.
    """
    table = new_table("where")
    table.add_column(effects.measures, justify="right", no_wrap=True)
    for index, value in effects.top(k):
        table.add_row(Text(effects.label(index)), Text(f"{value:+#.3g}"))
    measured = int((~effects.values.isnan()).sum())
    title = f"{effects.name}: {measured:,} measured; {effects.metric} without it {effects.reference:+.4g}"
    return "\n".join([title, "", rendered(table, width)])


def summarize_agreement(agreement: "pandas.DataFrame", effects: Effects, width: int | None = None) -> str:
    """Write a table of `compare_table` in lines.

    Args:
        agreement: the table.
        effects: what the scores are compared with.
        width: of the terminal; None for text that is piped.
    """
    columns = ("spearman", "spearman_size", "kendall", "pearson", "top_k_overlap", "average_precision")
    table = new_table("score")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    for score, row in agreement.iterrows():
        table.add_row(Text(str(score)), *[Text(f"{row[column]:+.3f}") for column in columns])
    first = agreement.iloc[0]
    title = (
        f"Against {effects.name}, {effects.metric}: {int(first['n']):,} measured, {int(first['n_present'])} of them at "
        f"least {first['threshold']:.3g}; k = {int(first['k'])}"
    )
    return "\n".join([title, "", rendered(table, width)])
