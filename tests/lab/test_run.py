"""``lab.start`` and ``run.seeds``: resumable, cached, and equal whoever computes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import experiments_for_tests as experiments
import numpy as np
import pandas as pd
import pytest
import torch

from workbench import lab
from workbench.lab.run import Run

HERE = Path(__file__).parent


def same(a: pd.DataFrame, b: pd.DataFrame) -> None:
    """Frames equal to the last bit, arrays in cells included."""
    assert list(a.columns) == list(b.columns)
    for column in a:
        for x, y in zip(a[column], b[column], strict=True):
            assert np.array_equal(x, y), column


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_start_takes_only_known_scales_devices_and_seeds() -> None:
    with pytest.raises(ValueError, match="scale: expected one of smoke, laptop, gpu, got 'huge'"):
        lab.start("huge")
    with pytest.raises(ValueError, match="device: 'abacus'"):
        lab.start(device="abacus")
    with pytest.raises(TypeError, match="seed: expected an integer, got '7'"):
        lab.start(seed="7")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="jobs"):
        lab.start(jobs=0)


def test_pick_chooses_by_scale() -> None:
    assert lab.start("smoke").pick(smoke=1, laptop=2, gpu=3) == 1
    assert lab.start("laptop").pick(smoke=1, laptop=2, gpu=3) == 2


def test_start_leaves_global_generators_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    run = lab.start("smoke", seed=5)
    assert run.rng.random() == np.random.default_rng(5).random()
    assert torch.equal(torch.rand(1), expected)


def test_a_grid_gives_one_row_a_combination_and_seed(own_cache: Path) -> None:
    run = lab.start("smoke", seed=3, jobs=1)
    frame = run.seeds(experiments.draw, n=2, grid={"size": [4, 8], "shift": [0.0, 1.0]})
    assert frame[["size", "shift", "seed"]].values.tolist() == [
        [s, d, i] for s in (4, 8) for d in (0.0, 1.0) for i in (3, 4)
    ]
    assert frame["name"].tolist() == ["s3", "s4"] * 4


def test_one_worker_two_workers_and_threads_give_equal_frames(tmp_path: Path) -> None:
    frames = []
    for jobs, executor in ((1, "sequential"), (2, "loky")):
        os.environ["WORKBENCH_CACHE"] = str(tmp_path / executor)
        try:
            frames.append(
                lab.start("smoke", jobs=jobs, executor=executor).seeds(experiments.draw, n=4)
            )
        finally:
            del os.environ["WORKBENCH_CACHE"]
    same(*frames)
    assert frames[1].attrs["new"] == 4


def test_a_dask_cluster_gives_the_same_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two worker processes, chosen once by argument and once by environment variable."""
    distributed = pytest.importorskip("dask.distributed")
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "one"))
    alone = lab.start("smoke", jobs=1).seeds(experiments.draw, n=4)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "two"))
        run = lab.start("smoke", executor=cluster.scheduler_address)
        same(run.seeds(experiments.draw, n=4), alone)
        monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "three"))
        monkeypatch.setenv("WORKBENCH_EXECUTOR", cluster.scheduler_address)
        again = lab.start("smoke").seeds(experiments.draw, n=4)
        same(again, alone)
        assert again.attrs["new"] == 4


def test_an_unknown_executor_is_named(own_cache: Path) -> None:
    with pytest.raises(ValueError, match="executor: expected loky.*got 'cloud'"):
        lab.start("smoke", jobs=2, executor="cloud").seeds(experiments.draw, n=2)


