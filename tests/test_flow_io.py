"""A Flow on disk and in other formats: the same numbers come back, and bad files are clear errors."""

import errno
import json
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from flows import TOKENS, make_flow
from plot_cases import metric_flow
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import tiny_bridge

import lig_lens
from lig_lens.errors import FlowFileError, InputError, MissingPackageError
from lig_lens.files import check_writable, write_atomic
from lig_lens.flow import file as flow_io
from lig_lens.flow.flow import Flow

LABELS = ("tokens", "special", "layers", "destinations", "model_name", "settings", "layouts", "engines", "metric")


@pytest.mark.parametrize("maps", [("attn", "mlp", "block"), ("attn",), ("mlp",), ("block",)])
def test_save_and_load_give_the_same_flow(tmp_path, maps):
    flow = make_flow(maps=maps, destinations=(1, 4), settings={"tol": 1e-3, "text": "Ünï → <b>", "n": None})
    flow.save(tmp_path / "flow.safetensors")
    again = Flow.load(tmp_path / "flow.safetensors")
    for name in LABELS:
        assert getattr(again, name) == getattr(flow, name)
    for name in ("attn", "mlp", "skip", "bias", "block"):
        ours, theirs = getattr(flow, name), getattr(again, name)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    for group in ("total", "gap", "converged"):
        for name in maps:
            assert torch.equal(getattr(flow, group)[name], getattr(again, group)[name])
    assert os.listdir(tmp_path) == ["flow.safetensors"]


def test_a_selection_that_shares_memory_can_be_saved(tmp_path):
    flow = make_flow()
    flow.select(layers=(3,)).save(tmp_path / "a.safetensors")
    assert Flow.load(tmp_path / "a.safetensors").layers == (3,)


@pytest.mark.parametrize(
    ("name", "flow"),
    [("flow_v1", make_flow()), ("flow_v1_metric", metric_flow(("a", "b", "c"), metric="m"))],
)
def test_files_of_schema_1_stay_readable(tmp_path, name, flow):
    path = Path(__file__).parent / "data" / f"{name}.safetensors"
    again = Flow.load(path)
    assert type(again) is Flow
    for label in LABELS:
        assert getattr(again, label) == getattr(flow, label)
    for part in ("attn", "mlp", "skip", "bias", "block"):
        assert (getattr(again, part) is None) == (getattr(flow, part) is None)
        if getattr(flow, part) is not None:
            assert torch.equal(getattr(again, part), getattr(flow, part))
    for group in ("total", "gap", "converged"):
        for map_name in flow.maps:  # sums, which another machine may round otherwise
            torch.testing.assert_close(getattr(again, group)[map_name], getattr(flow, group)[map_name])
    # What is written today is the same, with a checksum.
    again.save(tmp_path / "again.safetensors")
    (old, tensors), (new, others) = read_raw(path), read_raw(tmp_path / "again.safetensors")
    assert len(new.pop("sha256")) == 64
    assert json.loads(new["lig_lens"]) == json.loads(old["lig_lens"]) | {"checksummed": True}
    assert tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


def read_raw(path):
    with safe_open(path, framework="pt") as stored:
        return stored.metadata(), {name: stored.get_tensor(name).clone() for name in stored.keys()}


def _rewrite_header(path, change):
    """As a file of before there were checksums."""
    metadata, tensors = read_raw(path)
    header = json.loads(metadata["lig_lens"])
    del header["checksummed"]
    change(header, tensors)
    save_file(tensors, path, metadata={"lig_lens": json.dumps(header)})


def _set(**values):
    return lambda header, tensors: header.update(values)


