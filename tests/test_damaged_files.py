"""A Flow file that was changed after it was written is never shown as if it were whole."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from flows import make_flow
from safetensors.torch import save_file
from test_flow_io import read_raw

import lig_lens
from lig_lens.errors import FlowFileError
from lig_lens.flow.data import FlowData
from lig_lens.flow.file import growing
from lig_lens.flow.header import LABELS

DAMAGES = int(os.environ.get("LIG_LENS_DAMAGES", "300"))


def same(one: FlowData, other: FlowData) -> bool:
    names = ("tokens", "special", "layers", "destinations", "model_name", "settings", "layouts", "engines", "metric")
    tensors = ("attn", "mlp", "skip", "bias", "block")
    return (
        all(getattr(one, name) == getattr(other, name) for name in names)
        and all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors)
        and all(torch.equal(one.total[name], other.total[name]) for name in one.maps)
        and all(torch.equal(one.gap[name], other.gap[name]) for name in one.maps)
    )


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A bit turned, a byte changed, a piece overwritten, moved, cut out, put in, or cut off; anywhere in the file."""
    head = 8 + int.from_bytes(data[:8], "little")
    at = rng.randrange(head) if rng.random() < 0.5 else rng.randrange(head, len(data))
    size = rng.randint(1, 64)
    piece, after = data[at : at + size], data[at + size :]
    return {
        "bit": lambda: data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :],
        "byte": lambda: data[:at] + rng.randbytes(1) + data[at + 1 :],
        "zeros": lambda: data[:at] + bytes(len(piece)) + after,
        "turned": lambda: data[:at] + piece[::-1] + after,
        "missing": lambda: data[:at] + after,
        "twice": lambda: data[:at] + piece + piece + after,
        "end": lambda: data[:at],
    }[rng.choice(["bit", "bit", "byte", "zeros", "turned", "missing", "twice", "end"])]()


def test_damages_anywhere(tmp_path: Path) -> None:
    flow, rng, refused = make_flow(), random.Random(0), 0
    data = flow.save(tmp_path / "f.safetensors").read_bytes()
    path = tmp_path / "g.safetensors"
    for _ in range(DAMAGES):
        path.write_bytes(damaged(data, rng))
        try:
            again = lig_lens.Flow.load(path)
        except FlowFileError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert same(again, flow)
    assert refused > 0.9 * DAMAGES


def without_checksum(path: Path, change) -> None:
    metadata, tensors = read_raw(path)
    header = json.loads(metadata["lig_lens"])
    del header["checksummed"]
    change(header, tensors)
    save_file(tensors, path, metadata={"lig_lens": json.dumps(header)})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h, t: t["attn"].view(-1)[5].add_(7.0), r"attn adds up to .* and its total there is"),
        (lambda h, t: t["total.block"].view(-1)[3].mul_(-1), r"block adds up to"),
        (lambda h, t: t["skip"].view(-1)[0].add_(50.0), r"mlp adds up to"),
        (lambda h, t: t["attn"].view(-1)[5].fill_(torch.nan), r"attn adds up to nan"),
        (lambda h, t: t["converged.attn"].fill_(True), r"attn is marked as converged where its gap is above tol=0.001"),
    ],
)
def test_a_file_without_checksum_has_to_add_up(tmp_path: Path, change, message: str) -> None:
    path = make_flow().save(tmp_path / "f.safetensors")
    without_checksum(path, lambda h, t: None)
    assert same(lig_lens.Flow.load(path), make_flow())
    without_checksum_again(path, change)
    with pytest.raises(FlowFileError, match=message):
        lig_lens.Flow.load(path)


def without_checksum_again(path: Path, change) -> None:
    metadata, tensors = read_raw(path)
    change(json.loads(metadata["lig_lens"]), tensors)
    save_file(tensors, path, metadata=metadata)


def test_a_checksum_cannot_be_taken_out(tmp_path: Path) -> None:
    path = make_flow().save(tmp_path / "f.safetensors")
    metadata, tensors = read_raw(path)
    save_file(tensors, path, metadata={"lig_lens": metadata["lig_lens"]})
    with pytest.raises(FlowFileError, match="checksum"):
        lig_lens.Flow.load(path)


def test_a_file_that_grows_by_layers_has_its_checksum(tmp_path: Path) -> None:
    asked = {"maps": ("attn", "block"), "progress": False}
    model, path = lig_lens.load_model("induction"), tmp_path / "f.safetensors"
    lig_lens.attribute(model, "lamp lake mouse lamp", out=path, **asked)
    flow = lig_lens.attribute(model, "lamp lake mouse lamp", **asked)
    saved = flow.save(tmp_path / "g.safetensors")
    assert read_raw(path)[0] == read_raw(saved)[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(FlowFileError, match="checksum"):
        lig_lens.Flow.load(path)


def test_tokens_that_look_like_no_checksum(tmp_path: Path) -> None:
    labels = {name: getattr(make_flow(), name) for name in LABELS} | {"tokens": ("-" * 64, *make_flow().tokens[1:])}
    flow = make_flow()
    tensors = {name: getattr(flow, name) for name in ("attn", "mlp", "skip", "bias", "block")}
    for group in ("total", "gap", "converged"):
        tensors |= {f"{group}.{name}": value for name, value in getattr(flow, group).items()}
    path = tmp_path / "f.safetensors"
    with growing(path, labels, {name: tensor.shape for name, tensor in tensors.items()}) as put:
        for name, tensor in tensors.items():
            for index, layer in enumerate(tensor):
                put(name, index, layer)
    assert lig_lens.Flow.load(path).tokens[0] == "-" * 64
