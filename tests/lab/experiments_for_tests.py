"""Small experiments that the tests of ``lab.run`` send to workers."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


def draw(seed: int, size: int = 64, shift: float = 0.0) -> dict[str, Any]:
    """Mixed computation that depends on generators, threads and reduction order."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(size, size, generator=generator)
    local = torch.randn(size, size) + float(np.random.rand())
    for _ in range(5):
        a = torch.tanh(a @ local / size**0.5) + shift
    return {
        "mean": a.mean().item(),
        "norm": a.norm(),
        "trace": a.diagonal()[:4],
        "name": f"s{seed}",
    }


def count(seed: int, folder: str, wait: float = 0.0) -> dict[str, Any]:
    """Leave one file a call, so that a test can count the calls of all processes."""
    Path(folder, f"{seed}-{os.getpid()}-{time.monotonic_ns()}").touch()
    time.sleep(wait)
    return {"value": float(seed)}


def fail(seed: int) -> dict[str, Any]:
    """Fail on the third seed only."""
    if seed == 2:
        raise ZeroDivisionError("third seed")
    return {"value": seed}
