"""Full disks, read-only places, kills and several writers, at every write that the code makes."""

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from all_writes import WRITES, write_forever

PROGRAM = Path(__file__).with_name("all_writes.py")
KILLS = int(os.environ.get("LIG_LENS_KILLS", "20"))


def _mounts() -> bool:
    """Whether a process may mount a file system of its own here."""
    if shutil.which("unshare") is None:
        return False
    tried = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(tried, capture_output=True).returncode == 0


@pytest.mark.skipif(not _mounts(), reason="no file system can be mounted here")
@pytest.mark.parametrize(
    "state, raised, says",
    [("full", "OutputError", "No space left on device"), ("read-only", "InputError", "Read-only file system")],
)
def test_no_room_and_no_permission(tmp_path: Path, state: str, raised: str, says: str) -> None:
    """Each write names its file, keeps what was there, and leaves nothing else."""
    place = tmp_path / "small"
    place.mkdir()
    kept = " && ".join(f"echo old > {place}/{name}" for name in WRITES)
    spoil = f"mount -o remount,ro {place}" if state == "read-only" else f"head -c 64k /dev/zero > {place}/rest || true"
    script = (
        f"mount -t tmpfs -o size=64k tmpfs {place} && {kept} && ({spoil}) 2>/dev/null; "
        f"{sys.executable} {PROGRAM} {place} && cat {place}/* | grep -ac ^old && ls -A {place} | grep -v ^rest"
    )
    run = subprocess.run(["unshare", "-rm", "bash", "-c", script], capture_output=True, text=True)
    found, count, *names = run.stdout.splitlines()
    for name, (kind, message) in json.loads(found).items():
        assert kind == raised and name in message and says in message, (name, kind, message, run.stderr)
    assert int(count) == len(WRITES) and sorted(names) == sorted(WRITES)


@contextmanager
def writing(folder: Path) -> Iterator[BaseProcess]:
    """A process that writes all files over and over, killed in the end."""
    process = multiprocessing.get_context("fork").Process(target=write_forever, args=(folder,), daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def test_kills(tmp_path: Path) -> None:
    """Whatever was being written when the process was killed: every file is whole, and the next write tidies up."""
    rng, left = random.Random(0), 0
    for number in range(100 * KILLS):
        if number >= KILLS and left:
            break
        with writing(tmp_path):
            time.sleep(rng.uniform(0.0, 0.2))
        left += sum(file.suffix == ".tmp" for file in tmp_path.iterdir())
        for name, (write, read) in WRITES.items():
            if (tmp_path / name).exists():
                read(tmp_path / name)
            write(tmp_path / name)
        assert sorted(file.name for file in tmp_path.iterdir()) == sorted(WRITES)
    assert left, "no kill hit a write: the test shows nothing"


def test_two_processes_write_the_same_files(tmp_path: Path) -> None:
    """A reader finds each file whole at any moment."""
    with writing(tmp_path) as first, writing(tmp_path) as second:
        until = time.monotonic() + 60
        while not all((tmp_path / name).exists() for name in WRITES):
            assert time.monotonic() < until, "the writers do not write"
            assert first.is_alive() and second.is_alive(), "a writer failed"
        for _ in range(20):
            for name, (_, read) in WRITES.items():
                read(tmp_path / name)
        assert first.is_alive() and second.is_alive(), "a writer failed"
