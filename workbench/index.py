"""What the index notebook shows: where things stand, the families, the papers, the ledger.

Everything is drawn from the catalogue and the ledger at the moment of the call, and stored as plain
HTML or a picture; the search controls are added only where someone can use them.
"""

from __future__ import annotations

import io
from html import escape
from typing import TYPE_CHECKING, Any

from workbench.lab import catalogue, ledger, paths, show
from workbench.lab.claim_card import COLOURS, number
from workbench.lab.progress import live

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

STATUS_COLOURS = {"done": "#00795c", "partial": "#4a6fa5", "planned": "#9aa3af"}
MARKERS = {"holds": "o", "refuted": "X", "inconclusive": "D"}
REACH = 6.0  # the ledger picture shows effects up to so many half-widths of their interval
_INK = "var(--jp-content-font-color1,#1c1e21)"
_PAPER = "var(--jp-layout-color1,#fff)"
_LINE = "var(--jp-border-color2,#c8ccd2)"
_STYLE = f"""<style>
.wb-scroll {{ max-height: 620px; overflow: auto; border: 1px solid {_LINE}; border-radius: 6px; }}
.wb-papers {{ border-collapse: collapse; table-layout: auto !important; width: 100%;
  margin: 0 !important; color: {_INK}; background: {_PAPER}; }}
.wb-papers th, .wb-papers td {{ text-align: left !important; vertical-align: top !important;
  padding: 5px 12px !important; border-bottom: 1px solid {_LINE}; font-size: 13px;
  line-height: 1.4; white-space: normal !important; max-width: none !important; }}
.wb-papers th {{ position: sticky; top: 0; background: {_PAPER}; }}
.wb-papers small {{ opacity: .75; }}
.wb-papers td.wb-fixed {{ white-space: nowrap !important; }}
</style>"""


def frame() -> pd.DataFrame:
    """The catalogue's overview, with addresses of section and module ("" where there is none)."""
    papers = catalogue.overview()
    names = list(zip(papers["family"], papers["slug"], strict=True))
    lacks = [missing.split(", ") for missing in papers["missing"]]
    papers["section"] = [
        "" if "section" in missing else f"{family}.ipynb#{slug}"
        for (family, slug), missing in zip(names, lacks, strict=True)
    ]
    papers["module"] = [
        "" if "module" in missing
        else f"../{catalogue.module_file(*name).relative_to(paths.root()).as_posix()}"
        for name, missing in zip(names, lacks, strict=True)
    ]  # fmt: skip
    return papers


def standing() -> None:
    """One sentence: how many papers are listed, done, judged, and with which verdict."""
    papers = frame()
    status = papers["status"].value_counts()
    verdict = papers["verdict"].value_counts()
    words = {"holds": "hold", "refuted": "refuted", "inconclusive": "inconclusive"}
    told = [f"{verdict.get(name, 0)} {said}" for name, said in words.items()]
    judged = int(sum(verdict.get(name, 0) for name in words))
    text = (
        f"{len(papers)} papers in {papers['family'].nunique()} families; {status.get('done', 0)} "
        f"done, {status.get('partial', 0)} begun. {judged} central claims judged so far: "
        f"{', '.join(told)}."
    )
    show.bundle(text, html=f'<p style="font-size:115%;margin:6px 0">{escape(text)}</p>')


def families() -> None:
    """The families as a map: a card each, a square for each paper in the colour of its state."""
    papers, cards, lines = frame(), [], []
    for _, family in catalogue.families().iterrows():
        mine = papers[papers["family"] == family["slug"]]
        there = catalogue.notebook_file(family["slug"]).exists()
        name = escape(family["title"])
        if there:
            name = catalogue.link(f"{family['slug']}.ipynb", family["title"])
        squares = "".join(_square(row) for _, row in mine.iterrows())
        cards.append(
            f'<div style="border:1px solid {_LINE};border-radius:6px;padding:10px 12px;'
            f'background:{_PAPER};color:{_INK}"><div style="font-size:110%">'
            f'<span style="opacity:.6">{family["order"]}</span> <strong>{name}</strong></div>'
            f'<div style="font-size:90%;line-height:1.35;margin:4px 0 8px">'
            f"{escape(family['description'])}</div><div>{squares}</div></div>"
        )
        lines.append(
            f"{family['order']:2d} {family['title']} ({len(mine)}): {family['description']}"
        )
    grid = (
        '<div style="display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));'
        f'gap:10px;margin:8px 0">{"".join(cards)}</div>{_legend()}'
    )
    show.bundle("\n".join(lines), html=grid)


