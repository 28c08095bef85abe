"""Both sides of a comparison timed in turn, and peaks of memory."""

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MIB = 2**20


def peak_memory(run: Callable[[], Any], device: torch.device) -> tuple[Any, dict[str, float | None]]:
    """Run once; give the result and the peaks of memory above what was held before, in MiB.

    Linux reports the peak of a process's resident memory, CUDA devices their allocator's; None elsewhere.
    Not to be timed: memory that the process kept from earlier runs is handed back before, so it has to be
    asked for again.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device) if on_gpu else 0
    _hand_back()
    before = _resident("VmRSS") if _reset_peak() else None
    result = run()
    finish(device)
    after = _resident("VmHWM")
    return result, {
        "resident_peak_mib": None if before is None or after is None else max(0.0, after - before),
        "gpu_peak_mib": (torch.cuda.max_memory_allocated(device) - held) / MIB if on_gpu else None,
    }


def _hand_back() -> None:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(name: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name)), None)


@dataclass
class Side:
    """One side of a comparison: what to run, how often per round, the seconds of every run and its last result."""

    run: Callable[[], Any]
    per_round: int = 1
    seconds: list[float] = field(default_factory=list)
    result: Any = None

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)

    def once(self, device: torch.device) -> float:
        """Run once; the seconds it took, the device's work included."""
        finish(device)
        start = time.perf_counter()
        self.result = self.run()
        finish(device)
        return time.perf_counter() - start

    def record(self) -> dict[str, float | int]:
        """Milliseconds: median, fastest and slowest run."""
        return {
            "ms": 1e3 * self.median,
            "ms_min": 1e3 * min(self.seconds),
            "ms_max": 1e3 * max(self.seconds),
            "repeats": len(self.seconds),
        }


def alternate(sides: Sequence[Side], repeats: int, device: torch.device, patience: float = float("inf")) -> None:
    """Time every side `repeats` times in turn (A, B, A, B, …), so that a slow spell of the machine hits all.

    Warm up before. A side that has spent `patience` seconds is timed no more, but once at least.
    """
    for _ in range(repeats):
        for side in sides:
            if sum(side.seconds) <= patience:
                side.seconds += [side.once(device) for _ in range(side.per_round)]


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
