"""Tables for the TeX to MathML converter: symbols and their classes, alphabets, spaces.

The symbols themselves come from the Unicode mathematics table that the package latex2mathml
ships; what stands here is what that table does not say or says differently from TeX.
"""

from __future__ import annotations

from functools import cache
from importlib import resources

# Spaces between neighbouring atoms in TeX: 1 thin, 2 medium, 3 thick; those in SCRIPT_SPACES
# are also made in subscripts and superscripts.
SPACES = {
    "ord": {"op": 1, "bin": 2, "rel": 3, "inner": 1},
    "op": {"ord": 1, "op": 1, "rel": 3, "inner": 1},
    "bin": {"ord": 2, "op": 2, "open": 2, "inner": 2},
    "rel": {"ord": 3, "op": 3, "open": 3, "inner": 3},
    "open": {},
    "close": {"op": 1, "bin": 2, "rel": 3, "inner": 1},
    "punct": dict.fromkeys(("ord", "op", "rel", "open", "close", "punct", "inner"), 1),
    "inner": {"ord": 1, "op": 1, "bin": 2, "rel": 3, "open": 1, "punct": 1, "inner": 1},
}
SCRIPT_SPACES = {
    ("ord", "op"),
    ("op", "ord"),
    ("op", "op"),
    ("close", "op"),
    ("inner", "op"),
}
WIDTHS = {1: 0.1667, 2: 0.2222, 3: 0.2778}

# Explicit spaces, in em.
SKIPS = {
    ",": 0.1667,
    "thinspace": 0.1667,
    ":": 0.2222,
    ">": 0.2222,
    "medspace": 0.2222,
    ";": 0.2778,
    "thickspace": 0.2778,
    "!": -0.1667,
    "negthinspace": -0.1667,
    " ": 0.25,
    "enspace": 0.5,
    "quad": 1.0,
    "qquad": 2.0,
}

FUNCTIONS = frozenset(
    {"arccos", "arcsin", "arctan", "arg", "cos", "cosh", "cot", "coth", "csc", "deg", "dim", "exp"}
    | {"hom", "ker", "lg", "ln", "log", "sec", "sin", "sinh", "tan", "tanh"}
)
LIMIT_FUNCTIONS = {
    **{name: name for name in ("det", "gcd", "inf", "lim", "max", "min", "Pr", "sup")},
    "liminf": "lim\u2009inf",
    "limsup": "lim\u2009sup",
    "argmax": "arg\u2009max",
    "argmin": "arg\u2009min",
}

# Characters that stand for themselves: (character, class).
CHARACTERS = {
    "+": ("+", "bin"),
    "-": ("\u2212", "bin"),
    "*": ("\u2217", "bin"),
    "/": ("/", "ord"),
    "=": ("=", "rel"),
    "<": ("<", "rel"),
    ">": (">", "rel"),
    ":": (":", "rel"),
    ",": (",", "punct"),
    ";": (";", "punct"),
    ".": (".", "ord"),
    "!": ("!", "close"),
    "?": ("?", "close"),
    "|": ("|", "ord"),
    "(": ("(", "open"),
    ")": (")", "close"),
    "[": ("[", "open"),
    "]": ("]", "close"),
    "@": ("@", "ord"),
    '"': ("\u2033", "ord"),
}

