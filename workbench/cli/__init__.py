"""What a person types: ``workbench`` or ``python -m workbench``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; says what to install where a library it needs is missing."""
    try:
        from workbench.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "workbench":
            raise
        sys.exit(
            f"The command line needs {error.name!r}, which is not installed here. "
            'Install the extra: pip install "paper-workbench[lab]"'
        )
    app()
