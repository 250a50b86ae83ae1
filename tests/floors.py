"""The floors of the house as one import-linter contract, for whatever families there are.

import-linter's own contracts name their modules one by one; this one reads the rule off a module's
name, so that a new family is covered on the day it is made.
"""

from __future__ import annotations

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, output

GROUND = {"lab", "plots"}
UPSTAIRS = {"cli", "site", "index", "__main__"}
DRAWING = {"matplotlib", "plotly", "ipywidgets", "anywidget", "IPython"}
# Modules of the ground that draw or talk to a front end, and load those libraries only when used.
LAZY = ("workbench.lab.show", "workbench.lab.progress")


def floor(module: str) -> tuple[str, int] | None:
    """Family and floor of a module: 0 methods, 1 experiments, 2 figures; None outside families."""
    parts = module.split(".")
    if len(parts) < 2 or parts[0] != "workbench" or parts[1] in GROUND | UPSTAIRS:
        return None
    if len(parts) == 2:
        return parts[1], 3  # the package itself, which offers all of its floors
    name = parts[2]
    return parts[1], 2 if name.startswith("figures") else 1 if name == "experiments" else 0


def broken(importer: str, imported: str) -> str | None:
    """Rule that one import breaks, in words, or None."""
    here, there = floor(importer), floor(imported)
    library = imported.split(".")[0]
    if here and imported.startswith("workbench.plots") and here[1] < 2:
        return "a method or experiment plots"
    if here and library in DRAWING and here[1] < 2:
        return "a method or experiment needs a drawing library"
    if importer.startswith("workbench.lab") and library in DRAWING and importer not in LAZY:
        return "lab needs a drawing library"
    if here and imported.split(".")[1:2] and imported.split(".")[1] in UPSTAIRS:
        return "a family reaches upstairs"
    if there and not here and importer.split(".")[1:2] and importer.split(".")[1] in GROUND:
        return "the ground knows a family"
    if here and there and here[0] != there[0]:
        return "one family imports another"
    if here and there and here[1] < there[1] < 3:
        return "an import points upward"
    return None


class Floors(Contract):
    """Figures over experiments over methods; families apart; methods never plot."""

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Look at every direct import of this package."""
        found = [
            f"{importer} imports {imported}: {rule}"
            for importer in sorted(graph.modules)
            if importer.startswith("workbench")
            for imported in sorted(graph.find_modules_directly_imported_by(importer))
            if (rule := broken(importer, imported))
        ]
        return ContractCheck(kept=not found, metadata={"found": found})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """One line an import."""
        for line in check.metadata["found"]:
            output.print_error(line)
