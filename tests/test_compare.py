"""`fastsel compare`: fair runs, exact resume, an honest verdict, and a folder nobody loses."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from compare_samples import losses, settings, table

from fastsel.compare import CompareError, parse_budget
from fastsel.compare.batches import BatchOrder
from fastsel.compare.budget import Budget, default_budget
from fastsel.compare.models import make_model, resolve_model
from fastsel.compare.run import Run
from fastsel.compare.strategies import DEFAULT_STRATEGIES, STRATEGIES, resolve_strategies
from fastsel.compare.training import Training, train_run
from fastsel.data import Dataset
from fastsel.data.dataset import split_dataset

# ---- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2000steps", Budget(2000, "steps")),
        ("1_000 Steps", Budget(1000, "steps")),
        ("1step", Budget(1, "steps")),
        ("1.5epochs", Budget(1.5, "epochs")),
        ("100000samples", Budget(100_000, "samples")),
        ("30s", Budget(30, "seconds")),
        ("2min", Budget(120, "seconds")),
        ("1h", Budget(3600, "seconds")),
    ],
)
def test_parse_budget(text: str, expected: Budget) -> None:
    assert parse_budget(text) == expected
    assert parse_budget(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    ["", "10", "steps", "-5steps", "0steps", "1.5steps", "5 parsecs", "9" * 400 + "steps",
     "1000000000001s", "9" * 20 + "h"],
)  # fmt: skip
def test_parse_budget_refuses(text: str) -> None:
    with pytest.raises(CompareError, match="budget must be"):
        parse_budget(text)


@pytest.mark.parametrize("amount", [math.inf, math.nan, -1.0, 1.5])
def test_no_budget_is_senseless(amount: float) -> None:
    with pytest.raises(CompareError, match="budget must be a whole number of steps above 0 and"):
        Budget(amount, "steps")


def test_epochs_become_steps_and_the_default_is_bounded() -> None:
    assert Budget(1.5, "epochs").in_steps(11) == Budget(17, "steps")
    assert [default_budget(n).amount for n in (1, 11, 20, 10_000)] == [200, 220, 400, 600]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategies": ("uniform", "best")}, "strategies must be .* got uniform, best"),
        ({"strategies": ()}, "got none"),
        (
            {"strategies": ("adaselection:best",)},
            "strategies must be .* methods must be of uniform",
        ),
        ({"strategies": ("uniform:big_loss",)}, "uniform takes nothing after its name"),
        ({"strategies": ("all", "all", "best")}, "got full, .*auto, best"),
        ({"optimizer": "rmsprop"}, "optimizer must be adam or sgd, got 'rmsprop'"),
        ({"strategies": ("uniform", "uniform")}, "each once"),
        ({"rate": 0.0}, "rate must be above 0 and at most 1, got 0.0"),
        ({"rate": 1.5}, "rate must be"),
        ({"rate": math.nan}, "rate must be"),
        ({"lr": -1.0}, "lr must be above 0 and at most 1000, got -1.0"),
        ({"lr": math.inf}, "lr must be above 0 and at most 1000, got inf"),
        ({"lr": math.nan}, "lr must be above 0 and at most 1000, got nan"),
        ({"lr": 1e39}, "lr must be above 0 and at most 1000"),  # not even a float32
        ({"seeds": 0}, "seeds must be at least 1 and at most 1000, got 0"),
        ({"seeds": 10**12}, "seeds must be at least 1 and at most 1000, got 1000000000000"),
        ({"threads": 10**12}, "threads must be at least 1 and at most 1024"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"model": "vgg"}, "model must be auto, linear, .* got 'vgg'"),
        ({"model": "cnn"}, "model cnn needs images, halves is a table"),
        ({"device": "tpu"}, "device must be cpu or cuda"),
        ({"model": "mlp", "rate": 0.01}, "batch norm, which needs two"),
    ],
)
def test_bad_settings(changes: dict[str, object], message: str) -> None:
    with pytest.raises(CompareError, match=message):
        settings(table(), **changes)


def test_all_strategies_are_those_that_fit_the_task() -> None:
    mixture = "adaselection:big_loss+small_loss"
    assert resolve_strategies(["all"], "classification") == STRATEGIES
    assert resolve_strategies([mixture, "all", "uniform"], "classification") == (
        *STRATEGIES, mixture
    )  # fmt: skip
    fitting = resolve_strategies(["all"], "regression")
    assert set(STRATEGIES) - set(fitting) == {"entropy", "margin"}
    assert set(DEFAULT_STRATEGIES) <= set(STRATEGIES)


@pytest.mark.parametrize("name", ["entropy", "margin", "adaselection:big_loss+margin"])
def test_a_regression_has_no_class_probabilities(name: str) -> None:
    with pytest.raises(CompareError, match=re.escape(f"strategy {name} looks at class prob")):
        settings(table("regression"), strategies=("uniform", name))


def test_sgd_has_the_papers_learning_rate_and_momentum() -> None:
    data = table()
    plan = settings(data, optimizer="sgd", model="mlp")
    assert plan.lr == 0.01 and settings(data, model="mlp").lr == 0.001
    optimizer = Training(data, plan, "full", 0).optimizer
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"] == 0.9
    one, other = (train_run(data, settings(data, optimizer=o), "full", 0) for o in ("sgd", "adam"))
    assert losses(one) != losses(other)


# ---- models ------------------------------------------------------------------------------------


def images(side: int, channels: int = 3) -> Dataset:
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(40, channels, side, side)).astype(np.float32)
    return split_dataset(
        "images", pixels, np.arange(40) % 10, task="classification",
        classes=tuple(map(str, range(10))),
    )  # fmt: skip


def test_models_have_the_published_sizes() -> None:
    def parameters(name: str, data: Dataset) -> int:
        return sum(p.numel() for p in make_model(name, data, 0).parameters())

    # ResNet-18 with the CIFAR stem and ten classes: 11.17 M, the count commonly reported.
    assert parameters("resnet18", images(32)) == 11_173_962
    convolutions = 9 * (3 * 16 + 16 * 32 + 32 * 64)
    assert parameters("small_cnn", images(32)) == convolutions + 2 * (16 + 32 + 64) + 257 * 10
    widths = [4, 2048, 512, 128, 2]
    dense = sum((a + 1) * b for a, b in itertools.pairwise(widths))
    assert parameters("mlp", table()) == dense + 2 * (2048 + 512 + 128)


@pytest.mark.parametrize("name", ["linear", "mlp", "cnn", "small_cnn", "resnet18"])
def test_models_map_a_batch_to_logits(name: str) -> None:
    data = images(16)
    assert make_model(name, data, 0)(data.train_inputs[:4]).shape == (4, 10)


def test_regression_models_give_one_number_a_row() -> None:
    data = table("regression")
    assert make_model("mlp", data, 0)(data.train_inputs[:4]).shape == (4,)


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (make_model("mlp", table(), seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["1.weight"], other["1.weight"])


def test_auto_model() -> None:
    assert resolve_model("auto", images(8)) == "cnn"
    assert resolve_model("auto", images(4)) == "mlp"
    assert resolve_model("auto", table()) == "mlp"


# ---- one run -----------------------------------------------------------------------------------


def test_batches_visit_every_row_once_an_epoch() -> None:
    batches = BatchOrder(10, 3, seed=0)
    epoch = torch.cat([batches.next_batch() for _ in range(3)])
    assert len(set(epoch.tolist())) == 9
    again = BatchOrder(10, 3, seed=0)
    assert torch.equal(epoch, torch.cat([again.next_batch() for _ in range(3)]))
    state = again.state_dict()
    ahead = [batches.next_batch() for _ in range(7)]
    resumed = BatchOrder(10, 3, seed=9)
    resumed.load_state_dict(state)
    assert all(torch.equal(a, resumed.next_batch()) for a in ahead)


MIXTURES = ("adaselection:big_loss+small_loss+rho_loss", "adaselection:uniform+entropy")
# These shun what is hard, or what is not average, and need not learn anything.
TIMID = ("small_loss", "coreset2")
RUNS = [
    *(("classification", name) for name in (*STRATEGIES, *MIXTURES)),
    *(("regression", name) for name in resolve_strategies(["all"], "regression")),
]


@pytest.mark.parametrize(("task", "strategy"), RUNS)
def test_a_run_learns_is_counted_and_repeats(task: str, strategy: str) -> None:
    data = table(task)
    run = train_run(data, settings(data, strategies=(strategy,)), strategy, 0)
    assert [p.step for p in run.curve] == [0, 4, 8, 12, 16, 20, 24]
    assert all(a.seconds < b.seconds for a, b in itertools.pairwise(run.curve))
    assert math.isclose(sum(run.seconds.values()), run.final.seconds, rel_tol=1e-9)
    assert run.cpu_seconds > 0 and run.excluded == 0
    # What the reference models saw counts, too: two of them, three batches each.
    prepared = 2 * 3 * 32 if "rho_loss" in strategy else 0
    assert run.curve[0].samples == prepared and (run.seconds["prepare"] > 0) == (prepared > 0)
    if strategy == "auto":  # whose decisions go by the clock
        assert run.switch is not None and 24 * 8 <= run.final.samples <= 24 * 32
    else:
        assert run.switch is None
        assert run.final.samples == prepared + 24 * (32 if strategy == "full" else 8)
        assert losses(run) == losses(train_run(data, settings(data), strategy, 0))
    if strategy not in TIMID:
        assert run.final.test_loss < run.curve[0].test_loss
    assert (run.final.accuracy is None) == (run.final.r2 is not None)


def test_strategies_share_weights_and_batches() -> None:
    data = table()
    runs = [train_run(data, settings(data), name, 3) for name in DEFAULT_STRATEGIES]
    assert len({run.curve[0].test_loss for run in runs}) == 1
    trainings = [Training(data, settings(data), name, 3) for name in STRATEGIES]
    orders = [[t.batches.next_batch().tolist() for _ in range(20)] for t in trainings]
    assert all(order == orders[0] for order in orders)


def test_choosing_everything_is_the_plain_step() -> None:
    data = table()
    whole = settings(data, rate=1.0)
    assert losses(train_run(data, whole, "uniform", 0)) == losses(train_run(data, whole, "full", 0))


def test_regression_is_reported_in_its_own_units() -> None:
    data = table("regression")
    final = train_run(data, settings(data), "full", 0).final
    assert final.rmse is not None and final.r2 is not None
    assert math.isclose(final.rmse, math.sqrt(final.test_loss) * data.target_std, rel_tol=1e-9)
    assert data.target_std > 10  # so that the units show


@pytest.mark.parametrize(
    "strategy",
    ["uniform", "grad_norm", "full", "rho_loss", "importance", "adaselection", *MIXTURES],
)
def test_a_resumed_run_is_the_same_run(strategy: str) -> None:
    data = table()
    saved = io.BytesIO()

    def save(training: Training) -> None:
        if training.steps == 10:
            torch.save(training.state_dict(), saved)

    whole = train_run(data, settings(data), strategy, 0, on_step=save)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    resumed = train_run(data, settings(data), strategy, 0, state=state)
    assert losses(resumed) == losses(whole)
    assert resumed.method_weights == whole.method_weights
    assert resumed.curve[:3] == whole.curve[:3]  # the clock goes on, too
    assert resumed.seconds["prepare"] == whole.seconds["prepare"]


def test_a_run_that_diverges_says_so_and_stops() -> None:
    data = table("regression")
    inputs = data.train_inputs.clone()
    inputs[0] = math.inf
    broken = dataclasses.replace(data, train_inputs=inputs)
    run = train_run(broken, settings(data), "full", 0)
    assert run.status == "diverged" and run.final.step < 24
    assert not math.isfinite(run.final.test_loss)
    assert json.dumps(run.to_json(), allow_nan=False)
    assert math.isnan(Run.from_json(run.to_json()).final.test_loss)


def test_other_budgets() -> None:
    data = table()
    run = train_run(data, settings(data, budget="80samples"), "uniform", 0)
    assert run.final.samples == 80 and run.final.step == 10
    run = train_run(data, settings(data, budget="0.02s"), "uniform", 0)
    assert run.final.seconds >= 0.02 and len(run.curve) >= 2


def test_a_budget_that_reference_models_use_up_still_gives_a_run() -> None:
    data = table()
    run = train_run(data, settings(data, budget="64samples"), "rho_loss", 0)
    assert run.curve[0].samples == 64 and run.final.step == 0 and run.status == "finished"
