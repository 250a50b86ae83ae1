"""Random numbers that belong to one computation and leave no trace in the next."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's global generators inside the block, then restore them.

    Meant for what takes no generator of its own, such as the initialisation of torch modules.

    Args:
        seed: any integer; numpy takes it modulo 2**32.
    """
    import numpy as np
    import torch

    python, arrays = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
