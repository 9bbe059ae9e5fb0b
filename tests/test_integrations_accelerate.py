"""`accelerated_step`: a selective step under the accelerator's precision, ranks, accumulation."""

from __future__ import annotations

import collections
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from integration_samples import (
    PLAIN,
    RATE,
    SELECT,
    B,
    K,
    ScriptedSwitch,
    assert_same_weights,
    backward_of,
    largest_losses,
    network,
    run_ranks,
    samples,
    sgd_steps,
)
from torch import Tensor, nn
from torch.nn import functional as F

from fastsel.integrations import _shared
from fastsel.integrations.accelerate import accelerated_step
from fastsel.select import AdaSelection, ImportanceSampling, SelectiveStep, Uniform
from fastsel.select.selector import Selector


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Precision and accumulation are kept for the whole process otherwise."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def prepared(
    selector: Any = "big_loss", *, lr: float = 0.1, options: Any = None, **kwargs: Any
) -> tuple[Accelerator, nn.Module, SelectiveStep]:
    accelerator = Accelerator(cpu=True, **kwargs)
    model = network()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=lr))
    rate = None if isinstance(selector, Selector) else RATE
    options = {"switch": "select", **(options or {})}
    criterion = nn.CrossEntropyLoss()
    step = accelerated_step(accelerator, model, criterion, optimizer, selector, rate, **options)
    return accelerator, model, step


def batches(count: int = 1) -> list[tuple[Tensor, Tensor]]:
    inputs, target = samples(count)
    return [(inputs[i : i + B], target[i : i + B]) for i in range(0, count * B, B)]


def train(accelerator: Accelerator, model: nn.Module, step: SelectiveStep, count: int = 1) -> Any:
    results = []
    for inputs, target in batches(count):
        with accelerator.accumulate(model):
            results.append(step(inputs, target))
    return results


def chosen(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    rows = largest_losses(model(batch[0]), batch[1])
    return batch[0][rows], batch[1][rows]


def test_it_trains_on_the_chosen_samples_alone() -> None:
    accelerator, model, step = prepared()
    expected = network()
    results = train(accelerator, model, step, 3)
    for batch, result in zip(batches(3), results, strict=True):
        assert torch.equal(batch[0][result.indices], chosen(expected, batch)[0])
        sgd_steps(expected, [chosen(expected, batch)])
    assert_same_weights(model, expected)


def test_gradients_accumulate_over_chosen_samples() -> None:
    accelerator, model, step = prepared(gradient_accumulation_steps=2)
    expected = network()
    data = batches(4)
    train(accelerator, model, step, 4)
    for group in (data[:2], data[2:]):
        sgd_steps(expected, [[chosen(expected, batch) for batch in group]])
    assert_same_weights(model, expected)


def test_plain_steps_are_the_plain_loop() -> None:
    switch = ScriptedSwitch([PLAIN, SELECT, PLAIN])
    accelerator, model, step = prepared(options={"switch": switch})
    expected = network()
    data = batches(3)
    results = train(accelerator, model, step, 3)
    assert [len(result.indices) for result in results] == [B, K, B]
    sgd_steps(expected, [data[0]])
    sgd_steps(expected, [chosen(expected, data[1])])
    sgd_steps(expected, [data[2]])
    assert_same_weights(model, expected)


def test_gradients_are_clipped_before_each_optimizer_step() -> None:
    accelerator, model, step = prepared(
        gradient_accumulation_steps=2, options={"max_grad_norm": 0.01}, lr=1.0
    )
    before = torch.cat([parameter.detach().flatten() for parameter in network().parameters()])
    moves = []
    for inputs, target in batches(2):
        with accelerator.accumulate(model):
            step(inputs, target)
        after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        moves.append(float((after - before).norm()))
    assert moves[0] == 0.0
    # With a learning rate of 1 the weights move by the clipped norm, up to float32 rounding.
    assert moves[1] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("held_open", [False, True])
def test_in_mixed_precision_every_weight_gets_its_gradient(held_open: bool) -> None:
    accelerator, model, step = prepared(mixed_precision="bf16")
    expected = network()
    (batch,) = batches()
    with torch.autocast("cpu", torch.bfloat16):
        logits = expected(batch[0])
    rows = largest_losses(logits, batch[1])
    backward_of(expected, [(batch[0][rows], batch[1][rows])], autocast=True)
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    if held_open:
        with accelerator.autocast(), accelerator.accumulate(model):
            step(*batch)
    else:
        train(accelerator, model, step)
    assert_same_weights(model, expected)


def test_importance_weights_are_applied() -> None:
    generator = torch.Generator().manual_seed(2)
    selector = ImportanceSampling(RATE, generator=generator)
    accelerator, model, step = prepared(selector)
    expected = network()
    (batch,) = batches()
    (result,) = train(accelerator, model, step)
    inputs, target = (part[result.indices] for part in batch)
    losses = F.cross_entropy(expected(inputs), target, reduction="none")
    torch.autograd.backward((losses * result.weights).mean())
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    assert_same_weights(model, expected, bits=False)  # torch's cross-entropy, and the operator's


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdaSelection(("big_loss", "small_loss", "uniform"), rate=RATE),
        lambda: Uniform(RATE, generator=torch.Generator().manual_seed(5)),
    ],
    ids=["adaselection", "uniform"],
)
def test_the_accelerator_saves_and_loads_the_state(make: Any, tmp_path: Path) -> None:
    accelerator, model, step = prepared(make())
    train(accelerator, model, step)
    accelerator.save_state(str(tmp_path))
    whole = [result.indices for result in train(accelerator, model, step, 3)]
    again, other, resumed = prepared(make())
    again.load_state(str(tmp_path))
    for indices, result in zip(whole, train(again, other, resumed, 3), strict=True):
        assert torch.equal(indices, result.indices)
    assert_same_weights(other, model)


