"""TeX mathematics to MathML when the site is built: no script, no pictures, no network.

A recursive descent over the part of TeX that papers use. Each construct becomes an atom with
TeX's class (ord, op, bin, rel, open, close, punct, inner), and the spaces between atoms follow
TeX's own table, so that a line looks as it does in the paper and not as the browser's operator
dictionary would have it. What is not known raises :class:`TexError` and is never guessed.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from . import symbols as sy

_TOKEN = re.compile(r"\\(?:[a-zA-Z]+|.)|%[^\n]*\n?|\s+|.", re.DOTALL)
DISPLAY, TEXT, SCRIPT = 0, 1, 2


class TexError(ValueError):
    """The formula uses something that the converter does not know, or is malformed."""


@dataclass(slots=True)
class Atom:
    """One piece of a formula: TeX's class, MathML, and what its neighbours must know."""

    kind: str
    xml: str = ""
    operator: str = ""  # content and attributes of a plain <mo>, whose spaces are set later
    limits: bool = False  # scripts go below and above
    spelled: str = ""  # letters of an upright word, so that words can be joined

    def build(self, left: float = 0, right: float = 0) -> str:
        """The MathML; ``left`` and ``right`` are the spaces of a plain operator, in em."""
        if not self.operator:
            return self.xml
        return f'<mo lspace="{em(left)}" rspace="{em(right)}"{self.operator}</mo>'


def em(width: float) -> str:
    """A length for a MathML attribute."""
    return f"{width:.4g}em" if width else "0"


def space(width: float) -> Atom:
    """An explicit space."""
    return Atom("space", f'<mspace width="{em(width)}"/>')


def _mo(character: str, kind: str = "ord", attributes: str = "") -> Atom:
    if kind in {"open", "close"} or character in "|\u2016":
        attributes += ' stretchy="false"'
    return Atom(kind, operator=f"{attributes}>{escape(character)}")


def side_by_side(atoms: list[Atom], style: int) -> str:
    """Atoms side by side with TeX's spaces between them, as one MathML element."""
    seen: list[tuple[Atom, float, float]] = []  # atom, space before, space after
    previous = -1
    kinds = _settle(atoms)
    for atom, kind in zip(atoms, kinds, strict=True):
        if kind == "space":
            seen.append((atom, 0, 0))
            continue
        width = 0.0
        if previous >= 0:
            before = kinds[previous]
            if style != SCRIPT or (before, kind) in sy.SCRIPT_SPACES:
                width = sy.WIDTHS.get(sy.SPACES[before].get(kind, 0), 0)
        if width and not atom.operator:
            last, left, right = seen[-1]
            if last.operator and len(seen) - 1 == previous:
                seen[-1] = (last, left, right + width)
            else:
                # Spaces are atoms of the row, so that positions stay those of `kinds`.
                atom = Atom(atom.kind, space(width).xml + atom.xml)
            width = 0.0
        seen.append((atom, width, 0))
        previous = len(seen) - 1
    parts = [atom.build(left, right) for atom, left, right in seen]
    if len(parts) == 1 and not parts[0].startswith("<mspace"):
        return parts[0]
    return f"<mrow>{''.join(parts)}</mrow>"


def _settle(atoms: list[Atom]) -> list[str]:
    """Classes after TeX's rule that a binary sign without two operands is an ordinary one."""
    kinds = [atom.kind for atom in atoms]
    previous = -1
    for i, kind in enumerate(kinds):
        if kind == "space":
            continue
        before = kinds[previous] if previous >= 0 else "open"
        if kind == "bin" and before in {"bin", "op", "rel", "open", "punct"}:
            kinds[i] = "ord"
        elif kind in {"rel", "close", "punct"} and before == "bin":
            kinds[previous] = "ord"
        previous = i
    if previous >= 0 and kinds[previous] == "bin":
        kinds[previous] = "ord"
    return kinds