def test_results_are_computed_once(own_cache: Path, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    calls.mkdir()
    run = lab.start("smoke", jobs=1)
    first = run.seeds(experiments.count, n=3, folder=str(calls))
    second = run.seeds(experiments.count, n=5, folder=str(calls))
    assert (first.attrs["new"], second.attrs["new"]) == (3, 2)
    assert len(files(calls)) == 5
    same(second.head(3), first)


def test_a_failing_seed_is_named_and_the_others_stay(own_cache: Path) -> None:
    run = lab.start("smoke", jobs=1)
    with pytest.raises(
        RuntimeError, match=r"fail\(seed=2\) failed: ZeroDivisionError\('third seed'\)"
    ):
        run.seeds(experiments.fail, n=3)
    assert run.seeds(experiments.fail, n=2).attrs["new"] == 0


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
import experiments_for_tests as experiments
from workbench import lab
frame = lab.start("smoke", jobs={jobs}).seeds(experiments.count, n=8, folder={calls!r}, wait={wait})
print("new", frame.attrs["new"])
"""


def script(calls: Path, cache: Path, *, jobs: int, wait: float) -> subprocess.Popen[str]:
    code = textwrap.dedent(SCRIPT).format(here=str(HERE), jobs=jobs, calls=str(calls), wait=wait)
    env = {**os.environ, "WORKBENCH_CACHE": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_run_killed_in_the_middle_resumes(tmp_path: Path) -> None:
    """SIGKILL after some results are stored: only the unfinished seeds are computed again."""
    calls, cache = tmp_path / "calls", tmp_path / "cache"
    calls.mkdir()
    process = script(calls, cache, jobs=2, wait=0.5)
    deadline = time.monotonic() + 60
    while len(list(cache.rglob("*.npz"))) < 3:
        assert time.monotonic() < deadline and process.poll() is None, process.stderr
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    stored = len(list(cache.rglob("*.npz")))
    assert 3 <= stored < 8
    for name in files(calls):
        (calls / name).unlink()
    out, err = script(calls, cache, jobs=1, wait=0.5).communicate(timeout=60)
    assert f"new {8 - stored}" in out, err
    assert len(files(calls)) == 8 - stored


def test_two_processes_share_one_cache(tmp_path: Path) -> None:
    calls, cache = tmp_path / "calls", tmp_path / "cache"
    calls.mkdir()
    both = [script(calls, cache, jobs=1, wait=0.05) for _ in range(2)]
    for process in both:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "damaged" not in err, err
    assert len(list(cache.rglob("*.npz"))) == 8
    assert not list(cache.rglob("*.part"))


def test_a_truncated_file_is_computed_again_with_a_warning(own_cache: Path, tmp_path: Path) -> None:
    run = lab.start("smoke", jobs=1)
    first = run.seeds(experiments.draw, n=3)
    victim = sorted(own_cache.rglob("*.npz"))[0]
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.warns(UserWarning, match="is damaged.*computed again"):
        second = run.seeds(experiments.draw, n=3)
    assert second.attrs["new"] == 1
    same(first, second)


def test_without_a_writable_cache_there_is_one_warning_and_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file stands where the folder should be, which no user, not even root, can write into."""
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    monkeypatch.setenv("WORKBENCH_CACHE", str(blocked))
    run = lab.start("smoke", jobs=1)
    with pytest.warns(UserWarning, match="cache cannot be written") as caught:
        frame = run.seeds(experiments.draw, n=3)
        run.seeds(experiments.draw, n=2)
    assert len(frame) == 3 and len(caught) == 1


def test_a_full_disk_is_no_error(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        frame = lab.start("smoke", jobs=1).seeds(experiments.draw, n=2)
    assert len(frame) == 2
    assert not list(own_cache.rglob("*.part")), "a half-written file was left behind"


def test_results_of_a_wrong_kind_are_named(own_cache: Path) -> None:
    with pytest.raises(TypeError, match=r"returns_object\(seed=0\): 'model' is a object"):
        lab.start("smoke", jobs=1).seeds(returns_object, n=1)
    with pytest.raises(TypeError, match="expected a dictionary, got int"):
        lab.start("smoke", jobs=1).seeds(returns_number, n=1)
    with pytest.raises(ValueError, match="grid: 'size' is given twice"):
        lab.start("smoke").seeds(experiments.draw, n=1, size=3, grid={"size": [1]})


def returns_object(seed: int) -> dict[str, object]:
    return {"model": object()}


def returns_number(seed: int) -> int:
    return seed


def test_the_device_reaches_an_experiment_that_asks_for_it(own_cache: Path) -> None:
    frame = Run("smoke", torch.device("cpu"), 0, 1, "loky").seeds(where, n=1)
    assert frame["device"].tolist() == ["cpu"]


def where(seed: int, device: str) -> dict[str, str]:
    return {"device": device}
