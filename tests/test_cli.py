"""The command line: exit codes, one clear line for every error, Ctrl-C and resume."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastsel
from fastsel import cli
from fastsel.compare import DEFAULT_STRATEGIES


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
    assert "[14/14] auto seed 1" in out
    for word in (*DEFAULT_STRATEGIES, "Goal:", "Report:", "auto chose in"):
        assert word in out
    assert Path("fastsel-compare/points/report.html").is_file()
    assert cli.main(["compare", "points.csv", *FAST, "--seeds", "2"]) == 0
    assert capsys.readouterr().out.count("(finished earlier)") == 14


def test_a_single_run_is_said_to_be_one(capsys: pytest.CaptureFixture[str]) -> None:
    write_table()
    arguments = ["--strategies", "uniform", "--seeds", "1"]
    assert cli.main(["compare", "points.csv", *FAST, *arguments]) == 0
    assert "1 strategy x 1 seed = 1 run of 20 steps with linear." in capsys.readouterr().out


def test_help_shows_defaults_that_are_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main(["compare", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "share of each batch that is trained on (default: 0.3)" in text
    assert "default: None" not in text and "default: False" not in text


def test_quiet_prints_the_table_and_the_conclusion(capsys: pytest.CaptureFixture[str]) -> None:
    write_table()
    arguments = ["compare", "points.csv", *FAST, "--seeds", "1", "--quiet", "--out", "o"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "[1/7]" not in out and "One seed: no verdict" in out and "small_loss" in out


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
        (
            ["points.csv", *FAST, "--strategies", "adaselection:big_loss+best"],
            "methods must be of uniform",
        ),
        (["points.csv", *FAST, "--model", "cnn"], "model cnn needs images"),
        (["points.csv", *FAST, "--goal", "-1"], "goal must be a finite test loss above 0, got -1"),
        (
            ["points.csv", *FAST, "--goal", "inf"],
            "goal must be a finite test loss above 0, got inf",
        ),
        (["points.csv", *FAST, "--lr", "inf"], "lr must be above 0 and at most 1000, got inf"),
        (["points.csv", *FAST, "--budget", "9" * 400 + "steps"], "at most 1e+12, got inf"),
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


@pytest.mark.parametrize("debug", [False, True])
def test_a_mistake_of_ours_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, debug: bool
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("division\nby zero")

    write_table()
    monkeypatch.setattr("fastsel.compare.runner.train_run", fail)
    monkeypatch.setenv("FASTSEL_DEBUG", str(int(debug)))
    assert cli.main(["compare", "points.csv", *FAST, "--quiet"]) == 1
    *trace, last = capsys.readouterr().err.splitlines()
    assert last.startswith("fastsel compare: unexpected ZeroDivisionError: division by zero (")
    assert bool(trace) == debug and (not debug or trace[0].startswith("Traceback"))


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [False, True])
def test_names_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    """Terminal markup and emoji codes in the name of a file are characters like any other."""
    write_table()
    Path("points.csv").rename("x[bold]y[final]:key:.csv")
    screen = _Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "400")
    arguments = ["compare", "x[bold]y[final]:key:.csv", *FAST, "--seeds", "1"]
    assert cli.main([*arguments, "--out", "o"]) == 0
    # The first line, and the caption of the table.
    assert screen.getvalue().count("x[bold]y[final]:key:") == 2


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


def python(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A new interpreter that imports fastsel from `root`, whatever is installed."""
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture
def unbuilt(tmp_path: Path) -> Path:
    """Root of a copy of the package whose native library was never built."""
    leave_out = shutil.ignore_patterns("lib", "__pycache__")
    shutil.copytree(Path(fastsel.__file__).parent, tmp_path / "copy/fastsel", ignore=leave_out)
    return tmp_path / "copy"


COMMANDS = [["info"], ["compare", "points.csv", *FAST]]
IMPORTS = ["from fastsel import topk", "import fastsel; fastsel.SelectiveStep",
           "import fastsel.select"]  # fmt: skip


@pytest.mark.parametrize("arguments", COMMANDS, ids=["info", "compare"])
def test_a_missing_native_library_is_one_clear_line(unbuilt: Path, arguments: list[str]) -> None:
    write_table()
    done = python(unbuilt, "-m", "fastsel", *arguments)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    start = f"fastsel {arguments[0]}: fastsel's native library is not built: run `pip install"
    assert done.stderr.startswith(start)
    assert ("torch" in done.stdout) == (arguments == ["info"])  # the versions help to find out why


@pytest.mark.parametrize("arguments", COMMANDS, ids=["info", "compare"])
def test_an_old_torch_is_one_clear_line(arguments: list[str]) -> None:
    write_table()
    # What the console script does, after a torch that says it is older.
    code = (
        "import sys, torch; torch.__version__ = torch.torch_version.TorchVersion('2.9.1')\n"
        f"from fastsel.cli import main; sys.exit(main({arguments}))"
    )
    done = python(Path(fastsel.__file__).parents[1], "-c", code)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"fastsel {arguments[0]}: fastsel ")
    assert "needs torch >= 2.10, found 2.9.1: pip install 'torch>=2.10'" in done.stderr


@pytest.mark.parametrize("code", IMPORTS)
def test_a_missing_native_library_is_an_import_error(unbuilt: Path, code: str) -> None:
    done = python(unbuilt, "-c", code)
    last = done.stderr.rstrip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("ImportError: fastsel's native library is not built")


def test_importing_registers_the_operators() -> None:
    root = Path(fastsel.__file__).parents[1]
    code = "import torch, fastsel; print(torch.ops.fastsel.topk(torch.arange(3.0), 1)[1].item())"
    assert python(root, "-c", code).stdout == "2\n"


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
    (full,) = Path("fastsel-compare/points/runs").glob("full-0-*.json")
    before = full.read_bytes()
    process = subprocess.Popen(long, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    seen = ""
    while "trained anew: budget" not in seen:  # the first run is under way
        line = process.stdout.readline()
        assert line, f"ended too early: {seen}"
        seen += line
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "Stopped: 0 of 2 runs are finished and kept" in error and "Traceback" not in error
    assert full.read_bytes() == before
    again = subprocess.run(short, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("(finished earlier)") == 2
