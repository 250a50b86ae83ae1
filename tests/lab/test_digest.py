"""A cached result depends on the source it came from, and on no more than that."""

from __future__ import annotations

import importlib
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from workbench.lab import digest

FILES = {
    "__init__.py": "",
    "lab/__init__.py": "import importlib\ndef __getattr__(n):\n"
    "    if n in ('deep', 'other'): return importlib.import_module('toybench.lab.' + n)\n"
    "    if n == 'lazy': return importlib.import_module('toybench.lab.other').lazy\n"
    "    raise AttributeError(n)\n",
    "lab/deep.py": "def value():\n    return 1\n",
    "lab/other.py": "def lazy():\n    return 2\n",
    "family/__init__.py": "",
    "family/shared.py": "SCALE = 3\n",
    "family/paper.py": "from toybench import lab\nfrom .shared import SCALE\n"
    "def experiment(seed):\n    return {'v': lab.deep.value() * SCALE}\n",
    "family/figures.py": "from toybench.family import paper\n",
}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small package laid out like this project, digested as if it were this project."""
    base = tmp_path / "toybench"
    for name, text in FILES.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(digest, "PACKAGE", base)
    yield base
    for name in [n for n in sys.modules if n.startswith("toybench")]:
        del sys.modules[name]
    shutil.rmtree(base)


def experiment_digest() -> str:
    return digest.source(importlib.import_module("toybench.family.paper").experiment)


@pytest.mark.parametrize("name", ["family/paper.py", "family/shared.py", "lab/deep.py"])
def test_editing_what_a_method_uses_changes_its_digest(toy: Path, name: str) -> None:
    before = experiment_digest()
    (toy / name).write_text(FILES[name] + "\n# edited\n")
    assert experiment_digest() != before


@pytest.mark.parametrize("name", ["family/figures.py", "lab/other.py"])
def test_editing_what_it_does_not_use_leaves_the_digest(toy: Path, name: str) -> None:
    before = experiment_digest()
    (toy / name).write_text(FILES[name] + "\n# edited\n")
    assert experiment_digest() == before


def test_names_loaded_lazily_from_a_package_are_followed(toy: Path) -> None:
    (toy / "family/paper.py").write_text(
        FILES["family/paper.py"].replace("lab.deep.value", "lab.lazy")
    )
    before = experiment_digest()
    (toy / "lab/other.py").write_text(FILES["lab/other.py"] + "\n# edited\n")
    assert experiment_digest() != before


def in_main(
    code: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> types.FunctionType:
    """A function as if it were typed in a notebook."""
    main = types.ModuleType("__main__")
    path = tmp_path / f"cell{abs(hash(code))}.py"
    path.write_text(code)
    exec(compile(code, str(path), "exec"), main.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", main)
    return main.__dict__[name]


def test_a_notebook_function_is_digested_by_its_text_and_what_it_calls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = "import numpy as np\ndef inner(x):\n    return x + {}\n\n\n"
    text += "def f(seed):\n    return np.abs(inner(seed))\n"
    one = digest.source(in_main(text.format(1), "f", monkeypatch, tmp_path))
    two = digest.source(in_main(text.format(2), "f", monkeypatch, tmp_path))
    assert one != two


def test_a_notebook_function_may_not_use_a_global_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    f = in_main("rate = 3\ndef f(seed):\n    return seed * rate\n", "f", monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="global variable 'rate'; pass it as an argument"):
        digest.source(f)


def test_arguments_that_differ_have_different_digests() -> None:
    a = np.arange(3.0)
    seen = [
        digest.arguments({"x": v})
        for v in (1, 1.0, "1", True, None, [1], {"k": 1}, a, a.astype("f4"), a + 1, a[:2])
    ]
    assert len(set(seen)) == len(seen)
    assert digest.arguments({"x": a}) == digest.arguments({"x": a.copy()})


def test_an_argument_without_a_digest_is_named() -> None:
    with pytest.raises(TypeError, match="model: a object has no stable digest"):
        digest.arguments({"model": object()})
