"""TeX to MathML: what a formula means must survive, and nothing is guessed."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.site.tex import TexError, convert
from workbench.site.tex.symbols import styled, symbol

FORMULAS = [
    r"\mathrm{ECE}=\sum_{b=1}^{B}\frac{|B_b|}{n}\,\bigl|\bar a_b-\bar c_b\bigr|",
    r"T^\star=\arg\min_{T>0}-\frac1n\sum_i\log\frac{e^{z_{i,y_i}/T}}{\sum_{k}e^{z_{ik}/T}}",
    r"\operatorname*{arg\,max}_{\theta\in\Theta}\mathbb{E}_{x\sim p}\left[\log p_\theta(x)\right]",
    r"\max_{p\in\Delta,\ \mathrm{KL}(p,\frac1K)\le\rho}\sum_k p_k(h_k-h_y)-\tau_0\!\left(p\right)",
    r"\lVert x\rVert_2^2 = x^\top x,\quad \left\lVert \frac{a}{b}\right\rVert_\infty,\ \|w\|_1",
    r"\begin{aligned} L &= \frac{1}{n}\sum_i \ell(f_i) \\ &\le \widehat{\mathcal{R}}\end{aligned}",
    r"\begin{pmatrix} a & b\\ c & d\end{pmatrix}\begin{bmatrix} 1 & \cdots\\ \vdots\end{bmatrix}",
    r"f(x)=\begin{cases} x & \text{if } x>0,\\ 0 & \text{otherwise}\end{cases}",
    r"\underbrace{\mathbb{E}[f^2]}_{\text{variance}}+\overbrace{(\bar f - y)^2}^{\text{bias}^2}",
    r"\sum_{\substack{i=1\\ i\ne j}}^{n} a_i,\ x \stackrel{\text{def}}{=} y,\ A\xrightarrow{d} B",
    r"\left.\frac{df}{dx}\right|_{x=0}=\left\{\begin{array}{ll}1 & x>0\\-1 & x<0\end{array}\right.",
    r"\Big[\frac1{n^2}\sum_{i,j}e^{-|c_i-c_j|/0.4}\Big]^{1/2}, f''(x), \sqrt[3]{x}, \binom nk",
    r"\boldsymbol\mu,\boldsymbol{\Sigma}^{-1/2},\mathbf{x}^\top\mathbf W,\mathbb 1[y],\mathfrak g",
    r"a\not\in b,\ 10\%,\ w^\*,\ \overline{xyz},\ \widetilde W,\ \vec v,\ \underset{x}{\min}",
]  # fmt: skip


def tree(tex: str, *, display: bool = False) -> ElementTree.Element:
    found = ElementTree.fromstring(convert(tex, display=display))
    return found[0] if display else found


def texts(tex: str, tag: str, **options: bool) -> list[str]:
    return ["".join(node.itertext()) for node in tree(tex, **options).iter(tag)]


@pytest.mark.parametrize("tex", FORMULAS)
@pytest.mark.parametrize("display", [True, False])
def test_formulas_of_papers_give_well_formed_mathml_without_leftover_tex(
    tex: str, display: bool
) -> None:
    math = tree(tex, display=display)
    assert math.tag == "math" and math.get("alttext") == " ".join(tex.split())
    shown = "".join(math.itertext())
    assert "\\" not in shown and "$" not in shown
    # The attributes of older MathML that browsers no longer draw are not used.
    names = {name for node in math.iter() for name in node.attrib}
    assert not names & {"columnalign", "rowspacing", "columnspacing"}
    assert not {node.tag for node in math.iter()} & {"mfenced", "menclose"}


def test_words_in_roman_are_one_upright_word_and_not_a_product_of_letters() -> None:
    assert texts(r"\mathrm{softmax}(z)", "mi") == ["softmax", "z"]
    assert texts(r"\operatorname{sign} x", "mi") == ["sign", "x"]


def test_limits_stand_below_in_display_and_beside_in_a_line() -> None:
    assert [n.tag for n in tree(r"\max_x f", display=True).iter()][2] == "munder"
    assert [n.tag for n in tree(r"\max_x f").iter()][2] == "msub"
    # A fraction's parts are set as in a line.
    assert not list(tree(r"\frac{\sum_i a_i}{n}", display=True).iter("munder"))


def test_a_superscript_takes_one_digit_and_a_number_keeps_its_point() -> None:
    assert texts("x^12", "mn") == ["1", "2"]
    assert texts("0.05x", "mn") == ["0.05"]
    assert [n.tag for n in tree(r"\frac12")[0]] == ["mn", "mn"]


def test_spaces_follow_the_classes_of_neighbours() -> None:
    def around(tex: str, character: str) -> tuple[str | None, str | None]:
        node = next(n for n in tree(tex).iter("mo") if n.text == character)
        return node.get("lspace"), node.get("rspace")

    assert around("a-b", "\u2212") == ("0.2222em", "0.2222em")  # a difference
    assert around("a=-b", "\u2212") == ("0.2778em", "0")  # a sign: all space is the relation's
    assert around("a=b", "=") == ("0.2778em", "0.2778em")
    assert around("x_{a=b}", "=") == ("0", "0")  # none in scripts
    assert around("f(x,y)", ",") == ("0", "0.1667em")


def test_aligned_columns_meet_at_the_relation_and_equations_get_their_number() -> None:
    cells = list(tree(r"\begin{align} a &= b \\ c &= d\end{align}", display=True).iter("mtd"))
    assert [cell.get("class") for cell in cells] == ["r", "l", "r", "l"]
    assert '<span class="eqno">(7)</span>' in convert(r"a=b \tag{7}", display=True)


def test_alphabets_have_the_letters_that_unicode_put_elsewhere() -> None:
    assert [styled(c, "double-struck") for c in "RE1"] == ["ℝ", "\U0001d53c", "\U0001d7d9"]
    assert styled("L", "script") == "ℒ" and styled("H", "fraktur") == "ℌ"
    assert styled("h", "italic") == "ℎ" and styled("α", "bold-italic") == "\U0001d736"
    assert styled("é", "bold") == "é"  # what an alphabet lacks stays itself
    assert symbol("alpha") == ("α", "ord") and symbol("le") == ("≤", "rel")


def test_text_is_escaped_and_words_keep_their_spaces() -> None:
    assert "<img" not in convert(r"\text{<img src=x>} a<b")
    assert texts(r"\text{if } x", "mtext") == ["if\u00a0"]
    assert texts(r"\text{if $x_1$ holds}", "mtext") == ["if\u00a0", "\u00a0holds"]


@pytest.mark.parametrize(
    ("tex", "says"),
    [
        (r"\frac{a}", "ends too early"),
        (r"\nosuchthing x", "unknown command"),
        (r"\begin{tikzpicture} x \end{tikzpicture}", "unknown environment"),
        (r"\begin{matrix} x \end{pmatrix}", "closed by"),
        ("x^a^b", "two superscripts"),
        ("a } b", "unexpected"),
        (r"\left( x", "ends too early"),
        (r"\hspace{a lot}", "hspace"),
    ],
)
def test_what_is_not_known_is_named_and_never_guessed(tex: str, says: str) -> None:
    with pytest.raises(TexError, match=says):
        convert(tex)


@given(st.text(alphabet="abx12+-=^_{}()[]|&\\ ,.<>'~\u03b1", max_size=24))
def test_any_text_gives_well_formed_mathml_or_an_error_that_names_it(tex: str) -> None:
    try:
        math = convert(tex)
    except TexError:
        return
    ElementTree.fromstring(math)