# Where TeX's class or character differs from the Unicode table.
COMMANDS = {
    "{": ("{", "open"),
    "}": ("}", "close"),
    "lbrace": ("{", "open"),
    "rbrace": ("}", "close"),
    "lbrack": ("[", "open"),
    "rbrack": ("]", "close"),
    "|": ("\u2016", "ord"),
    "Vert": ("\u2016", "ord"),
    "lVert": ("\u2016", "open"),
    "rVert": ("\u2016", "close"),
    "vert": ("|", "ord"),
    "lvert": ("|", "open"),
    "rvert": ("|", "close"),
    "mid": ("\u2223", "rel"),
    "middot": ("\u22c5", "bin"),
    "colon": (":", "punct"),
    "to": ("\u2192", "rel"),
    "gets": ("\u2190", "rel"),
    "iff": ("\u27fa", "rel"),
    "implies": ("\u27f9", "rel"),
    "impliedby": ("\u27f8", "rel"),
    "coloneqq": ("\u2254", "rel"),
    "ldots": ("\u2026", "inner"),
    "dots": ("\u2026", "inner"),
    "dotsc": ("\u2026", "inner"),
    "dotso": ("\u2026", "inner"),
    "cdots": ("\u22ef", "inner"),
    "dotsb": ("\u22ef", "inner"),
    "dotsm": ("\u22ef", "inner"),
    "ddots": ("\u22f1", "inner"),
    "vdots": ("\u22ee", "ord"),
    "*": ("\u2217", "bin"),
    "%": ("%", "ord"),
    "&": ("&", "ord"),
    "#": ("#", "ord"),
    "$": ("$", "ord"),
    "_": ("_", "ord"),
    "backslash": ("\\", "ord"),
    "setminus": ("\u2216", "bin"),
    "emptyset": ("\u2205", "ord"),
    "star": ("\u22c6", "bin"),
    "dagger": ("\u2020", "bin"),
    "ddagger": ("\u2021", "bin"),
    "land": ("\u2227", "bin"),
    "lor": ("\u2228", "bin"),
    "hbar": ("\u210f", "ord"),
    "imath": ("\u0131", "ord"),
    "jmath": ("\u0237", "ord"),
    "langle": ("\u27e8", "open"),
    "rangle": ("\u27e9", "close"),
    "S": ("\u00a7", "ord"),
    "Box": ("\u25a1", "ord"),
    "square": ("\u25a1", "ord"),
    "ge": ("\u2265", "rel"),
    "le": ("\u2264", "rel"),
    "ne": ("\u2260", "rel"),
    "lt": ("<", "rel"),
    "gt": (">", "rel"),
    "owns": ("\u220b", "rel"),
    "prime": ("\u2032", "ord"),
    "degree": ("\u00b0", "ord"),
    "dotsi": ("\u22ef", "inner"),
    "triangle": ("\u25b3", "ord"),
    "varnothing": ("\u2205", "ord"),
    "top": ("\u22a4", "ord"),
    "bot": ("\u22a5", "ord"),
    "perp": ("\u27c2", "rel"),
    "parallel": ("\u2225", "rel"),
    "intercal": ("\u22ba", "ord"),
    "bigcirc": ("\u25ef", "bin"),
    "Re": ("\u211c", "ord"),
    "Im": ("\u2111", "ord"),
}
INTEGRALS = frozenset("\u222b\u222c\u222d\u222e\u222f\u2230")

# Accents that keep their size, and those that stretch over what they cover. Which of Unicode's
# look-alikes sits well was found by looking: combining marks are drawn too far to the left.
ACCENTS = {
    "hat": "\u02c6",
    "tilde": "\u02dc",
    "bar": "\u00af",
    "dot": "\u02d9",
    "ddot": "\u00a8",
    "vec": "\u2192",
    "check": "\u02c7",
    "breve": "\u02d8",
    "acute": "\u00b4",
    "grave": "`",
    "mathring": "\u02da",
}
WIDE_ACCENTS = {
    "widehat": "\u0302",
    "widetilde": "\u0303",
    "overrightarrow": "\u20d7",
    "overleftarrow": "\u20d6",
}
BRACES = {"overbrace": "\u23de", "underbrace": "\u23df"}
ARROWS = {"xrightarrow": "\u2192", "xleftarrow": "\u2190", "xleftrightarrow": "\u2194"}
BIG = {"big": 1.2, "Big": 1.8, "bigg": 2.4, "Bigg": 3.0}

