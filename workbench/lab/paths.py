"""Where things lie: the repository, the result cache, the user's data.

Each folder can be moved by an environment variable, so that tests and shared machines need no
change of code.
"""

from __future__ import annotations

import os
from pathlib import Path


def root() -> Path:
    """Folder that holds ``notebooks/`` and ``data/``: ``WORKBENCH_HOME``, else the checkout."""
    home = os.environ.get("WORKBENCH_HOME")
    if home:
        return Path(home).expanduser().resolve()
    return Path(__file__).resolve().parents[2]


def cache() -> Path:
    """Folder of recomputable results: ``WORKBENCH_CACHE``, else ``.cache`` in the checkout.

    The folder is named, not made: whoever writes to it makes it.
    """
    folder = os.environ.get("WORKBENCH_CACHE")
    return Path(folder).expanduser().resolve() if folder else root() / ".cache"


def user_data() -> Path:
    """Folder for what ``workbench data get`` brings: one a user, shared by all checkouts."""
    import platformdirs

    return Path(platformdirs.user_data_dir("paper-workbench"))
