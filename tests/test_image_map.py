"""Contributions over an image: what is drawn is what the Flow holds."""

import base64
import io
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from flows import make_flow
from PIL import Image
from plot_cases import image_flow, metric_flow

from lig_lens.errors import InputError
from lig_lens.inputs.pictures import picture_of, picture_uri, pixels_of
from lig_lens.show.plots import image_map

pytestmark = pytest.mark.filterwarnings("ignore::lig_lens.CancellationWarning")  # random Flows

LABELS = ("[CLS]", *(f"r{row}c{column}" for row in range(2) for column in range(3)))


def panels(figure: go.Figure) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(trace.z, dtype=float) for trace in figure.data]


def captions(figure: go.Figure) -> list[str]:
    return [note.text for note in figure.layout.annotations]


def test_a_panel_for_each_layer_after_the_image() -> None:
    flow = image_flow()
    assert flow.attn is not None
    figure = image_map(flow)
    image, *layers = panels(figure)
    assert np.isnan(image).all() and len(layers) == 2
    for row, found in enumerate(layers):
        wanted = flow.attn[row].sum(0)[1:, 0].reshape(2, 3)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
        first = float(flow.attn[row, :, 0, 0].sum())
        assert f"[CLS]</span></i> {first:+.3g}".replace("-", "−") in captions(figure)[row + 1]
        assert f"patches {float(wanted.sum()):+.3g}".replace("-", "−") in captions(figure)[row + 1]
        assert figure.layout[f"coloraxis{row + 1 if row else ''}"].cmax == pytest.approx(float(wanted.abs().max()))
    assert "all heads added up" in "".join(captions(figure))
    assert len(figure.layout.images) == 3


def test_one_head_at_another_destination() -> None:
    flow = image_flow()
    assert flow.attn is not None and flow.block is not None
    (_, found) = panels(image_map(flow, layers=1, head=2, dst=-1))
    np.testing.assert_allclose(found, flow.attn[1, 2, 1:, -1].reshape(2, 3), rtol=1e-6)
    (_, found) = panels(image_map(flow, layers=[0], map="block", dst=3))
    np.testing.assert_allclose(found, flow.block[0, 1:, 3].reshape(2, 3), rtol=1e-6)


def test_a_layer_adds_up_to_the_metric() -> None:
    flow = metric_flow(LABELS, metric="class_logit(1)")
    assert flow.attn is not None and flow.skip is not None
    figure = image_map(flow)  # it keeps no image
    assert len(figure.layout.images) == 0
    for row, found in enumerate(panels(figure)):
        first = flow.attn[row, :, 0].sum() + flow.skip[row, 0]
        assert float(found.sum() + first) == pytest.approx(float(flow.total["attn"][row]), rel=1e-5)
    (found,) = panels(image_map(flow, layers=0, head=1))
    np.testing.assert_allclose(found, flow.attn[0, 1].sum(-1)[1:].reshape(2, 3), rtol=1e-5)
    (found,) = panels(image_map(flow, layers=0, dst=4))
    np.testing.assert_allclose(found, flow.attn[0].sum(0)[1:, 4].reshape(2, 3), rtol=1e-5)


def test_a_rollout_of_the_destination() -> None:
    flow = image_flow(layers=(3, 4))
    figure = image_map(flow, map="rollout", dst=2)
    for stop, found in zip((4, 5), panels(figure)[1:], strict=True):
        np.testing.assert_allclose(found, flow.rollout(stop=stop)[1:, 2].reshape(2, 3), rtol=1e-5)


def decoded(source: str) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


def test_the_image_is_drawn_and_fades_below_contributions() -> None:
    bytes_ = torch.randint(0, 256, (3, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    kept = image_flow(picture_uri(bytes_))
    for given in (bytes_, Image.fromarray(bytes_.permute(1, 2, 0).numpy()), bytes_[None].numpy(), None):
        first, *others = image_map(image_flow() if given is not None else kept, image=given).layout.images
        large = decoded(first.source)  # each pixel is repeated, so that a browser does not blur it
        assert large.shape == (8 * 33, 12 * 33, 3)
        for corner in (0, 32):
            np.testing.assert_array_equal(large[corner::33, corner::33], bytes_.permute(1, 2, 0).numpy())
        # It covers all patches: half a cell around the centres of the outermost ones.
        assert (first.x, first.y, first.sizex, first.sizey, first.sizing) == (-0.5, -0.5, 3, 2, "stretch")
        assert [one.xref for one in (first, *others)] == ["x", "x2", "x3"]
        for one in others:
            assert decoded(one.source).min() >= 127 and decoded(one.source).ndim == 2
    (first, *_) = image_map(image_flow(), image=torch.linspace(-3, 5, 96).reshape(1, 8, 12)).layout.images
    assert decoded(first.source)[0, 0] == 0 and decoded(first.source)[-1, -1] == 255


@pytest.mark.parametrize(
    "image", [torch.zeros(4, 8, 8), torch.full((3, 8, 8), torch.nan), "house.png", torch.zeros(8, 8), object()]
)
def test_an_image_that_cannot_be_drawn_is_refused(image: Any) -> None:
    with pytest.raises(InputError, match=r"image_map: image .*give one of Pillow, or an array"):
        image_map(image_flow(), image=image)


@pytest.mark.parametrize("picture", ["house.png", "data:image/png;base64,AAAA", "data:image/png;base64,%%"])
def test_an_image_that_was_damaged_is_named(picture: str) -> None:
    with pytest.raises(InputError, match="the image in this Flow is damaged"):
        image_map(image_flow(picture))


def test_what_cannot_be_drawn_is_named() -> None:
    flow = image_flow()
    with pytest.raises(InputError, match=r"\['\[CLS\]', 'the', 'cat', 'sat'\] …, are no patches of an image"):
        image_map(make_flow())
    with pytest.raises(InputError, match="are no patches"):
        image_map(make_flow(tokens=("[CLS]", "r0c0", "r1c1")))
    with pytest.raises(InputError, match="no layer 9"):
        image_map(flow, layers=9)
    with pytest.raises(InputError, match="no head 9"):
        image_map(flow, head=9)
    with pytest.raises(InputError, match="dst=7 is outside the image's 7 positions"):
        image_map(flow, dst=7)
    with pytest.raises(InputError, match="no destination 0"):
        image_map(flow.select(destinations=(1, 2)))
    with pytest.raises(InputError, match="head=1 picks a head of the 'attn' map"):
        image_map(flow, map="block", head=1)
    with pytest.raises(InputError, match="Unknown map 'mlp'"):
        image_map(flow, map="mlp")
    with pytest.raises(InputError, match="Unknown scale"):
        image_map(flow, scale="all")


def test_a_picture_is_read_back() -> None:
    for channels in (1, 3):
        bytes_ = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
        torch.testing.assert_close(pixels_of(picture_uri(bytes_)), bytes_, rtol=0, atol=0)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    shown = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0))
    values = (shown - mean[:, None, None]) / std[:, None, None]
    found = pixels_of(str(picture_of(values, mean, std)))
    torch.testing.assert_close(found, (shown * 255).round().to(torch.uint8), rtol=0, atol=1)