class Parser:
    """The tokens of one formula, and one method for each kind of thing found among them."""

    def __init__(self, tex: str) -> None:
        self.tokens = [t for t in _TOKEN.findall(tex) if not t.startswith("%")]
        self.position = 0
        self.font = ""
        self.tag = ""

    # -- tokens ---------------------------------------------------------------------------
    def peek(self, skip: bool = True) -> str:
        """The coming token (``skip``: past white space), or an empty string at the end."""
        while skip and self.position < len(self.tokens) and self.tokens[self.position].isspace():
            self.position += 1
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def next(self, skip: bool = True) -> str:
        """Take the coming token."""
        token = self.peek(skip)
        if not token:
            raise TexError("the formula ends too early")
        self.position += 1
        return token

    def expect(self, token: str) -> None:
        """Take a token that must be this one."""
        found = self.next()
        if found != token:
            raise TexError(f"expected {token!r}, found {found!r}")

    def raw(self) -> str:
        """The source of a braced argument, or one token, unparsed."""
        if self.peek() != "{":
            return self.next()
        self.next()
        depth = 1
        parts: list[str] = []
        while True:
            token = self.next(skip=False)
            depth += (token == "{") - (token == "}")
            if not depth:
                return "".join(parts)
            parts.append(token)

    def option(self) -> str | None:
        """The source of an optional argument in square brackets."""
        if self.peek() != "[":
            return None
        self.next()
        parts: list[str] = []
        while (token := self.next(skip=False)) != "]":
            parts.append(token)
        return "".join(parts)

    # -- rows and atoms -------------------------------------------------------------------
    def atoms(self, style: int, stop: Callable[[str], bool]) -> list[Atom]:
        """Atoms up to a token that stops the row; the stopping token is left to the caller."""
        found: list[Atom] = []
        while (token := self.peek()) and not stop(token):
            if token in {r"\displaystyle", r"\textstyle", r"\scriptstyle"}:
                self.next()
                style = {"d": DISPLAY, "t": TEXT, "s": SCRIPT}[token[1]]
                inner = side_by_side(self.atoms(style, stop), style)
                flag = "true" if style == DISPLAY else "false"
                level = 1 if style == SCRIPT else 0
                found.append(
                    Atom(
                        "ord",
                        f'<mstyle displaystyle="{flag}" scriptlevel="{level}">{inner}</mstyle>',
                    )
                )
                break
            found.append(self.scripted(style))
        return found

    def row(self, style: int, stop: Callable[[str], bool]) -> str:
        """As :meth:`atoms`, set side by side."""
        return side_by_side(self.atoms(style, stop), style)

    def group(self, style: int) -> list[Atom]:
        """The atoms between braces; font switches end with the group."""
        self.expect("{")
        font = self.font
        atoms = self.atoms(style, lambda t: t == "}")
        self.expect("}")
        self.font = font
        return atoms

    def argument(self, style: int) -> str:
        """One argument: a braced group or a single token."""
        if self.peek() == "{":
            return side_by_side(self.group(style), style)
        return side_by_side([self.nucleus(style, single=True)], style)

    def scripted(self, style: int) -> Atom:
        """An atom with its subscript, superscript and primes."""
        base = Atom("ord", "<mrow></mrow>") if self.peek() in {"^", "_"} else self.nucleus(style)
        while self.peek() in {r"\limits", r"\nolimits"}:
            base.limits = self.next() == r"\limits"
        below = above = ""
        primes = 0
        while (token := self.peek()) in {"^", "_", "'"}:
            self.next()
            if token == "'":
                primes += 1
            elif token == "_":
                if below:
                    raise TexError("two subscripts on one symbol")
                below = self.argument(SCRIPT)
            else:
                if above:
                    raise TexError("two superscripts on one symbol")
                above = self.argument(SCRIPT)
        if primes:
            mark = {1: "\u2032", 2: "\u2033", 3: "\u2034"}.get(primes, "\u2032" * primes)
            prime = f'<mo lspace="0" rspace="0">{mark}</mo>'
            above = f"<mrow>{prime}{above}</mrow>" if above else prime
        if not below and not above:
            return base
        core = base.build()
        if "minsize" in base.operator:
            # Alone under a script a fence of a given size would not be stretched by Chromium.
            core = f"<mrow>{core}<mi></mi></mrow>"
        if base.limits:
            tag = "munderover" if below and above else "munder" if below else "mover"
        else:
            tag = "msubsup" if below and above else "msub" if below else "msup"
        return Atom(base.kind, f"<{tag}>{core}{below}{above}</{tag}>")

    def nucleus(self, style: int, single: bool = False) -> Atom:
        """An atom without its scripts; ``single`` takes one digit of a number, as TeX does."""
        token = self.next()
        if token.startswith("\\"):
            return self.command(token[1:], style)
        if token == "{":
            self.position -= 1
            atoms = self.group(style)
            if len(atoms) == 1 and atoms[0].operator:
                return Atom("ord", atoms[0].build())
            return Atom("ord", side_by_side(atoms, style))
        if token in {"}", "&", "^", "_"}:
            raise TexError(f"unexpected {token!r}")
        if token == "~":
            return space(0.25)
        if token == "'":
            self.position -= 1
            return Atom("ord", "<mrow></mrow>")
        if token.isdigit() and not single:
            return self.number(token)
        if token.isalnum():
            return self.letter(token)
        if token in sy.CHARACTERS:
            return _mo(*sy.CHARACTERS[token])
        return _mo(token) if not unicodedata.category(token).startswith("L") else self.letter(token)

    def number(self, token: str) -> Atom:
        """Digits and a decimal point as one number."""
        while (following := self.peek(skip=False)).isdigit() or (
            following == "."
            and "." not in token
            and self.position + 1 < len(self.tokens)
            and self.tokens[self.position + 1].isdigit()
        ):
            token += self.next(skip=False)
        return Atom("ord", f"<mn>{''.join(sy.styled(c, self.font) for c in token)}</mn>")

    def letter(self, character: str) -> Atom:
        """A letter or digit in the present font; italic is the browser's default."""
        if character.isdigit():
            return Atom("ord", f"<mn>{sy.styled(character, self.font)}</mn>")
        if self.font in {"", "italic"}:
            upright = "Α" <= character <= "Ω" and not self.font
            variant = ' mathvariant="normal"' if upright else ""
            return Atom("ord", f"<mi{variant}>{escape(character)}</mi>")
        shown = escape(sy.styled(character, self.font))
        return Atom("ord", f'<mi mathvariant="normal">{shown}</mi>', spelled=shown)

    # -- commands -------------------------------------------------------------------------
    def command(self, name: str, style: int) -> Atom:
        """What follows a backslash."""
        from .commands import HANDLERS

        if handler := HANDLERS.get(name):
            return handler(self, name, style)
        if name in sy.SKIPS:
            return space(sy.SKIPS[name])
        if name in sy.FUNCTIONS:
            return Atom("op", f"<mi>{name}</mi>")
        if name in sy.LIMIT_FUNCTIONS:
            word = sy.LIMIT_FUNCTIONS[name]
            return Atom("op", f"<mi>{word}</mi>", limits=style == DISPLAY)
        if name == "left":
            return self.fenced(style)
        if name == "begin":
            return self.environment(style)
        if name[:-1] in sy.BIG and name[-1] in "lrm":
            kind = {"l": "open", "r": "close", "m": "rel"}[name[-1]]
            return self.big(sy.BIG[name[:-1]], kind)
        if name in sy.BIG:
            return self.big(sy.BIG[name], "ord")
        found = sy.symbol(name)
        if found is None:
            raise TexError(f"unknown command \\{name}")
        character, kind = found
        if kind == "op":
            limits = style == DISPLAY and character not in sy.INTEGRALS
            attributes = ' movablelimits="false"' if limits else ""
            xml = f'<mo lspace="0" rspace="0"{attributes}>{character}</mo>'
            return Atom("op", xml, limits=limits)
        if (
            character.isalpha()
            and kind == "ord"
            and not unicodedata.name(character, "").startswith(
                ("MATHEMATICAL", "DOUBLE-STRUCK", "BLACK-LETTER")
            )
        ):
            return self.letter(character)
        if kind == "ord" and character not in "|\u2016":
            upright = "" if character == "\u2202" else ' mathvariant="normal"'
            return Atom("ord", f"<mi{upright}>{escape(character)}</mi>")
        return _mo(character, kind)

    def delimiter(self) -> str:
        """The character of a fence; the empty fence ``.`` is an empty string."""
        token = self.next()
        if token == ".":
            return ""
        if token == "<":
            return "\u27e8"
        if token == ">":
            return "\u27e9"
        if token.startswith("\\"):
            found = sy.symbol(token[1:])
            if found is None:
                raise TexError(f"unknown delimiter {token}")
            return found[0]
        return token

    def big(self, size: float, kind: str) -> Atom:
        """A fence of a given size."""
        sizes = f'minsize="{size}em" maxsize="{size}em"'
        content = escape(self.delimiter())
        return Atom(
            kind, operator=f' stretchy="true" symmetric="true" fence="true" {sizes}>{content}'
        )

    def fenced(self, style: int) -> Atom:
        r"""``\left`` to ``\right``, with any ``\middle`` between."""

        def fence(character: str, form: str) -> str:
            if not character:
                return ""
            return (
                f'<mo fence="true" stretchy="true" symmetric="true" form="{form}" '
                f'lspace="0" rspace="0">{escape(character)}</mo>'
            )

        parts = [fence(self.delimiter(), "prefix")]
        while True:
            parts.append(self.row(style, lambda t: t in {r"\right", r"\middle"}))
            if self.next() == r"\right":
                parts.append(fence(self.delimiter(), "postfix"))
                return Atom("inner", f"<mrow>{''.join(parts)}</mrow>")
            parts.append(fence(self.delimiter(), "infix"))

    def environment(self, style: int) -> Atom:
        r"""``\begin`` to ``\end``."""
        from .environments import environment

        return environment(self, self.raw(), style)


def convert(tex: str, *, display: bool = False) -> str:
    """A formula as a ``<math>`` element (``display``: centred, in display style).

    Raises:
        TexError: the formula is malformed or uses a command that is not known.
    """
    parser = Parser(tex)
    style = DISPLAY if display else TEXT
    body = parser.row(style, lambda t: False)
    alternative = escape(" ".join(tex.split()))
    mode = ' display="block"' if display else ""
    math = f'<math{mode} alttext="{alternative}">{body}</math>'
    if not display:
        return math
    number = f'<span class="eqno">({parser.tag})</span>' if parser.tag else ""
    return f'<span class="equation">{math}{number}</span>'