FONTS = {
    "mathrm": "normal",
    "mathup": "normal",
    "rm": "normal",
    "mathbf": "bold",
    "bf": "bold",
    "mathit": "italic",
    "boldsymbol": "bold-italic",
    "bm": "bold-italic",
    "pmb": "bold-italic",
    "mathbb": "double-struck",
    "mathcal": "script",
    "mathscr": "script",
    "mathfrak": "fraktur",
    "mathsf": "sans-serif",
    "mathtt": "monospace",
    "mathnormal": "",
}

# First code point of A, a, 0, capital Alpha, small alpha in each alphabet (0: none).
_ALPHABETS = {
    "bold": (0x1D400, 0x1D41A, 0x1D7CE, 0x1D6A8, 0x1D6C2),
    "italic": (0x1D434, 0x1D44E, 0, 0x1D6E2, 0x1D6FC),
    "bold-italic": (0x1D468, 0x1D482, 0x1D7CE, 0x1D6A8, 0x1D736),  # Greek capitals stay upright
    "script": (0x1D49C, 0x1D4B6, 0, 0, 0),
    "fraktur": (0x1D504, 0x1D51E, 0, 0, 0),
    "double-struck": (0x1D538, 0x1D552, 0x1D7D8, 0, 0),
    "sans-serif": (0x1D5A0, 0x1D5BA, 0x1D7E2, 0, 0),
    "monospace": (0x1D670, 0x1D68A, 0x1D7F6, 0, 0),
}
# Letters that Unicode had before the mathematical alphabets and left out of them.
_HOLES = {
    ("italic", "h"): "\u210e",
    **{("script", a): b for a, b in zip("BEFHILMRego", "ℬℰℱℋℐℒℳℛℯℊℴ", strict=True)},
    **{("fraktur", a): b for a, b in zip("CHIRZ", "ℭℌℑℜℨ", strict=True)},
    **{("double-struck", a): b for a, b in zip("CHNPQRZ", "ℂℍℕℙℚℝℤ", strict=True)},
}
_GREEK_VARIANTS = "ϵϑϰϕϱϖ"  # follow small omega and the partial sign in each Greek alphabet


def styled(character: str, font: str) -> str:
    """The character in a mathematical alphabet, or unchanged where the alphabet lacks it."""
    if (font, character) in _HOLES:
        return _HOLES[font, character]
    if font not in _ALPHABETS:
        return character
    upper, lower, digit, greek_upper, greek_lower = _ALPHABETS[font]
    code = ord(character)
    for first, last, start in (
        ("A", "Z", upper),
        ("a", "z", lower),
        ("0", "9", digit),
        ("Α", "Ω", greek_upper),
        ("α", "ω", greek_lower),
    ):
        if start and ord(first) <= code <= ord(last):
            return chr(start + code - ord(first))
    if greek_lower and character in _GREEK_VARIANTS:
        return chr(greek_lower + 26 + _GREEK_VARIANTS.index(character))
    return character


@cache
def _unicode_table() -> dict[str, tuple[str, str]]:
    kinds = {
        "mathbin": "bin",
        "mathrel": "rel",
        "mathopen": "open",
        "mathclose": "close",
        "mathpunct": "punct",
        "mathop": "op",
    }
    table: dict[str, tuple[str, str]] = {}
    text = resources.files("latex2mathml").joinpath("unimathsymbols.txt").read_text("utf-8")
    for line in text.splitlines():
        if line.startswith("#") or line.count("^") < 7:
            continue
        code, _, *rest = line.split("^")
        # The literal character of the caret's own line is the separator: that line has no use.
        command, unicode_command, _, category = rest[:4]
        if category in {"mathaccent", "mathover", "mathunder", "mathradical"}:
            continue
        value = (chr(int(code.strip(), 16)), kinds.get(category, "ord"))
        for name in (command, unicode_command):
            if name.startswith("\\"):
                table.setdefault(name[1:], value)
    return table


def symbol(name: str) -> tuple[str, str] | None:
    """Character and TeX class of the command ``\\name``, or None when there is no such symbol."""
    return COMMANDS.get(name) or _unicode_table().get(name)
