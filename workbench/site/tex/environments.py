"""Environments of the TeX to MathML converter: matrices, cases, aligned equations."""

from __future__ import annotations

from .parser import DISPLAY, SCRIPT, TEXT, Atom, Parser, TexError, side_by_side

_FENCES = {
    "pmatrix": "()",
    "bmatrix": "[]",
    "Bmatrix": "{}",
    "vmatrix": "||",
    "Vmatrix": "\u2016\u2016",
    "cases": "{ ",
    "rcases": " }",
}
_ALIGNED = {"aligned", "align", "alignedat", "split", "eqnarray", "flalign"}
_CENTRED = {"gather", "gathered", "multline"}
_PLAIN = {"equation", "displaymath", "math"}
_MATRICES = {"matrix", "smallmatrix", "array", "subarray", *_FENCES}


def environment(parser: Parser, name: str, style: int) -> Atom:
    """What stands between ``\\begin{name}`` and ``\\end{name}``."""
    kind = name.rstrip("*")
    if kind in _PLAIN:
        body = parser.row(style, lambda t: t == r"\end")
        _end(parser, name)
        return Atom("ord", body)
    if kind in _ALIGNED:
        inner, columns = DISPLAY, "rl"
        if kind == "alignedat":
            parser.raw()
    elif kind in _CENTRED:
        inner, columns = DISPLAY, "c"
    elif kind in _MATRICES:
        inner = SCRIPT if kind in {"smallmatrix", "subarray"} else TEXT
        columns = "l" if "cases" in kind else "c"
        if kind in {"array", "subarray"}:
            columns = "".join(c for c in parser.raw() if c in "lcr") or "c"
    else:
        raise TexError(f"unknown environment {name}")
    rows = _rows(parser, inner, aligned=kind in _ALIGNED)
    _end(parser, name)
    return Atom(
        "inner" if kind in _FENCES else "ord",
        _fence(_FENCES.get(kind, ""), table(rows, columns, kind, inner)),
    )


def table(rows: list[list[str]], columns: str, kind: str, style: int) -> str:
    """An ``<mtable>``; columns are aligned by classes, since MathML Core has no attribute."""
    aligned = kind in _ALIGNED
    css = "eqn" if aligned or kind in _CENTRED else "cases" if "cases" in kind else "matrix"
    if kind in {"smallmatrix", "subarray", "substack"}:
        css = "small"
    lines = []
    for cells in rows:
        line = []
        for i, cell in enumerate(cells):
            side = columns[i % len(columns)] if aligned else columns[min(i, len(columns) - 1)]
            gap = " gap" if aligned and i and i % 2 == 0 else ""
            line.append(f'<mtd class="{side}{gap}">{cell}</mtd>')
        lines.append(f"<mtr>{''.join(line)}</mtr>")
    display = ' displaystyle="true"' if style == DISPLAY else ""
    level = ' scriptlevel="1"' if style == SCRIPT else ""
    return f'<mtable class="{css}"{display}{level}>{"".join(lines)}</mtable>'


def _rows(parser: Parser, style: int, *, aligned: bool) -> list[list[str]]:
    rows: list[list[str]] = [[]]
    while True:
        atoms = parser.atoms(style, lambda t: t in {"&", r"\\", r"\end", r"\hline", r"\cr"})
        if aligned and len(rows[-1]) % 2 == 1:
            # The relation that opens a right-hand column keeps the space on its left.
            atoms = [Atom("ord", "<mrow></mrow>"), *atoms]
        token = parser.next()
        if token == r"\hline":
            continue
        rows[-1].append(side_by_side(atoms, style))
        if token == r"\end":
            if rows[-1] in ([], ["<mrow></mrow>"]):
                rows.pop()
            return rows
        if token in {r"\\", r"\cr"}:
            if parser.peek() == "[":
                parser.option()
            rows.append([])


def _end(parser: Parser, name: str) -> None:
    if parser.peek() == r"\end":
        parser.next()
    closed = parser.raw()
    if closed != name:
        raise TexError(f"\\begin{{{name}}} is closed by \\end{{{closed}}}")


def _fence(pair: str, body: str) -> str:
    if not pair:
        return body

    def side(character: str, form: str) -> str:
        if character == " ":
            return ""
        return (
            f'<mo fence="true" stretchy="true" symmetric="true" form="{form}" '
            f'lspace="0" rspace="0">{character}</mo>'
        )

    return f"<mrow>{side(pair[0], 'prefix')}{body}{side(pair[1], 'postfix')}</mrow>"
