"""Files are written whole or not at all, whatever happens meanwhile, and nothing is left over for long."""

import errno
import os
from pathlib import Path

import pytest
from flows import make_flow

import lig_lens
from lig_lens import files
from lig_lens.cli.main import run
from lig_lens.errors import InputError, OutputError


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    with files.replacing(tmp_path / "x") as beside:
        beside.write_bytes(b"mine")
        files.write_atomic(tmp_path / "x", b"other")
        assert beside.read_bytes() == b"mine"
    assert (tmp_path / "x").read_bytes() == b"mine"


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), files.replacing(tmp_path / "x") as beside:
        beside.write_bytes(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "f.safetensors"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OutputError, match=r"Cannot write .*f\.safetensors': No space left on device\. Nothing of it was kept"
    ):
        make_flow().save(path)
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == [path.name]


def test_one_output_that_fails_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace = os.replace

    def no_room_for_flows(source: Path, target: Path) -> None:
        if str(target).endswith(".safetensors"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", no_room_for_flows)
    out, page = tmp_path / "f.safetensors", tmp_path / "f.html"
    arguments = ["explain", "lamp lake mouse lamp", "--model", "induction", "--maps", "attn", "--no-progress"]
    assert run([*arguments, "--out", str(out), "--html", str(page)]) == 1
    said = capsys.readouterr()
    assert "layer" in said.out and str(page) in said.out and page.exists() and not out.exists()
    assert said.err.splitlines()[-1].startswith(f"lig-lens: error: Cannot write {str(out)!r}: No space left on device")


@pytest.mark.parametrize(
    "path, message",
    [
        ("", "the path is empty"),
        ("x" * 300, "File name too long"),
        ("a\0b", "null"),
        ("/proc/x.safetensors", "cannot write '/proc/x.safetensors'"),
        (".", "is a folder"),
        ("no/such/x", "does not exist: create it"),
        ("file/x", "is a file, not a folder"),
    ],
)
def test_paths_that_cannot_be_written_are_refused_before_the_work(
    path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(InputError, match=message):
        files.check_writable(path)
    assert run(["explain", "lamp lake", "--model", "induction", "--out", path]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and line.startswith("lig-lens: error: --out: ")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_name_as_long_as_names_can_be(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    files.write_atomic(path, b"1")
    assert path.read_bytes() == b"1"


def test_outputs_never_take_the_place_of_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow = tmp_path / "f.safetensors"
    make_flow().save(flow)
    before = flow.read_bytes()
    link = tmp_path / "link.html"
    link.symlink_to(flow)
    for page in (flow, link, tmp_path / "." / "f.safetensors"):
        assert run(["view", str(flow), "--html", str(page), "--no-open"]) == 2
        assert "is the file to be shown itself" in capsys.readouterr().err
    config = tmp_path / "c.yaml"
    config.write_text("model: induction\n")
    assert run(["explain", "lamp", "--config", str(config), "--out", str(config)]) == 2
    assert "is the config that was read itself" in capsys.readouterr().err
    assert flow.read_bytes() == before and config.read_text() == "model: induction\n"
    assert lig_lens.Flow.load(flow).tokens
