"""The result object: labels and shapes belong together; shares, transposes, strongest edges, selections."""

import dataclasses

import pytest
import torch
from flows import TOKENS, make_flow

from lig_lens.errors import InputError


def test_columns_add_up_to_the_total():
    flow = make_flow()
    for name in flow.maps:
        torch.testing.assert_close(flow.columns(name).sum(-2), flow.total[name])
    assert flow.columns("mlp").shape == (2, 5, 7)
    torch.testing.assert_close(flow.columns("mlp")[:, 3], flow.skip)
    torch.testing.assert_close(flow.columns("mlp")[:, 4], flow.bias)


@pytest.mark.parametrize("name", ["attn", "mlp", "block"])
def test_shares_add_up_to_one_and_keep_proportions(name):
    flow = make_flow()
    shares, terms = flow.shares(name), flow.columns(name)
    torch.testing.assert_close(shares.sum(-2), torch.ones_like(flow.total[name]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shares * terms.sum(-2, keepdim=True), terms)


def test_shares_of_a_column_whose_sum_is_rounding_are_zero():
    flow = make_flow(maps=("attn",))
    attn = flow.attn.clone()
    attn[0, 0, :, 1] = 0
    attn[0, 0, :, 2] = 0
    attn[0, 0, 0, 2], attn[0, 0, 1, 2] = 1.0, -1.0
    attn[0, 0, :, 3] = 1e-9  # the other columns of this layer are of order 1
    shares = dataclasses.replace(flow, attn=attn).shares()
    for j in (1, 2, 3):
        assert torch.equal(shares[0, 0, :, j], torch.zeros(7))
    assert torch.isfinite(shares).all()


def test_to_tl_swaps_source_and_destination():
    flow = make_flow()
    assert flow.to_tl()[1, 2, 4, 6] == flow.attn[1, 2, 6, 4]
    assert flow.to_tl("block")[1, 4, 6] == flow.block[1, 6, 4]
    with pytest.raises(InputError, match="no source axis"):
        flow.to_tl("mlp")


def test_top_names_the_strongest_contributions():
    flow = make_flow(destinations=(2, 6))
    edges = flow.top(1000)
    sizes = [abs(edge.contribution) for edge in edges]
    assert sizes == sorted(sizes, reverse=True) and len(edges) == flow.attn.numel()
    edge = edges[0]
    value = flow.attn[flow.layers.index(edge.layer), edge.head, edge.src, flow.destinations.index(edge.dst)]
    assert edge.contribution == float(value) == float(flow.attn.flatten()[flow.attn.abs().argmax()])
    assert (edge.src_token, edge.dst_token) == (TOKENS[edge.src], TOKENS[edge.dst])
    assert {edge.dst for edge in edges} == {2, 6}
    column = flow.attn[flow.layers.index(edge.layer), edge.head, :, flow.destinations.index(edge.dst)]
    assert edge.share == pytest.approx(edge.contribution / float(column.sum()), rel=1e-4)
    assert all(edge.layer == 3 for edge in flow.top(5, layer=3))


def test_top_of_the_other_maps_says_what_carries_it():
    flow = make_flow()
    for edge in flow.top(10, "block"):
        assert edge.part == "block" and edge.head is None
        assert edge.contribution == float(flow.block[flow.layers.index(edge.layer), edge.src, edge.dst])
    for edge in flow.top(70, "mlp"):
        row = flow.layers.index(edge.layer)
        tensor = {"head": flow.mlp[:, edge.head or 0], "skip": flow.skip, "bias": flow.bias}[edge.part]
        assert edge.contribution == float(tensor[row, edge.dst]) and edge.src == edge.dst
        assert (edge.head is None) == (edge.part != "head")


def test_worst_gap_and_converged_share():
    flow = make_flow()
    assert flow.worst_gap("mlp") == float(flow.gap["mlp"].max())
    assert flow.worst_gap() == max(flow.worst_gap(name) for name in flow.maps)
    cells = torch.cat([flow.gap[name].flatten() for name in flow.maps])
    assert flow.converged_share() == pytest.approx(float((cells <= 1e-3).float().mean()))


def test_select_keeps_labels_with_numbers():
    flow = make_flow()
    part = flow.select(layers=(3,), destinations=(6, 2))
    assert part.layers == (3,) and part.destinations == (6, 2) and part.tokens == flow.tokens
    torch.testing.assert_close(part.attn[0], flow.attn[1][..., [6, 2]])
    torch.testing.assert_close(part.skip[0], flow.skip[1][[6, 2]])
    torch.testing.assert_close(part.gap["mlp"][0], flow.gap["mlp"][1][[6, 2]])
    with pytest.raises(InputError, match=r"no layer 1: use some of \[0, 3\]"):
        flow.select(layers=(1,))
    with pytest.raises(InputError, match="no destination is named"):
        flow.select(destinations=())


def test_tensors_become_float32_on_the_cpu_without_a_graph():
    flow = make_flow()
    again = dataclasses.replace(flow, attn=flow.attn.double().requires_grad_())
    assert again.attn.dtype == torch.float32 and not again.attn.requires_grad


def test_destinations_default_to_all_positions():
    flow = make_flow()
    assert dataclasses.replace(flow, destinations=()).destinations == tuple(range(7))


def test_repr_is_short_and_says_whether_it_added_up():
    text = repr(make_flow(layers=(0, 1, 2, 5)))
    assert "'tiny', 7 tokens, layers 0-2, 5" in text and "attn [4, 3, 7, 7] gap ≤ " in text
    assert "% converged" in text and len(text) < 250


BAD = [
    ({"special": (True,)}, "special has 1 entries for 7 tokens"),
    ({"layouts": ("post_ln",)}, "layouts has 1 entries for 2 layers"),
    ({"destinations": (0, 9)}, "destination 9 is outside the positions 0 to 6"),
    ({"destinations": (0, 0)}, r"destinations \(0, 0\) repeat"),
    ({"layers": (3, 3)}, "repeat a number"),
    ({"skip": None}, "only mlp, bias"),
    ({"gap": {}}, r"gap has keys \[\] for the maps"),
    ({"settings": {"w": {1, 2}}}, "cannot be written as JSON"),
    ({"settings": {"tol": float("nan")}}, "cannot be written as JSON"),
    ({"attn": None, "block": None, "mlp": None, "skip": None, "bias": None}, r"maps \(\)"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_parts_that_do_not_belong_together(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(make_flow(), **change)


# One map at a time: the runtime type checker of the tests speaks first where two tensors contradict.
@pytest.mark.parametrize(
    ("maps", "shapes", "message"),
    [
        ("attn", {"attn": (2, 3, 6, 7)}, r"attn has shape \[2, 3, 6, 7\], expected \[2, 3, 7, 7\]"),
        ("attn", {"attn": (1, 3, 7, 7)}, r"attn has shape \[1, 3, 7, 7\], expected \[2, 3, 7, 7\]"),
        (
            "block",
            {"block": (2, 7, 6)},
            r"\[2, 7, 6\], expected \[2, 7, 7\] \(layer src dst\)",
        ),
        ("mlp", {"mlp": (2, 3, 6), "skip": (2, 6), "bias": (2, 6)}, r"mlp has shape \[2, 3, 6\], expected"),
    ],
)
def test_tensors_that_do_not_fit_their_labels(maps, shapes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(make_flow(maps=(maps,)), **{k: torch.zeros(v) for k, v in shapes.items()})


def test_wrong_cell_shape():
    flow = make_flow()
    gap = {**flow.gap, "attn": flow.gap["mlp"]}
    with pytest.raises(InputError, match=r"gap\['attn'\] has shape \[2, 7\], expected \[2, 3, 7\]"):
        dataclasses.replace(flow, gap=gap)


def test_maps_layers_and_k_that_are_not_there():
    flow = make_flow(maps=("attn",))
    with pytest.raises(InputError, match=r"no 'mlp' map, only attn: ask attribute\(\) for it"):
        flow.columns("mlp")
    with pytest.raises(InputError, match=r"Unknown map 'atn'.*Did you mean 'attn'"):
        flow.shares("atn")
    with pytest.raises(InputError, match="k is 0"):
        flow.top(0)
    with pytest.raises(InputError, match=r"no layer 1: use one of \[0, 3\]"):
        flow.top(1, layer=1)
