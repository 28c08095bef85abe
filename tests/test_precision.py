"""Half-precision models computed with in float32: what torch's functions get, what is kept, and what is left."""

import gc

import pytest
import torch
from tiny_models import tiny_bridge
from torch import nn
from torch.nn import functional

import lig_lens as ll
from lig_lens.models import precision
from lig_lens.models.precision import HALF, raised


class Whole(nn.Module):
    """A block between weights that are no block's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.unembed = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)
        self.unembed.weight = self.embed.weight


USES = {
    "embedding": lambda m, x: m.embed(torch.tensor([[1, 3], [2, 2]])) * x,
    "linear": lambda m, x: m.unembed(x),
    "linear by name": lambda m, x: functional.linear(input=x, weight=m.embed.weight),
    "product with the transposed": lambda m, x: x @ m.embed.weight.T,
    "rows": lambda m, x: x * m.embed.weight[2:3],
    "in a list": lambda m, x: x * torch.stack([m.embed.weight, m.embed.weight]).mean((0, 1)),
    "as what is mapped": lambda m, x: x * functional.linear(m.embed.weight, m.block.weight.float()).sum(0),
    "through the block": lambda m, x: m.unembed(m.block(x)),
}


@pytest.fixture
def whole() -> Whole:
    torch.manual_seed(0)
    return Whole().requires_grad_(False)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("use", USES)
def test_raised_weights_give_what_float32_copies_give(
    whole: Whole, use: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_AT_A_TIME", 8)  # two rows
    whole.to(dtype)
    single = Whole().requires_grad_(False)
    single.load_state_dict(whole.state_dict())
    x = torch.randn(2, 2, 4)
    found = []
    for model in (whole, single):
        leaf = x.clone().requires_grad_()
        with raised(model, [model.block]):
            y = USES[use](model, leaf)
            (first,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
            (second,) = torch.autograd.grad(first.sin().sum(), leaf)
            found.append((y.detach(), first.detach(), second))
    for ours, expected in zip(*found, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert all(weight.dtype == dtype and weight.isfinite().all() for weight in whole.parameters())


def test_raised_weights_look_like_float32(whole: Whole) -> None:
    kept = whole.to(torch.bfloat16).embed.weight.detach().clone()
    with raised(whole, [whole.block]):
        weight = whole.embed.weight
        assert weight.dtype == torch.float32 and weight.shape == (7, 4) and weight.device.type == "cpu"
        assert len(weight) == weight.size(0) == 7 and weight.numel() == 28 and weight.is_floating_point()
        assert torch.equal(weight[2:4], kept[2:4].float()) and torch.equal(weight.T, kept.T.float())
    assert whole.embed.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", ["l2", "logits"])
def test_calls_leave_no_tensors_behind(target: str, dtype: torch.dtype, ids: torch.Tensor) -> None:
    model = tiny_bridge("llama", dtype)
    metric = {"target": ll.logit_difference(3, 7), "corrupted": ids.flip(-1)} if target == "logits" else {}

    def left() -> int:
        ll.attribute(model, ids, progress=False, **metric)
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    left()
    before = left()
    assert left() <= before