def _colour(row: pd.Series) -> str:
    return COLOURS[row["verdict"]] if row["verdict"] else STATUS_COLOURS[row["status"]]


def _square(row: pd.Series) -> str:
    told = row["verdict"] or row["status"]
    fill = _colour(row) if told != "planned" else "transparent"
    box = (
        f'<span title="{escape(row["title"])} ({told})" style="display:inline-block;width:13px;'
        f"height:13px;margin-right:4px;border-radius:3px;background:{fill};"
        f'border:1.5px solid {_colour(row)}"></span>'
    )
    return f'<a href="{escape(row["section"])}">{box}</a>' if row["section"] else box


def _legend() -> str:
    kinds = {**{v: COLOURS[v] for v in ledger.JUDGED}, "begun": STATUS_COLOURS["partial"]}
    keys = "".join(
        f'<span style="white-space:nowrap;margin-right:16px"><span style="display:inline-block;'
        f'width:11px;height:11px;border-radius:3px;background:{colour};margin-right:5px">'
        f"</span>{name}</span>"
        for name, colour in kinds.items()
    )
    return f'<div style="font-size:90%;color:{_INK}">{keys}empty: planned</div>'


def table_html(papers: pd.DataFrame) -> str:
    """Papers as an HTML table; links are relative to ``notebooks/``."""
    rows = []
    for _, row in papers.iterrows():
        links = [catalogue.link(row["section"], "section")] if row["section"] else []
        if row["module"]:
            links.append(catalogue.link(row["module"], "module"))
        if row["code"]:
            links.append(catalogue.link(f"https://github.com/{row['code']}", "authors' code"))
        title = escape(row["title"])
        if row["arxiv"]:
            title = catalogue.link(f"https://arxiv.org/abs/{row['arxiv']}", row["title"])
        verdict = catalogue.badge(row["verdict"]) if row["verdict"] else ""
        rows.append(
            f"<tr><td>{title} ({row['year']})<br><small>{escape(row['summary'])}</small></td>"
            f"<td>{escape(row['family_title'])}</td><td>{row['status']}</td>"
            f'<td class="wb-fixed">{verdict}</td>'
            f'<td class="wb-fixed">{"<br>".join(links)}</td></tr>'
        )
    heads = "".join(f"<th>{h}</th>" for h in ("Paper", "Family", "Status", "Verdict", "Open"))
    return (
        f'{_STYLE}<div class="wb-scroll"><table class="wb-papers"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def table() -> None:
    """All papers; with a search box and three choices above the table where a kernel is live."""
    papers = frame()
    if not live():
        text = "\n".join(f"{r.slug}: {r.title} ({r.year}), {r.status} {r.verdict}".rstrip()
                         for r in papers.itertuples())  # fmt: skip
        show.bundle(text, html=table_html(papers))
        return
    from IPython.display import HTML, display

    controls, chosen, said = _controls(papers)
    display(controls)
    handle = display(HTML(table_html(papers)), display_id=True)

    def redraw(_: Any = None) -> None:
        found = catalogue.select(
            papers, **{name: control.value for name, control in chosen.items()}
        )
        said.value = f"{len(found)} of {len(papers)}"
        handle.update(HTML(table_html(found)))

    for control in chosen.values():
        control.observe(redraw, names="value")


def _controls(papers: pd.DataFrame) -> tuple[Any, dict[str, Any], Any]:
    """The box of controls, the controls by what they choose, and the label that counts."""
    import ipywidgets as widgets

    wide = widgets.Layout(width="260px")
    titles = papers.drop_duplicates("family").set_index("family")["family_title"]
    options = {
        "family": [("all families", ""), *((title, slug) for slug, title in titles.items())],
        "status": [("any status", ""), *((word, word) for word in catalogue.WORDS)],
        "verdict": [("any verdict", ""), *((v, v) for v in ledger.JUDGED), ("no verdict", "none")],
    }
    chosen: dict[str, Any] = {
        "text": widgets.Text(placeholder="search title, summary, arXiv id …", layout=wide)
    }
    for name, choices in options.items():
        layout = widgets.Layout(width="200px" if name == "family" else "130px")
        chosen[name] = widgets.Dropdown(options=choices, value="", layout=layout)
    said = widgets.Label(f"{len(papers)} of {len(papers)}")
    box = widgets.HBox([*chosen.values(), said], layout=widgets.Layout(flex_flow="row wrap"))
    return box, chosen, said


def ledger_picture() -> None:
    """The ledger as one picture: the central claim of each judged paper, effect and interval."""
    import matplotlib.pyplot as plt

    judged = catalogue.verdicts()
    figure = forest(judged)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    plt.close(figure)
    lines = [f"{slug}: {row['verdict']}; {catalogue.verdict_sentence(row)}"
             for slug, row in judged.iterrows()]  # fmt: skip
    text = "\n".join(lines) or "No claim has been recorded yet."
    show.bundle(text, png=out.getvalue(), alt=f"The ledger: {headline(judged)}")


def headline(judged: pd.DataFrame) -> str:
    """What the ledger says, in one sentence."""
    if judged.empty:
        return "No claim has been recorded yet"
    holds = int((judged["verdict"] == "holds").sum())
    refuted = int((judged["verdict"] == "refuted").sum())
    open_ = len(judged) - holds - refuted
    return (
        f"Of {len(judged)} central claims, {holds} hold{'s' if holds == 1 else ''}, {refuted} "
        f"{'is' if refuted == 1 else 'are'} refuted, {open_} inconclusive"
    )


def forest(judged: pd.DataFrame) -> Figure:
    """Effects on one scale: distance from the claim's margin in half-widths of its interval.

    Args:
        judged: as ``catalogue.verdicts`` gives them, in reading order.
    """
    import matplotlib.pyplot as plt

    from workbench import plots

    with plots.style():
        figure, axes = plt.subplots(figsize=(9.5, 1.7 + 0.3 * max(2, len(judged))))
        axes.set_title(headline(judged))
        axes.axvline(0, color="#1F2933", linewidth=1)
        axes.set_xlim(-REACH, REACH)
        axes.set_ylim(max(2, len(judged)) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(
            "effect beyond the claim's margin, in half-widths of its 95% interval\n"
            "← against the paper        for the paper →"
        )
        axes.set_yticks(range(len(judged)), list(judged.index))
        for y, (_, row) in enumerate(judged.iterrows()):
            _draw_claim(axes, y, row)
        if judged.empty:
            axes.text(0.5, 0.5, "workbench run calibration --record", transform=axes.transAxes,
                      ha="center", va="center", color="#5B6470", family="monospace",
                      bbox={"color": "white", "pad": 6})  # fmt: skip
        figure.legend(handles=_keys(), loc="outside lower center", ncols=3)
    return figure


def _keys() -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], marker=MARKERS[name], color=COLOURS[name], label=name, markersize=7)
        for name in ledger.JUDGED
    ]


