"""A small repository to build a site from: three families, five papers, two notebooks.

Loaded by path from the tests of this folder and from the browser tests.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import nbformat
from nbformat import v4

from workbench.lab.show import CLAIM, EXPLORER

HOSTILE = "<img src=x onerror=alert(1)>"
FAMILIES = """slug,order,title,description
calibration,1,Calibration,Numbers a model gives about itself.
losses,2,Losses,"We train on one function & are judged by another."
convolution,3,Convolution,What a filter is.
"""
PAPERS = f"""family,order,slug,title,year,arxiv,code,summary,seeds,status
calibration,1,temperature,Temperature & Other,2017,1706.04599,gpleiss/scaling,One number,001,planned
calibration,2,beta_cal,Beta calibration,2017,1700.00001,,Three numbers for two classes,001,planned
losses,1,focal,Focal loss,2017,1708.02002,,Down-weights what is easy,002,planned
losses,2,dice,{HOSTILE},2019,1911.02855,,Overlap as a loss,002,planned
convolution,1,gabor,Gabor filters,2016,1600.00002,,Filters with a formula,003,planned
"""
DISAGREEMENTS = f"""paper,what,paper_says,code_does,largest_difference,source,decided
temperature,Search for $T$,"Newton, $\\hat T=\\arg\\min_T L$","`LBFGS`, {HOSTILE}",2e-6 in $T$,\
gpleiss/scaling:scaling.py,the closed bracket
"""
TIMINGS = """family,scale,device,seconds,peak_mb,disk_mb,cores,date
calibration,laptop,cpu,312.4,900,1.2,2,2026-11-02
"""
SCRIPT = """function(controls, data) {
  return {x: data.x, y: data.x.map(function (v) { return Math.pow(v, controls.power); }),
          last: Math.pow(0.5, controls.power)};
}"""


def claim(**changes: Any) -> dict[str, Any]:
    """A judged claim as a notebook stores it."""
    base = {
        "paper": "temperature", "claim": "main", "scale": "laptop", "device": "cpu",
        "data": "digits", "kind": "claim", "central": True, "verdict": "holds",
        "statement": "one temperature lowers ECE", "ours": 0.02, "baseline": 0.06, "effect": 0.04,
        "low": 0.03, "high": 0.05, "n": 10, "better": "lower", "margin": 0.0, "interval": "t",
        "unit": "ECE", "protocol": "15 bins", "published": 0.01, "seeds": [0, 1], "seed": 0,
        "digest": "", "hardware": "2 cores", "versions": {"numpy": "2.4.6", "torch": "2.13.0"},
        "date": "2026-11-01",
    }  # fmt: skip
    return base | changes


def payload() -> dict[str, Any]:
    """An explorer's exported face."""
    import numpy as np

    from workbench.plots.explorer import Axis, Explorer, Line, Panel, Readout, Slider

    x = np.linspace(0, 1, 21)
    return Explorer(
        name="calibration.power",
        title="A power bends the line",
        controls=[Slider("power", "Power", 0.2, 5.0, step=0.1, value=1.0)],
        compute=lambda power: {"x": x, "y": x**power, "last": 0.5**power},
        panels=[Panel("Curve", x=Axis("x", (0, 1)), y=Axis("y", (0, 1)), draws=[Line("x", "y")])],
        readouts=[Readout("last", "At one half", ".3f")],
        script=SCRIPT,
        data={"x": x},
    ).export()


def png(width: int = 40, height: int = 30) -> str:
    """A small picture, as notebooks store it."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def display(data: dict[str, Any], metadata: dict[str, Any] | None = None) -> Any:
    return v4.new_output("display_data", data=data, metadata=metadata or {})


def code(source: str, *outputs: Any, tags: tuple[str, ...] = ()) -> Any:
    return v4.new_code_cell(source, outputs=list(outputs), metadata={"tags": list(tags)})


def calibration() -> nbformat.NotebookNode:
    """A notebook with everything a page must show."""
    md = v4.new_markdown_cell
    return v4.new_notebook(
        cells=[
            md("# Calibration\n\nWhat *0.9* means. Next: [losses](losses.ipynb#focal-loss)."),
            code("scale = 'smoke'", tags=("parameters",)),
            code("hidden_check()", tags=("remove-cell",)),
            md('<a id="temperature"></a>\n## 1. Temperature <em>scaling</em>\n\nInline '
               "$\\hat p=\\mathrm{softmax}(z/T)$ and\n\n$$T^\\star=\\arg\\min_{T>0} L(T)$$\n\n"
               "See [our module](../workbench/calibration/temperature.py)."),
            code("run.claim(...)", display({CLAIM: claim(), "text/html": "<p>card</p>",
                                            "text/plain": "card"})),
            code("explore()", display({EXPLORER: payload(), "image/png": png(),
                                       "text/plain": "Explorer"})),
            code("frame", display({"text/html": "<table border='1' class='dataframe'><tr><td>1"
                                   "</td></tr></table>", "text/plain": "1"})),
            code("plot()", display({"image/png": png(64, 48), "text/plain": "<Figure size 64x48>"},
                                   {"image/png": {"alt": 'ECE "falls" with T'}})),
            md('## 2. Beta calibration <a id="beta_cal"></a>\n\n<details><summary>Question'
               "</summary>\n\nWhen $T<1$?\n\n</details>\n\nAfter."),
        ]
    )  # fmt: skip


def losses() -> nbformat.NotebookNode:
    """A notebook of dead things."""
    return v4.new_notebook(
        cells=[
            v4.new_markdown_cell("# Losses\n\n$\\unknowncommand{x}$ and [gone](nowhere.ipynb)"),
            code("w", display({"application/vnd.jupyter.widget-view+json": {"model_id": "m"},
                               "text/plain": "IntSlider()"})),
            code("j", display({"application/javascript": "alert(1)", "text/plain": "<js>"})),
            code("h", display({"text/html": "<p onclick='a()'>kept</p><script>alert(1)</script>"
                               "<button>Run</button><img src='https://elsewhere.example/a.png'>"})),
            code("p", display({"image/png": png(), "text/plain": "<Figure size 1x1>"})),
            code("print(1)", v4.new_output("stream", name="stdout", text=HOSTILE + "\n")),
            v4.new_markdown_cell("## Focal loss\n\n## Focal loss"),
        ],
        metadata={"widgets": {"application/vnd.jupyter.widget-state+json": {"state": {}}}},
    )  # fmt: skip


def home(folder: Path) -> Path:
    """The small repository below ``folder``; ``WORKBENCH_HOME`` is to be set to it."""
    (folder / "data").mkdir(parents=True)
    (folder / "notebooks").mkdir()
    (folder / "workbench" / "calibration").mkdir(parents=True)
    for name, text in {
        "families.csv": FAMILIES,
        "papers.csv": PAPERS,
        "disagreements.csv": DISAGREEMENTS,
        "timings.csv": TIMINGS,
    }.items():
        (folder / "data" / name).write_text(text, encoding="utf8")
    module = folder / "workbench" / "calibration" / "temperature.py"
    module.write_text('"""One number."""\n\n\ndef scale(z, t):\n    return z / t  # <T>\n')
    for name, notebook in {"calibration": calibration(), "losses": losses()}.items():
        text = nbformat.writes(notebook)
        (folder / "notebooks" / f"{name}.ipynb").write_text(text, encoding="utf8")
    index = v4.new_notebook(cells=[v4.new_markdown_cell("# Index")])
    (folder / "notebooks" / "index.ipynb").write_text(json.dumps(index), encoding="utf8")
    return folder
