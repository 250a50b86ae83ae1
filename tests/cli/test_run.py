from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import psutil
import pytest

from workbench.cli import kernels, runner

pytestmark = pytest.mark.xdist_group("cli-run")  # one worker: shared fixtures

State = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def states(ran: Any) -> State:
    return {line["family"]: line for line in ran.json("summary.json")["notebooks"]}


def test_one_failure_does_not_take_the_others_down(ran: Any, states: State) -> None:
    assert {name: line["state"] for name, line in states.items()} == {
        "optics": "ok",
        "acoustics": "failed",
        "mortal": "died",
    }
    assert ran.code == 1


def test_a_failure_is_named_by_family_cell_and_paper(ran: Any, states: State) -> None:
    suite = ElementTree.parse(ran.home.runs[-1] / "junit.xml").getroot()[0]
    cases = {case.get("name"): case for case in suite}
    message = str(cases["acoustics"].find("failure").get("message"))
    assert "family acoustics" in message and "id broken" in message and "paper echo" in message
    assert "no sound <here>" in message
    assert "ValueError" in str(cases["acoustics"].find("failure").text)
    assert "the kernel died" in str(cases["mortal"].find("error").get("message"))
    assert cases["mortal"].find("error").text == "farewell"
    assert list(cases["optics"]) == [] and list(cases["lens.identity"]) == []
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("4", "1", "1")
    assert "no sound <here>" in ran.said and "id broken" in ran.said
    assert states["acoustics"]["cell_id"] == "broken"


def test_the_executed_notebook_is_kept_up_to_the_failing_cell(ran: Any) -> None:
    cells = {
        c["id"]: c for c in ran.home.read(f"runs/{ran.home.runs[-1].name}/acoustics.ipynb").cells
    }
    assert cells["before"].outputs[0].text == "so far\n"
    assert cells["broken"].outputs[0].ename == "ValueError"
    assert cells["after"].outputs == []


def test_claims_are_collected_and_shown(ran: Any, states: State) -> None:
    claims = ran.json("claims.json")
    assert [(c["paper"], c["claim"], c["verdict"], c["scale"]) for c in claims] == [
        ("lens", "main", "holds", "smoke"),
        ("lens", "identity", "holds", "smoke"),
    ]
    assert states["optics"]["verdicts"] == {"lens": "holds"}
    assert "1 (0.5 to 1.5) points" in ran.said and "2 new" in ran.said


def test_each_kernel_has_its_own_folders_and_its_share_of_cores(ran: Any) -> None:
    cells = {c["id"]: c for c in ran.home.read(f"runs/{ran.home.runs[-1].name}/optics.ipynb").cells}
    seen = json.loads(cells["kernel"].outputs[0].text)
    share = str(max(1, kernels.cores() // 2))
    assert seen["OMP_NUM_THREADS"] == seen["WORKBENCH_JOBS"] == share
    assert seen["WORKBENCH_HEADLESS"] == "1" and seen["WORKBENCH_EXECUTOR"] == "sequential"
    assert os.path.realpath(seen["python"]) == os.path.realpath(sys.executable)
    for name in ("IPYTHONDIR", "MPLCONFIGDIR"):
        assert "wb-" in seen[name] and not os.path.exists(seen[name])


def test_no_widget_state_is_stored(ran: Any) -> None:
    executed = ran.home.read(f"runs/{ran.home.runs[-1].name}/optics.ipynb")
    assert "widgets" not in executed.metadata


def test_costs_are_measured(states: State) -> None:
    assert 20 < states["optics"]["peak_mb"] < 2000
    assert 0 < states["optics"]["seconds"] < 120


def test_the_ledger_is_untouched_without_record(ran: Any) -> None:
    assert not (ran.home.root / "data" / "ledger.csv").exists()
    assert not (ran.home.root / "data" / "timings.csv").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("optic",), "no notebook is called 'optic'; there is optics"),
        (("optics", "-p", "typo", "3"), "optics: no parameter is called 'typo'; known: scale"),
        (("optics", "-p", "effect", "big"), "effect: expected float, got 'big'"),
        (("optics", "-p", "scale", "huge"), "scale: expected smoke, laptop, gpu, got 'huge'"),
        (("optics", "--device", "cuda:77"), "device: 'cuda:77' cannot be used here"),
        (("optics", "-p", "effect"), "takes two values"),
        (("optics", "-p", "effect=2", "acoustics"), "takes two values"),
        (("optics", "--scale", "huge"), "huge"),
    ],
)
def test_wrong_use_starts_nothing(
    command: Callable[..., Any], words: tuple[str, ...], said: str
) -> None:
    done = command("run", *words)
    assert done.code == 2
    assert said in done.said
    assert done.home.runs == []


