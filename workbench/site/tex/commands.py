"""Commands with arguments of the TeX to MathML converter: fractions, accents, text, fonts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from html import escape

from . import symbols as sy
from .environments import table
from .parser import DISPLAY, SCRIPT, TEXT, Atom, Parser, TexError, convert, side_by_side, space

_NARROW = re.compile(r"<mi[^>]*>[a-zα-ω]</mi>|<mn>\d</mn>")
_SPECIAL = re.compile(r"\\([%&#$_{} ])")


def _below(style: int) -> int:
    return TEXT if style == DISPLAY else SCRIPT


def _fraction(parser: Parser, name: str, style: int) -> Atom:
    forced = {"d": DISPLAY, "c": DISPLAY, "t": TEXT}.get(name[0], style)
    inner = _below(forced)
    top, bottom = parser.argument(inner), parser.argument(inner)
    xml = f"<mfrac>{top}{bottom}</mfrac>"
    if forced != style:
        flag = "true" if forced == DISPLAY else "false"
        xml = f'<mstyle displaystyle="{flag}" scriptlevel="0">{xml}</mstyle>'
    return Atom("inner", xml)


def _binomial(parser: Parser, name: str, style: int) -> Atom:
    inner = _below(style)
    top, bottom = parser.argument(inner), parser.argument(inner)
    fence = '<mo fence="true" stretchy="true" form="{}" lspace="0" rspace="0">{}</mo>'
    xml = f'<mfrac linethickness="0">{top}{bottom}</mfrac>'
    opening, closing = fence.format("prefix", "("), fence.format("postfix", ")")
    return Atom("inner", f"<mrow>{opening}{xml}{closing}</mrow>")


def _root(parser: Parser, name: str, style: int) -> Atom:
    degree = parser.option()
    body = parser.argument(style)
    if degree is None:
        return Atom("ord", f"<msqrt>{body}</msqrt>")
    index = Parser(degree).row(SCRIPT, lambda t: False)
    return Atom("ord", f"<mroot>{body}{index}</mroot>")


def _text(parser: Parser, name: str, style: int) -> Atom:
    """Words inside a formula; mathematics between dollars inside them is converted too."""
    parts = []
    for i, piece in enumerate(re.split(r"(?<!\\)\$", parser.raw())):
        if i % 2:
            parts.append(convert(piece).split(">", 1)[1].removesuffix("</math>"))
        elif piece:
            plain = _SPECIAL.sub(r"\1", piece).replace("~", " ").replace("{", "").replace("}", "")
            if "\\" in plain:
                raise TexError(f"command inside \\{name}{{{piece}}}")
            css = {"textbf": ' class="bf"', "textit": ' class="it"', "texttt": ' class="tt"'}
            shown = escape(re.sub(r"\s+", "\u00a0", plain))
            parts.append(f"<mtext{css.get(name, '')}>{shown}</mtext>")
    return Atom("ord", parts[0] if len(parts) == 1 else f"<mrow>{''.join(parts)}</mrow>")


def _operator(parser: Parser, name: str, style: int) -> Atom:
    starred = parser.peek() == "*"
    if starred:
        parser.next()
    source = parser.raw()
    word = re.sub(r"\\[,:;! ]|~", "\u2009", source)
    word = re.sub(r"\\(?:mathrm|text|rm)\b|[{}]", "", word).strip()
    if "\\" in word:
        raise TexError(f"command inside \\operatorname{{{source}}}")
    variant = ' mathvariant="normal"' if len(word) == 1 else ""
    return Atom("op", f"<mi{variant}>{escape(word)}</mi>", limits=starred and style == DISPLAY)


def _mathop(parser: Parser, name: str, style: int) -> Atom:
    return Atom("op", parser.argument(style), limits=style == DISPLAY)


def _classed(parser: Parser, name: str, style: int) -> Atom:
    kinds = {"mathrel": "rel", "mathbin": "bin", "mathopen": "open", "mathclose": "close"}
    kinds |= {"mathpunct": "punct", "mathinner": "inner"}
    return Atom(kinds.get(name, "ord"), parser.argument(style))


def _font(parser: Parser, name: str, style: int) -> Atom:
    """An alphabet; letters that follow one another in it are one word, without spaces."""
    before, parser.font = parser.font, sy.FONTS[name]
    try:
        atoms = parser.group(style) if parser.peek() == "{" else [parser.nucleus(style, True)]
    finally:
        parser.font = before
    joined: list[Atom] = []
    for atom in atoms:
        if joined and atom.spelled and joined[-1].spelled:
            word = joined[-1].spelled + atom.spelled
            joined[-1] = Atom("ord", f"<mi>{word}</mi>", spelled=word)
        else:
            joined.append(atom)
    if len(joined) == 1 and not joined[0].operator:
        return joined[0]
    return Atom("ord", side_by_side(joined, style))


def _font_switch(parser: Parser, name: str, style: int) -> Atom:
    parser.font = sy.FONTS[name]
    return space(0)


def _accent(parser: Parser, name: str, style: int) -> Atom:
    body = parser.argument(style)
    css = ' class="vec"' if name == "vec" else ""
    mark = f'<mo{css} stretchy="false" lspace="0" rspace="0">{sy.ACCENTS[name]}</mo>'
    return Atom("ord", f'<mover accent="true">{body}{mark}</mover>')


def _wide_accent(parser: Parser, name: str, style: int) -> Atom:
    body = parser.argument(style)
    if name in {"widehat", "widetilde"} and _NARROW.fullmatch(body):
        # Stretched marks have no size as small as one small letter.
        mark = f'<mo stretchy="false" lspace="0" rspace="0">{sy.ACCENTS[name[4:]]}</mo>'
    else:
        mark = f'<mo stretchy="true" lspace="0" rspace="0">{sy.WIDE_ACCENTS[name]}</mo>'
    return Atom("ord", f'<mover accent="true">{body}{mark}</mover>')


def _line(parser: Parser, name: str, style: int) -> Atom:
    """A line over or under: a border in the style sheet, since stretched glyphs touch letters."""
    return Atom("ord", f'<mrow class="{name}">{parser.argument(style)}</mrow>')


def _brace(parser: Parser, name: str, style: int) -> Atom:
    tag = "mover" if name == "overbrace" else "munder"
    mark = f'<mo stretchy="true" lspace="0" rspace="0">{sy.BRACES[name]}</mo>'
    return Atom("op", f"<{tag}>{parser.argument(style)}{mark}</{tag}>", limits=True)


def _stacked(parser: Parser, name: str, style: int) -> Atom:
    """\\overset, \\underset and \\stackrel keep the class of what they decorate."""
    mark = parser.argument(SCRIPT)
    body = parser.group(style) if parser.peek() == "{" else [parser.nucleus(style, True)]
    kind = "rel" if name == "stackrel" else body[0].kind if len(body) == 1 else "ord"
    tag = "munder" if name == "underset" else "mover"
    return Atom(kind, f"<{tag}>{side_by_side(body, style)}{mark}</{tag}>")


def _arrow(parser: Parser, name: str, style: int) -> Atom:
    below = parser.option()
    above = parser.argument(SCRIPT)
    pad = '<mspace width="0.4em"/>'
    mark = f'<mo stretchy="true" lspace="0" rspace="0">{sy.ARROWS[name]}</mo>'
    over = f"<mrow>{pad}{above}{pad}</mrow>"
    if below is None:
        return Atom("rel", f"<mover>{mark}{over}</mover>")
    under = Parser(below).row(SCRIPT, lambda t: False)
    return Atom("rel", f"<munderover>{mark}<mrow>{pad}{under}{pad}</mrow>{over}</munderover>")


def _substack(parser: Parser, name: str, style: int) -> Atom:
    lines = [line for line in re.split(r"\\\\(?:\[[^\]]*\])?", parser.raw()) if line.strip()]
    rows = [[Parser(line).row(SCRIPT, lambda t: False)] for line in lines]
    return Atom("ord", table(rows, "c", "substack", SCRIPT))


def _negated(parser: Parser, name: str, style: int) -> Atom:
    token = parser.next()
    found = sy.symbol(token[1:]) if token.startswith("\\") else sy.CHARACTERS.get(token)
    if found is None:
        raise TexError(f"\\not before {token!r}")
    shown = unicodedata.normalize("NFC", found[0] + "\u0338")
    return Atom(found[1], operator=f">{escape(shown)}")


def _modulo(parser: Parser, name: str, style: int) -> Atom:
    if name == "bmod":
        return Atom("bin", "<mi>mod</mi>")
    body = f'<mi>mod</mi><mspace width="0.3333em"/>{parser.argument(style)}'
    if name == "pmod":
        body = f'<mo stretchy="false">(</mo>{body}<mo stretchy="false">)</mo>'
    return Atom("ord", f'<mrow><mspace width="1em"/>{body}</mrow>')


def _hspace(parser: Parser, name: str, style: int) -> Atom:
    if parser.peek() == "*":
        parser.next()
    source = parser.raw().strip()
    match = re.fullmatch(r"(-?[\d.]+)\s*(em|ex|mu|pt)", source)
    if not match:
        raise TexError(f"\\{name} of {source!r}")
    scale = {"em": 1.0, "ex": 0.45, "mu": 1 / 18, "pt": 0.1}[match[2]]
    return space(float(match[1]) * scale)


def _phantom(parser: Parser, name: str, style: int) -> Atom:
    return Atom("ord", f"<mphantom>{parser.argument(style)}</mphantom>")


def _boxed(parser: Parser, name: str, style: int) -> Atom:
    return Atom("ord", f'<mrow class="boxed">{parser.argument(style)}</mrow>')


def _tag(parser: Parser, name: str, style: int) -> Atom:
    parser.tag = escape(parser.raw())
    return space(0)


def _ignored(parser: Parser, name: str, style: int) -> Atom:
    if name in {"label", "vphantom"}:
        parser.raw()
    return space(0)


def _coloured(parser: Parser, name: str, style: int) -> Atom:
    """Colours are the page's business: the content is kept, its colour is not."""
    parser.raw()
    if name == "color":
        return space(0)
    return Atom("ord", parser.argument(style))


