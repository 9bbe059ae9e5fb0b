"""The command line: exit codes, one clear line for every error, Ctrl-C and resume."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastsel
from fastsel import cli


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTSEL_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_table(rows: int = 200) -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(rows, 3))
    lines = [f"{a:.4f},{b:.4f},{c:.4f},{int(a > b)}" for a, b, c in inputs]
    Path("points.csv").write_text("\n".join(["a,b,c,label", *lines]))


FAST = ["--target", "label", "--model", "linear", "--budget", "20steps", "--batch-size", "32"]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.endswith("\n") and error.count("\n") == 1 and "Traceback" not in error
    return error


def test_compare_a_csv_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    write_table()
    assert cli.main(["compare", "points.csv", *FAST, "--seeds", "2"]) == 0
    out = capsys.readouterr().out
    assert "[10/10] grad_norm seed 1" in out
    for word in ("full", "uniform", "big_loss", "small_loss", "grad_norm", "Goal:", "Report:"):
        assert word in out
    assert Path("fastsel-compare/points/report.html").is_file()
    assert cli.main(["compare", "points.csv", *FAST, "--seeds", "2"]) == 0
    assert capsys.readouterr().out.count("(finished earlier)") == 10


def test_quiet_prints_the_table_and_the_conclusion(capsys: pytest.CaptureFixture[str]) -> None:
    write_table()
    arguments = ["compare", "points.csv", *FAST, "--seeds", "1", "--quiet", "--out", "o"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "[1/5]" not in out and "One seed: no verdict" in out and "small_loss" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digit"], "unknown data set 'digit'. Did you mean digits?"),
        (["absent.csv"], "no such file: absent.csv"),
        (["points.csv"], "name the column to predict with --target: a, b, c, label"),
        (["points.csv", "--target", "lable"], "no column 'lable'. Did you mean label?"),
        (["text.csv", "--target", "y"], "these columns are not numbers: colour"),
        (["holes.csv", "--target", "y"], "missing values in x (2 of 12 rows)"),
        (["empty.csv", "--target", "y"], "empty.csv is empty"),
        (["points.csv", *FAST, "--rate", "2"], "rate must be above 0 and at most 1, got 2.0"),
        (["points.csv", *FAST, "--budget", "soon"], "budget must be like 30s"),
        (["points.csv", *FAST, "--strategies", "best"], "strategies must be one or more of full"),
        (["points.csv", *FAST, "--model", "cnn"], "model cnn needs images"),
        (["points.csv", *FAST, "--goal", "-1"], "goal must be a test loss above 0, got -1.0"),
        (["points.csv", *FAST, "--out", "points.csv/out"], "cannot write to the output folder"),
        (["skin", "--data-dir", "nowhere"], "data_dir names nowhere, which is not a folder"),
        (["digits", "--target", "x"], "digits has its own target"),
    ],
)
def test_bad_input_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write_table()
    rows = "\n".join(f"{i},red,{i % 2}" for i in range(12))
    Path("text.csv").write_text(f"x,colour,y\n{rows}")
    Path("holes.csv").write_text("x,y\n,0\n,1\n" + "\n".join(f"{i},{i % 2}" for i in range(10)))
    Path("empty.csv").write_text("")
    assert cli.main(["compare", *arguments]) == 2
    error = one_line(capsys)
    assert error.startswith("fastsel compare: ") and message in error
    assert not Path("fastsel-compare").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(capsys: pytest.CaptureFixture[str]) -> None:
    write_table()
    Path("locked").mkdir(mode=0o500)
    assert cli.main(["compare", "points.csv", *FAST, "--out", "locked/out"]) == 2
    assert "no permission to write in" in one_line(capsys)


def test_a_missing_package_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> object:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    write_table()
    monkeypatch.setattr("importlib.import_module", absent)
    assert cli.main(["compare", "points.csv", *FAST]) == 1
    assert "needs rich, which is not installed: pip install 'fastsel[compare]'" in one_line(capsys)


def test_a_failure_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of\nmemory")

    write_table()
    monkeypatch.setattr("fastsel.compare.runner.train_run", fail)
    assert cli.main(["compare", "points.csv", *FAST, "--quiet"]) == 1
    assert one_line(capsys) == "fastsel compare: out of memory\n"


@pytest.mark.parametrize("arguments", [[], ["compare"], ["train"], ["compare", "digits", "--no"]])
def test_usage_errors_exit_with_two(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: fastsel" in capsys.readouterr().err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("fastsel", "torch", "python", "GPU", "cpu_kernels"):
        assert word in out


def test_info_without_the_native_library(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> None:
        raise ImportError("the native library is not built")

    monkeypatch.setattr("fastsel._library.build_info", absent)
    assert cli.main(["info"]) == 1
    out = capsys.readouterr().out
    assert "the native library is not built" in out and "torch" in out


def test_ctrl_c_in_a_real_process_keeps_what_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real SIGINT to a real process; the same command then finishes what was left."""
    write_table()
    command = [sys.executable, "-m", "fastsel", "compare", "points.csv", *FAST, "--seeds", "1"]
    long = [*command, "--budget", "1000000steps", "--strategies", "uniform,big_loss"]
    short = [*command, "--strategies", "full,uniform"]
    # The package under test, installed or not, whatever the current folder is.
    root = str(Path(fastsel.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", root)
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    first = subprocess.run(short, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    before = Path("fastsel-compare/points/runs/full-0.json").read_bytes()
    process = subprocess.Popen(long, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    seen = ""
    while "redone: budget" not in seen:  # the first run is under way
        line = process.stdout.readline()
        assert line, f"ended too early: {seen}"
        seen += line
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "Stopped: 0 of 2 runs are finished and kept" in error and "Traceback" not in error
    assert Path("fastsel-compare/points/runs/full-0.json").read_bytes() == before
    again = subprocess.run(short, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("(finished earlier)") == 2