def _draw_claim(axes: Any, y: int, row: pd.Series) -> None:
    colour, marker = COLOURS[row["verdict"]], MARKERS[row["verdict"]]
    half = (row["high"] - row["low"]) / 2
    if row["kind"] == "identity" or not half > 0:
        exact = row["kind"] == "identity" or row["effect"] == row["margin"]
        x = 0.0 if exact else REACH * (1 if row["effect"] > row["margin"] else -1)
        said = "equality" if row["kind"] == "identity" else "the same in every pair"
        axes.plot([x], [y], marker=marker, color=colour, markersize=8, clip_on=False)
        told = f"{said}; {catalogue.verdict_sentence(row).partition(';')[0]}"
    else:
        low, x, high = ((row[name] - row["margin"]) / half for name in ("low", "effect", "high"))
        edge = 0.94 * REACH
        bar = [min(max(end, -REACH), REACH) for end in (low, high)]
        axes.plot(bar, [y, y], color=colour, linewidth=2.5)
        axes.plot([min(max(x, -edge), edge)], [y], marker=marker, color=colour, markersize=8)
        if abs(x) > edge:  # the dot lies further out than the axis reaches
            far = REACH if x > 0 else -REACH
            axes.plot([far], [y], marker=">" if x > 0 else "<", color=colour, clip_on=False)
        unit = f" {row['unit']}" if row["unit"] else ""
        told = f"{number(row['effect'])}{unit} ({number(row['low'])} to {number(row['high'])})"
    axes.annotate(
        told, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8.5,
        color="#5B6470", annotation_clip=False,
    )  # fmt: skip