HANDLERS: dict[str, Callable[[Parser, str, int], Atom]] = {
    **dict.fromkeys(("frac", "dfrac", "tfrac", "cfrac"), _fraction),
    **dict.fromkeys(("binom", "dbinom", "tbinom"), _binomial),
    "sqrt": _root,
    **dict.fromkeys(("text", "textrm", "textnormal", "textbf", "textit", "texttt"), _text),
    **dict.fromkeys(("textsf", "mbox", "hbox"), _text),
    "operatorname": _operator,
    "mathop": _mathop,
    **dict.fromkeys(("mathrel", "mathbin", "mathopen", "mathclose", "mathord"), _classed),
    **dict.fromkeys(("mathpunct", "mathinner"), _classed),
    **{name: _font_switch if name in {"rm", "bf"} else _font for name in sy.FONTS},
    **dict.fromkeys(sy.ACCENTS, _accent),
    **dict.fromkeys(sy.WIDE_ACCENTS, _wide_accent),
    **dict.fromkeys(("overline", "underline"), _line),
    **dict.fromkeys(sy.BRACES, _brace),
    **dict.fromkeys(("overset", "underset", "stackrel"), _stacked),
    **dict.fromkeys(sy.ARROWS, _arrow),
    "substack": _substack,
    "not": _negated,
    **dict.fromkeys(("mod", "bmod", "pmod"), _modulo),
    **dict.fromkeys(("hspace", "mspace", "kern", "mkern"), _hspace),
    **dict.fromkeys(("phantom", "hphantom"), _phantom),
    "boxed": _boxed,
    "tag": _tag,
    **dict.fromkeys(("label", "vphantom", "nonumber", "notag", "strut"), _ignored),
    **dict.fromkeys(("color", "textcolor"), _coloured),
}