DAMAGES = [
    (_set(schema_version=2), "schema version 2, and this lig_lens reads up to 1: update it"),
    (_set(schema="other"), "damaged Flow header .*schema 'other'"),
    (_set(schema_version="1"), "damaged Flow header"),
    (_set(tokens=[1, 2]), "damaged Flow header .*tokens"),
    (lambda header, tensors: header.pop("layers"), "damaged Flow header .*layers"),
    (_set(layers=[0]), r"is damaged \(Flow: layouts has 2 entries for 1 layers"),
    (lambda header, tensors: tensors.pop("gap.attn"), r"is damaged \(Flow: gap has keys"),
    (lambda header, tensors: tensors.update(extra=torch.zeros(1)), "unexpected tensor 'extra'"),
    (
        lambda header, tensors: tensors.update(attn=tensors["attn"].double()),
        "unexpected tensor 'attn' .*float64",
    ),
    (_set(tokens=["a"], special=[False], destinations=[0]), r"is damaged \(Flow: attn has shape \[2, 3, 7"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGES)
def test_damaged_and_newer_files(tmp_path, change, message):
    path = tmp_path / "flow.safetensors"
    make_flow().save(path)
    _rewrite_header(path, change)
    with pytest.raises(FlowFileError, match=message) as caught:
        Flow.load(path)
    assert str(path) in str(caught.value)


def test_files_that_hold_no_flow(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FlowFileError, match=r"does not exist: give a file that Flow\.save wrote"):
        Flow.load(path)
    with pytest.raises(FlowFileError, match="is a folder"):
        Flow.load(tmp_path)
    for content in (b"", b"hello, this is no safetensors file at all", b"\x80\x04pickle."):
        path.write_bytes(content)
        with pytest.raises(FlowFileError, match="cannot be read as safetensors"):
            Flow.load(path)
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(FlowFileError, match="holds no Flow"):
        Flow.load(path)


def test_a_truncated_file(tmp_path):
    path = tmp_path / "flow.safetensors"
    make_flow().save(path)
    data = path.read_bytes()
    for length in (4, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(FlowFileError, match=r"cannot be read as safetensors|holds no Flow"):
            Flow.load(path)


def test_writing_fails_without_touching_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "flow.bin"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["flow.bin"]


def test_write_keeps_links_and_the_usual_permissions(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomic(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"x"
    usual = tmp_path / "usual"
    usual.write_bytes(b"")
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)
    write_atomic(os.devnull, b"x")


def test_paths_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--out: .* is a folder: give the name of a file in it"):
        check_writable(tmp_path, "--out")
    with pytest.raises(InputError, match=r"the folder .*none' does not exist: create it"):
        check_writable(tmp_path / "none" / "x")
    with pytest.raises(InputError, match="is a file, not a folder"):
        check_writable(tmp_path / "file" / "x")
    with pytest.raises(InputError, match="is a folder"):
        check_writable(".")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match=r"no permission to replace it: choose another path"):
        check_writable(tmp_path / "file")

    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "touch", refused)
    with pytest.raises(InputError, match=r"Permission denied in .*: choose another path"):
        check_writable(tmp_path / "x")


def test_json_follows_its_documented_schema(tmp_path):
    flow = make_flow(destinations=(1, 4))
    text = flow.to_json(tmp_path / "flow.json")
    document = json.loads((tmp_path / "flow.json").read_text(encoding="utf-8"))
    assert document == json.loads(text)
    assert (document["schema"], document["schema_version"]) == ("lig_lens.flow", 1)
    assert set(document) == {
        *("schema", "schema_version", "model_name", "tokens", "special", "layers", "destinations", "metric"),
        *("layouts", "engines", "settings", "maps"),
    }
    assert document["tokens"] == list(TOKENS) and document["destinations"] == [1, 4]
    for name, parts in {"attn": ["attn"], "mlp": ["mlp", "skip", "bias"], "block": ["block"]}.items():
        entry = document["maps"][name]
        assert list(entry["tensors"]) == parts
        for part in parts:
            values = np.array(entry["tensors"][part]["values"], dtype=np.float32)
            np.testing.assert_array_equal(values, getattr(flow, part).numpy())
            assert len(entry["tensors"][part]["axes"]) == values.ndim
        for group in ("total", "gap", "converged"):
            assert np.array(entry["cells"][group]).shape == tuple(flow.gap[name].shape)
        assert entry["cells"]["converged"] == flow.converged[name].tolist()
    assert "mlp" not in json.loads(make_flow(maps=("attn",)).to_json())["maps"]


def test_json_has_null_for_what_is_not_finite():
    flow = make_flow(maps=("block",))
    flow.block[0, 0, 0] = float("inf")
    values = json.loads(flow.to_json(), parse_constant=pytest.fail)["maps"]["block"]["tensors"]["block"]["values"]
    assert values[0][0][0] is None and values[0][0][1] == pytest.approx(float(flow.block[0, 0, 1]))


@pytest.mark.parametrize("name", ["attn", "mlp", "block"])
def test_dataframe_rows_are_contributions(name):
    flow = make_flow(destinations=(1, 4))
    frame = flow.to_dataframe(name)
    assert len(frame) == flow.columns(name).numel()
    shares = flow.shares(name)
    for _, row in frame.sample(20, random_state=0).iterrows():
        layer, dst = flow.layers.index(row["layer"]), flow.destinations.index(row["dst"])
        assert row["dst_token"] == flow.tokens[row["dst"]] and row["src_token"] == flow.tokens[row["src"]]
        if name == "attn":
            index, cell = (layer, row["head"], row["src"], dst), (layer, row["head"], dst)
        elif name == "block":
            index, cell = (layer, row["src"], dst), (layer, dst)
        else:
            part = row["head"] if row["part"] == "head" else {"skip": 3, "bias": 4}[row["part"]]
            index, cell = (layer, part, dst), (layer, dst)
        assert row["contribution"] == float(flow.columns(name)[index])
        assert row["share"] == float(shares[index])
        assert row["gap"] == float(flow.gap[name][cell]) and row["converged"] == bool(flow.converged[name][cell])


def test_dataframe_does_not_alias_the_flow():
    flow = make_flow()
    before = flow.attn.clone()
    frame = flow.to_dataframe()
    frame.loc[:, "contribution"] = 0
    assert torch.equal(flow.attn, before)


def test_xarray_is_labelled():
    flow = make_flow(destinations=(1, 4))
    data = flow.to_xarray()
    assert data["attn"].dims == ("layer", "head", "src", "dst")
    assert float(data["attn"].sel(layer=3, head=2, src=5, dst=4)) == float(flow.attn[1, 2, 5, 1])
    assert float(data["mlp_gap"].sel(layer=3, dst=4)) == float(flow.gap["mlp"][1, 1])
    assert data["dst_token"].values.tolist() == [TOKENS[1], TOKENS[4]]
    assert json.loads(data.attrs["settings"]) == flow.settings


@pytest.mark.parametrize(
    ("package", "call", "extra"),
    [("pandas", "to_dataframe", "dataframe"), ("xarray", "to_xarray", "xarray")],
)
def test_missing_extras_name_the_command(monkeypatch, package, call, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=f"pip install {package}"):
        getattr(make_flow(), call)()


def test_streaming_gives_the_same_flow(tmp_path: Path) -> None:
    model, ids, path = tiny_bridge("llama"), [5, 12, 30, 7], tmp_path / "flow.safetensors"
    kept = lig_lens.attribute(model, ids, progress=False)
    streamed = lig_lens.attribute(model, ids, progress=False, out=path)
    saved = kept.save(tmp_path / "saved.safetensors")
    for flow in (streamed, Flow.load(path)):
        assert flow.to_json() == kept.to_json()
    with safe_open(path, "pt") as one, safe_open(saved, "pt") as other:
        assert one.metadata() == other.metadata() and set(one.keys()) == set(other.keys())
    assert {p.name for p in tmp_path.iterdir()} == {"flow.safetensors", "saved.safetensors"}


def test_streaming_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "flow.safetensors"
    path.write_bytes(b"old")
    put, calls = flow_io.GrowingFile.put, []

    def fail_late(self: flow_io.GrowingFile, *args: object) -> None:
        calls.append(put(self, *args))
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(flow_io.GrowingFile, "put", fail_late)
    with pytest.raises(KeyboardInterrupt):
        lig_lens.attribute(tiny_bridge("llama"), [5, 12, 30], progress=False, out=path)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["flow.safetensors"]


def test_streaming_refuses_what_it_cannot_write_before_any_work(tmp_path: Path) -> None:
    model = tiny_bridge("llama")
    with pytest.raises(InputError, match="out is one file, for one prompt"):
        lig_lens.attribute(model, ["w1", "w2"], out=tmp_path / "flow.safetensors")
    with pytest.raises(InputError, match=r"out: cannot write .* does not exist"):
        lig_lens.attribute(model, "w1", out=tmp_path / "none" / "flow.safetensors")
