"""The command line: `fastsel compare`, `fastsel diagnose` and `fastsel info`.

Exit codes: 0 done, 1 something failed, 2 bad input, 130 stopped with Ctrl-C. Errors are one line on
stderr; with ``FASTSEL_DEBUG=1`` in the environment a failure's traceback comes before it.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_FAILED, _BAD_INPUT, _INTERRUPTED = 1, 2, 130


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there are any; the other options say in words what happens."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastsel", description="Train on fewer, better-chosen samples."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser(
        "compare",
        help="find out which selection strategy pays on your data",
        description="Train with every strategy under equal conditions and tell which one pays.",
        formatter_class=_Help,
    )
    add = compare.add_argument
    add("data", metavar="DATA",
        help="digits, skin, bike, covtype, higgs, mnist, fashion-mnist, cifar10, or a .csv, "
        ".csv.gz, .parquet or .npz file")  # fmt: skip
    add("--target", metavar="COL", help="column of a file to predict")
    add("--task", choices=("classification", "regression"), help="default: seen from the target")
    add("--strategies", metavar="A,B,...",
        default="full,uniform,big_loss,small_loss,grad_norm,adaselection,auto",
        help="full is the plain step on the whole batch, auto chooses only while that pays; also "
        "adaboost, coreset1, coreset2, rho_loss, entropy, margin, importance, mixtures such as "
        "adaselection:big_loss+small_loss, and all")  # fmt: skip
    add("--model", default="auto", help="auto, linear, mlp, cnn, small_cnn or resnet18")
    add("--budget", help="per run: 2000steps, 5epochs, 100000samples, 30s or 5min of training; "
        "default: 20 epochs, 200 to 600 steps")  # fmt: skip
    add("--seeds", type=int, default=3, metavar="N", help="number of seeds")
    add("--rate", type=float, default=0.3, help="share of each batch that is trained on")
    add("--batch-size", type=int, default=128, metavar="B", help="rows per batch")
    add("--optimizer", choices=("adam", "sgd"), default="adam", help="sgd has momentum 0.9")
    add("--lr", type=float, help="learning rate; default: 0.01 for linear and for sgd, else 0.001")
    add("--goal", type=float, metavar="LOSS",
        help="test loss to reach; default: uniform's final one, seed by seed")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="default: fastsel-compare/<data name>")
    add("--data-dir", type=Path, metavar="DIR", help="default: $FASTSEL_DATA_DIR, then the cache")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="where to train")
    add("--threads", type=int, metavar="N", help="default: torch's own choice")
    add("--quiet", action="store_true", help="only the table and the conclusion")
    diagnose = commands.add_parser(
        "diagnose",
        help="find out whether near-neighbour batches will pay on your data",
        description="Train for a while and compare the gradients of all samples with those of "
        "neighbours of the largest.",
        formatter_class=_Help,
    )
    add = diagnose.add_argument
    add("data", metavar="DATA", help="as of compare")
    add("--target", metavar="COL", help="column of a file to predict")
    add("--task", choices=("classification", "regression"), help="default: seen from the target")
    add("--model", default="auto", help="auto, linear, mlp, cnn, small_cnn or resnet18")
    add("--steps", type=int, default=200, metavar="N", help="training steps")
    add("--neighbors", type=int, default=32, metavar="K", help="neighbours of each sample")
    add("--top", type=int, default=32, metavar="N", help="largest gradients to look around")
    add("--rows", type=int, default=20_000, metavar="N", help="samples to look at, at most")
    add("--seed", type=int, default=0, help="of weights, batches and draws")
    add("--out", type=Path, metavar="DIR", help="default: fastsel-diagnose/<data name>")
    add("--data-dir", type=Path, metavar="DIR", help="default: $FASTSEL_DATA_DIR, then the cache")
    commands.add_parser("info", help="versions, processor, GPU, and what is compiled and loaded")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; by default those of the process.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    command = {"compare": _compare, "diagnose": _diagnose, "info": _info}[options.command]
    try:
        return command(options)
    except KeyboardInterrupt:
        print(f"fastsel {options.command}: stopped", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        if os.environ.get("FASTSEL_DEBUG") == "1":
            traceback.print_exc()
        print(f"fastsel {options.command}: {_failure(error)}", file=sys.stderr)
        return _FAILED


def _failure(error: Exception) -> str:
    if isinstance(error, ImportError | OSError | RuntimeError | MemoryError):
        return _one_line(error)  # the machine's or the installation's, in words of its own
    return (
        f"unexpected {type(error).__name__}: {_one_line(error)} (FASTSEL_DEBUG=1 shows where it "
        "came from)"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _compare(options: argparse.Namespace) -> int:
    from fastsel.compare import CompareError, compare, write_report
    from fastsel.compare.budget import parse_budget
    from fastsel.compare.display import make_display, print_result
    from fastsel.compare.runner import DEFAULT_OUT
    from fastsel.compare.store import Store
    from fastsel.data import DataError, load
    from fastsel.data.load import short_name
    from fastsel.data.optional import require

    for module in ("rich", "matplotlib"):  # missed now, not after an hour of training
        require(module, "fastsel compare")
    try:
        # Everything that can be refused without reading data is refused first.
        out = options.out or DEFAULT_OUT / short_name(options.data)
        Store(out).check()
        budget = parse_budget(options.budget) if options.budget else None
        data = load(
            options.data, target=options.target, task=options.task, data_dir=options.data_dir
        )
        with make_display(quiet=options.quiet) as display:
            comparison = compare(
                data,
                strategies=[name.strip() for name in options.strategies.split(",")],
                model=options.model,
                budget=budget,
                seeds=options.seeds,
                rate=options.rate,
                batch_size=options.batch_size,
                optimizer=options.optimizer,
                lr=options.lr,
                goal=options.goal,
                out=out,
                device=options.device,
                threads=options.threads,
                on_event=display,
            )
    except (DataError, CompareError) as error:
        print(f"fastsel compare: {_one_line(error)}", file=sys.stderr)
        return _BAD_INPUT
    print_result(comparison)
    print(f"Report: {write_report(comparison)}")
    if comparison.interrupted:
        print(
            f"Stopped: {len(comparison.runs)} of {comparison.planned} runs are finished and kept "
            f"in {comparison.out}. The same command again goes on from there.",
            file=sys.stderr,
        )
        return _INTERRUPTED
    return 0


def _diagnose(options: argparse.Namespace) -> int:
    from fastsel.compare import CompareError
    from fastsel.data import DataError, load
    from fastsel.data.load import short_name
    from fastsel.data.optional import require
    from fastsel.diagnose import Suitability, diagnose

    require("matplotlib", "fastsel diagnose")  # missed now, not after training

    def show(step: int, found: Suitability) -> None:
        print(
            f"step {step:>6}: mean gradient norm {found.mean_norm:.3g}, around the largest "
            f"{found.neighbor_norm:.3g} ({found.ratio:.2f} times)",
            flush=True,
        )

    try:
        data = load(
            options.data, target=options.target, task=options.task, data_dir=options.data_dir
        )
        found = diagnose(
            data,
            model=options.model,
            steps=options.steps,
            neighbors=options.neighbors,
            top=options.top,
            rows=options.rows,
            seed=options.seed,
            on_progress=show,
        )
    except (DataError, CompareError) as error:
        print(f"fastsel diagnose: {_one_line(error)}", file=sys.stderr)
        return _BAD_INPUT
    print(found.verdict)
    folder = options.out or Path("fastsel-diagnose") / short_name(options.data)
    for path in found.write(folder):
        print(f"Written: {path}")
    return 0


def _info(options: argparse.Namespace) -> int:
    import torch

    from fastsel import _library
    from fastsel._version import __version__

    facts: dict[str, Any] = {
        "fastsel": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch CUDA": torch.version.cuda or "none (CPU build)",
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            facts[f"GPU {i}"] = f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})"
    else:
        facts["GPU"] = "none that torch can use"
    try:
        native = _library.build_info()
        native.pop("version")  # shown above
        facts.update(native)
    finally:  # without the native library the versions help to find out why
        width = max(map(len, facts))
        for name, value in facts.items():
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            print(f"{name:<{width}}  {text}")
    return 0