def test_without_registering_the_accelerator_saves_no_state(tmp_path: Path) -> None:
    accelerator, _, _ = prepared(options={"register": False})
    accelerator.save_state(str(tmp_path))
    assert not list(tmp_path.glob("custom_checkpoint*"))


def test_training_improves() -> None:
    accelerator, model, step = prepared(lr=0.5)
    inputs, target = samples(20)
    before = float(F.cross_entropy(model(inputs), target).detach())
    for _ in range(3):
        train(accelerator, model, step, 20)
    assert float(F.cross_entropy(model(inputs), target).detach()) < before / 2


def test_two_ranks(tmp_path: Path) -> None:
    """The script checks what each rank trained on; see there."""
    run_ranks("ddp_accelerate.py", tmp_path)


def test_bad_arguments_are_named() -> None:
    accelerator, model, _ = prepared()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = accelerator.prepare(plain)
    criterion = nn.CrossEntropyLoss()

    def make(a: Any, model: Any, criterion: Any, optimizer: Any, **options: Any) -> SelectiveStep:
        return accelerated_step(a, model, criterion, optimizer, "big_loss", RATE, **options)

    with pytest.raises(TypeError, match=r"accelerator must be an accelerate\.Accelerator, got str"):
        make("cpu", model, criterion, optimizer)
    with pytest.raises(ValueError, match=r"model must be what accelerator\.prepare gave"):
        make(accelerator, network(), criterion, optimizer)
    with pytest.raises(ValueError, match=r"optimizer must be what accelerator\.prepare gave"):
        make(accelerator, model, criterion, plain)
    with pytest.raises(TypeError, match="accumulation_steps, backward must be left to the acc"):
        make(accelerator, model, criterion, optimizer, accumulation_steps=2, backward=print)
    with pytest.raises(ValueError, match="max_grad_norm must be above 0, got 0"):
        make(accelerator, model, criterion, optimizer, max_grad_norm=0)


def test_rows_of_a_batch() -> None:
    batch = {
        "x": torch.arange(3),
        "one": torch.arange(2),
        "s": ("a", "b", "c"),
        "n": [1.5, None],
    }
    taken = _shared.take_rows(batch, torch.tensor([0, 2]), 3)
    assert taken.pop("x").tolist() == [0, 2]
    assert taken.pop("one") is batch["one"]
    assert taken == {"s": ("a", "c"), "n": [1.5, None]}
    scalar = torch.tensor(1.0)
    assert _shared.take_rows(scalar, torch.tensor([0]), 1) is scalar


def test_rows_of_what_is_not_one_tensor() -> None:
    rows = torch.tensor([1, 3])
    boxes = [torch.full((n, 4), float(n)) for n in (2, 1, 0, 3)]
    texts = collections.defaultdict(list, names=["a", "b", "c", "d"])
    batch = {"x": torch.arange(4), "boxes": boxes, "texts": texts}
    taken = _shared.take_rows(batch, rows, 4)
    assert [len(part) for part in taken["boxes"]] == [1, 3]
    assert taken["texts"] == {"names": ["b", "d"]}
    assert texts["names"] == ["a", "b", "c", "d"]
    boxes[0] = torch.zeros(4, 4)
    with pytest.raises(TypeError, match="as many entries as samples, 4, of which some have 4 rows"):
        _shared.take_rows(batch, rows, 4)
    packed = torch.nn.utils.rnn.pack_sequence([torch.zeros(3), torch.zeros(2)])
    with pytest.raises(TypeError, match=r"batch must be made of tensors.*got PackedSequence"):
        _shared.take_rows({"x": packed}, rows, 2)


def test_a_state_of_other_ranks_is_the_first_ones_and_told() -> None:
    states = {"ranks": [{"a": 1}, {"a": 2}]}
    with pytest.warns(UserWarning, match="saved by 2 ranks and is loaded by 1"):
        assert _shared.own_state("here", states) == {"a": 1}
    assert _shared.own_state("here", {"ranks": [{"a": 3}]}) == {"a": 3}


@pytest.mark.parametrize("extra", ["accelerate", "lightning", "transformers"])
def test_a_missing_package_is_named_with_the_line_that_installs_it(extra: str) -> None:
    hidden = ["lightning", "pytorch_lightning"] if extra == "lightning" else [extra]
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({hidden}))\n"
        "try:\n"
        f"    import fastsel.integrations.{extra}\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == (
        f"fastsel.integrations.{extra} needs {extra}, which is not installed: "
        f"pip install 'fastsel[{extra}]'\n"
    ), done.stderr
