"""Results on disk, one file each, so that a killed run goes on where it was.

A file is a numpy archive without pickled objects; its zip checksums reveal a truncated or damaged
one. Writing goes through a temporary file and a rename: two processes on one folder at worst do the
same work twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

from workbench.lab import paths

Result = dict[str, Any]

_refused: set[Path] = set()  # folders that could not be written: one warning each


def key(*parts: str) -> str:
    """One digest out of several."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _path(name: str, digest: str, folder: Path | None) -> Path:
    return (folder or paths.cache()) / "results" / name / f"{digest}.npz"


def load(name: str, digest: str, folder: Path | None = None) -> Result | None:
    """Stored result, or None; a damaged file is reported and counts as absent."""
    import numpy as np

    path = _path(name, digest, folder)
    try:
        with np.load(path, allow_pickle=False) as archive:
            plain = json.loads(archive["plain"].tobytes())
            return {k: archive[f"array_{k}"] if v == ["array"] else v for k, v in plain.items()}
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        warnings.warn(
            f"cached result {path.name} of {name} is damaged ({type(error).__name__}); "
            "it is computed again",
            stacklevel=2,
        )
        return None


def store(name: str, digest: str, result: Result, folder: Path | None = None) -> bool:
    """Write a result; returns False, with one warning a folder, when it cannot be written."""
    import numpy as np

    arrays = {k: v for k, v in result.items() if isinstance(v, np.ndarray)}
    plain = {k: ["array"] if k in arrays else v for k, v in result.items()}
    text = np.frombuffer(json.dumps(plain).encode(), dtype=np.uint8)
    path = _path(name, digest, folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                named: dict[str, Any] = {f"array_{k}": v for k, v in arrays.items()}
                np.savez(file, plain=text, **named)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        home = folder or paths.cache()
        if home not in _refused:
            _refused.add(home)
            warnings.warn(
                f"the cache cannot be written ({error.strerror or error}); results are kept in "
                "memory only and an interrupted run starts over",
                stacklevel=2,
            )
        return False
    return True


def plain(result: Any, where: str) -> Result:
    """Check and simplify what an experiment returned.

    Args:
        result: a dictionary of numbers, strings and arrays.
        where: which call it came from, for the error message.

    Raises:
        TypeError: it is no dictionary, or a value is of a kind a result file cannot hold.
    """
    import numpy as np
    import torch

    if not isinstance(result, dict):
        raise TypeError(f"{where}: expected a dictionary, got {type(result).__name__}")
    out: Result = {}
    for name, value in result.items():
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().numpy()
        if isinstance(value, list | tuple):
            value = np.asarray(value)
        if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
            value = value.item()
        ok = value is None or isinstance(value, bool | int | float | str)
        if not ok and not (isinstance(value, np.ndarray) and value.dtype.kind in "biufU"):
            raise TypeError(
                f"{where}: {name!r} is a {type(value).__name__}; expected a number, a string or "
                "an array"
            )
        out[str(name)] = value
    return out
