"""TeX mathematics as MathML, converted when the site is built."""

from .parser import TexError, convert

__all__ = ["TexError", "convert"]
