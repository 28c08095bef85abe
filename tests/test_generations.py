"""The same weights through a bridge and through a HookedTransformer or HookedEncoder give the same tensors."""

import pytest
import torch
from tiny_hooked import HOOKED_KINDS, has_hooked_transformer, tiny_hooked
from tiny_models import LAYOUTS, tiny_bridge

import lig_lens

needs_hooked = pytest.mark.skipif(
    not has_hooked_transformer(),
    reason="TransformerLens 4 has no HookedTransformer; CI also runs these tests on 3.9",
)
NAMES = ("attn", "mlp", "skip", "bias", "block")


@needs_hooked
@pytest.mark.parametrize("kind", HOOKED_KINDS)
def test_same_logits_to_begin_with(kind: str, ids: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(tiny_hooked(kind)(ids[None]), tiny_bridge(kind)(ids[None]), atol=1e-4, rtol=0)


@needs_hooked
@pytest.mark.parametrize("kind", HOOKED_KINDS)
@pytest.mark.parametrize("baselines", [("itb", "att_itb_a0"), ("zero", "zero")])
def test_same_tensors(kind: str, baselines: tuple[str, str], ids: torch.Tensor) -> None:
    resid, tail = baselines
    options = {"attn_baseline": resid, "block_baseline": resid, "mlp_baseline": tail, "progress": False}
    hooked = lig_lens.attribute(tiny_hooked(kind), ids, tol=1e-4, **options)
    bridge = lig_lens.attribute(tiny_bridge(kind), ids, tol=1e-4, **options)
    for name in NAMES:
        one, other = getattr(hooked, name), getattr(bridge, name)
        assert (one - other).abs().max() <= 1e-4 * max(other.abs().max(), 1e-3), name


@needs_hooked
@pytest.mark.parametrize("kind", HOOKED_KINDS)
def test_same_layout(kind: str) -> None:
    blocks = lig_lens.describe_boundaries(tiny_hooked(kind))
    assert {block.layout for block in blocks} == {LAYOUTS[kind]}


@needs_hooked
def test_encoder_resid_post_is_what_leaves_the_block() -> None:
    # HookedEncoder's hook_resid_post stands before the last LayerNorm: not the block's output.
    assert lig_lens.describe_boundaries(tiny_hooked("bert"))[0].resid_post.endswith("hook_normalized_resid_post")
