"""What a build did: pages written, what could not be shown, what failed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Report:
    """The outcome of a build.

    Attributes:
        folder: where the site lies.
        pages: files of the pages, relative to the folder.
        explorers: how many interactive figures work in it.
        warnings: what was left out or is incomplete, each with its notebook.
        failures: notebooks that have no page, with the reason; the others are not affected.
        seconds: how long the build took.
    """

    folder: Path
    pages: list[str] = field(default_factory=list)
    explorers: int = 0
    warnings: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether every notebook has its page."""
        return not self.failures

    def __str__(self) -> str:
        lines = [
            f"{len(self.pages)} pages, {self.explorers} interactive figures "
            f"in {self.folder} ({self.seconds:.1f} s)"
        ]
        lines += [f"failed: {name}: {reason}" for name, reason in self.failures.items()]
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join(lines)