def test_without_notebooks_there_is_nothing_to_run(command: Callable[..., Any], home: Any) -> None:
    for file in (home.root / "notebooks").glob("*"):
        file.unlink()
    done = command("run")
    assert done.code == 2 and "no notebook in" in done.said


def test_the_index_comes_last(home: Any) -> None:
    home.put("index", ("parameters", "seed: int = 0"))
    home.put("aardvark", ("parameters", "seed: int = 0"))
    assert list(runner.notebooks()) == ["optics", "acoustics", "aardvark", "index"]


def test_help_documents_the_exit_codes(command: Callable[..., Any]) -> None:
    said = command("run", "--help").said
    for code in ("0 all ran", "1 a notebook failed", "2 wrong use", "3 an identity", "130"):
        assert code in said


def test_interrupting_keeps_finished_work_and_leaves_no_kernel(home: Any) -> None:
    """SIGINT to a run that has one notebook finished, one running and one waiting."""
    started = home.root / "started"
    home.put(
        "acoustics",
        ("parameters", "scale: str = 'laptop'"),
        ("done", "print('done')"),
        (
            "long",
            f"import os, time\nopen({str(started)!r}, 'w').write(str(os.getpid()))\ntime.sleep(99)",
        ),
    )
    home.put("zoology", ("parameters", "scale: str = 'laptop'"))
    command = [sys.executable, "-m", "workbench", "run", "--scale", "smoke", "--jobs", "1"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ)
    )
    try:
        deadline = time.monotonic() + 100
        while not (started.exists() and started.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, process.stdout
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Interrupted." in said and "Traceback" not in said
    folder = home.runs[-1]
    states = {
        x["family"]: x["state"]
        for x in json.loads((folder / "summary.json").read_text())["notebooks"]
    }
    assert states == {"optics": "ok", "acoustics": "interrupted", "zoology": "interrupted"}
    assert [c["claim"] for c in json.loads((folder / "claims.json").read_text())] == [
        "main",
        "identity",
    ]
    skipped = ElementTree.parse(folder / "junit.xml").getroot()[0].get("skipped")
    assert skipped == "2"
    cells = {c["id"]: c for c in home.read(f"runs/{folder.name}/acoustics.ipynb").cells}
    assert cells["done"].outputs[0].text == "done\n"
    kernel = int(started.read_text())
    assert not psutil.pid_exists(kernel) or psutil.Process(kernel).status() == psutil.STATUS_ZOMBIE


def test_a_cell_that_takes_too_long_is_a_failure(command: Callable[..., Any], home: Any) -> None:
    home.put(
        "optics", ("parameters", "scale: str = 'laptop'"), ("slow", "import time; time.sleep(60)")
    )
    done = command("run", "optics", "--timeout", "1")
    assert done.code == 1
    assert "one cell took more than 1 s" in done.said and "id slow" in done.said


@pytest.mark.parametrize(("config", "tries"), [({}, 2), ({"KernelManager": {}}, 1)])
def test_over_tcp_a_kernel_that_dies_before_its_first_cell_is_tried_once_more(
    home: Any, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], tries: int
) -> None:
    import papermill
    from traitlets.config import Config

    asked: list[str] = []

    def execute(source: Any, output: Any, values: Any, **_: Any) -> None:
        asked.append(str(source))
        raise RuntimeError("Kernel died before replying to kernel_info")

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    monkeypatch.setattr(kernels, "_config", lambda folder: Config(config))
    file = home.root / "notebooks" / "optics.ipynb"
    job = runner.Job("optics", file, home.root / "out.ipynb", {})
    assert [j.state for j in runner.run([job], runner.Settings(), lambda _: None)] == ["failed"]
    assert len(asked) == tries and "Kernel died before replying" in job.error
