"""The loss memory: what it holds, when a sample is due, and that nothing broken gets in."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastsel.select import LossMemory

NAN, INF = float("nan"), float("inf")


def ids_of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_exponential_average() -> None:
    memory = LossMemory(4, decay=0.75)
    memory.update(ids_of(2), torch.tensor([4.0]), 0)
    memory.update(ids_of(2), torch.tensor([8.0]), 1)
    memory.update(ids_of(2, 0), torch.tensor([1.0, 7.0]), 2)
    loss, due = memory.read(ids_of(2, 0, 1), 2)
    assert loss[:2].tolist() == [0.75 * (0.75 * 4 + 0.25 * 8) + 0.25, 7.0]
    assert loss[2].isnan()
    assert due.tolist() == [False, False, True]
    assert memory.seen.tolist() == [2, -1, 2, -1]


@given(
    st.lists(
        st.lists(
            st.tuples(
                st.integers(0, 5),
                st.one_of(st.floats(0, 10, width=32), st.sampled_from([NAN, INF, -INF])),
            ),
            max_size=8,
        ),
        max_size=6,
    )
)
def test_against_a_loop(steps: list[list[tuple[int, float]]]) -> None:
    memory = LossMemory(6, decay=0.5)
    losses = np.full(6, NAN, dtype=np.float32)
    seen = np.full(6, -1)
    for step, batch in enumerate(steps):
        ids = torch.tensor([i for i, _ in batch], dtype=torch.int64)
        memory.update(ids, torch.tensor([loss for _, loss in batch]), step)
        # Of a sample's finite losses in one batch, the last counts, once.
        for i, loss in {i: loss for i, loss in batch if np.isfinite(loss)}.items():
            half = np.float32(0.5)
            losses[i] = loss if seen[i] < 0 else half * losses[i] + half * np.float32(loss)
            seen[i] = step
    np.testing.assert_array_equal(memory.losses.numpy(), losses)
    np.testing.assert_array_equal(memory.seen.numpy(), seen)


def test_the_last_of_several_counts() -> None:
    memory = LossMemory(3)
    memory.update(ids_of(1, 0, 1, 1), torch.tensor([1.0, 2.0, 3.0, NAN]), 0)
    assert memory.losses[:2].tolist() == [2.0, 3.0]
    memory.update(ids_of(1, 1), torch.tensor([9.0, 5.0]), 1)
    assert memory.losses[1] == 4.0


def test_what_is_not_finite_leaves_no_trace() -> None:
    memory = LossMemory(3, max_age=2)
    memory.update(ids_of(0, 1), torch.tensor([1.0, INF]), 0)
    assert memory.read(ids_of(0, 1), 0)[1].tolist() == [False, True]
    memory.update(ids_of(0), torch.tensor([NAN]), 3)
    loss, due = memory.read(ids_of(0), 3)
    assert loss.tolist() == [1.0]
    assert due.tolist() == [True]


def test_due() -> None:
    memory = LossMemory(2, max_age=3)
    memory.update(ids_of(0), torch.ones(1), 10)
    for step, due in [(10, False), (13, False), (14, True)]:
        assert memory.read(ids_of(0, 1), step)[1].tolist() == [due, True]
        assert memory.read(ids_of(0, 1), torch.tensor([step]))[1].tolist() == [due, True]
    memory.max_age = None
    assert memory.read(ids_of(0), 1 << 40)[1].tolist() == [False]
    always = LossMemory(2, max_age=0)
    always.update(ids_of(0), torch.ones(1), torch.tensor(5))
    assert [bool(always.read(ids_of(0), step)[1]) for step in (5, 6)] == [False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    memory = LossMemory(2)
    memory.update(ids_of(1), torch.tensor([0.5], dtype=dtype), 0)
    memory.update(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=dtype), 1)
    assert memory.losses.dtype == torch.float32
    assert memory.losses[1] == 0.5


def test_losses_that_want_a_gradient() -> None:
    memory = LossMemory(2)
    memory.update(ids_of(1), torch.ones(1, requires_grad=True) * 2, 0)
    assert not memory.losses.requires_grad
    with torch.inference_mode():
        memory.update(ids_of(1), torch.ones(1), 1)
    memory.update(ids_of(1), torch.ones(1), 2)
    assert memory.losses[1] == 1.25


def test_resumes_bit_for_bit() -> None:
    def batches(begin: int, end: int) -> list[tuple[Tensor, Tensor, int]]:
        generator = torch.Generator().manual_seed(0)
        draws = [
            (torch.randint(0, 50, (16,), generator=generator), torch.rand(16, generator=generator))
            for _ in range(end)
        ]
        return [(*draws[step], step) for step in range(begin, end)]

    whole, first = (LossMemory(50, decay=0.3, max_age=4) for _ in range(2))
    for batch in batches(0, 6):
        whole.update(*batch)
    for batch in batches(0, 3):
        first.update(*batch)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = LossMemory(50)
    second.load_state_dict(torch.load(file, weights_only=True))
    for batch in batches(3, 6):
        second.update(*batch)
    assert (second.decay, second.max_age) == (0.3, 4)
    assert_same_bits(second.losses, whole.losses)
    assert_same_bits(second.seen, whole.seen)


def test_a_state_is_a_copy() -> None:
    memory = LossMemory(2)
    memory.update(ids_of(0), torch.ones(1), 0)
    state = memory.state_dict()
    memory.update(ids_of(0), torch.zeros(1), 1)
    memory.load_state_dict(state)
    memory.update(ids_of(0), torch.zeros(1), 1)
    assert state["losses"][0] == 1.0
    assert memory.losses[0] == 0.5


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"losses": torch.ones(3)}, r"losses of 2 samples in torch.float32, got \[3\]"),
        ({"seen": torch.zeros(2)}, "seen of 2 samples in torch.int64, got .* in torch.float32"),
        ({"losses": None}, "must have losses"),
    ],
)
def test_states_of_something_else(change: dict[str, Any], text: str) -> None:
    memory = LossMemory(2, decay=0.25)
    state = {**LossMemory(2).state_dict(), **change}
    state = {key: value for key, value in state.items() if not (key in change and value is None)}
    with pytest.raises(ValueError, match=text):
        memory.load_state_dict(state)
    assert memory.decay == 0.25
    assert memory.losses.isnan().all()


@pytest.mark.parametrize("wrong", [-1, 5, 6, 1 << 40])
def test_ids_out_of_range(wrong: int) -> None:
    memory = LossMemory(5)
    with pytest.raises(
        IndexError, match=rf"LossMemory.update: ids must be in \[0, 5\), got {wrong}"
    ):
        memory.update(ids_of(0, wrong), torch.ones(2), 0)
    with pytest.raises(IndexError, match=rf"LossMemory.read: ids must be in \[0, 5\), got {wrong}"):
        memory.read(ids_of(wrong, 0), 0)
    assert memory.losses.isnan().all()


@pytest.mark.parametrize(
    ("ids", "losses", "error", "text"),
    [
        (torch.ones(2), torch.ones(2), TypeError, "ids must be an int64 tensor, got torch.float32"),
        ([0], torch.ones(1), TypeError, "ids must be an int64 tensor, got list"),
        (torch.zeros(1, 1, dtype=torch.int64), torch.ones(1), ValueError, r"\[B\], got shape"),
        (ids_of(0), torch.ones(2), ValueError, r"B = 1 as ids, got shape \[2\]"),
        (ids_of(0), ids_of(0), TypeError, "losses must be a floating-point tensor"),
    ],
)
def test_bad_updates(ids: Any, losses: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=r"^LossMemory.update: .*" + text):
        LossMemory(4).update(ids, losses, 0)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"size": 0}, ValueError, "size must be at least 1, got 0"),
        ({"size": 1.5}, TypeError, "size must be an int, got float"),
        ({"size": True}, TypeError, "size must be an int, got bool"),
        ({"decay": 1.0}, ValueError, r"decay must be in \[0, 1\), got 1.0"),
        ({"decay": NAN}, ValueError, r"decay must be in \[0, 1\), got nan"),
        ({"decay": "0.5"}, TypeError, "decay must be a number, got str"),
        ({"max_age": -1}, ValueError, "max_age must be at least 0, got -1"),
        ({"max_age": 1.0}, TypeError, "max_age must be an int, got float"),
    ],
)
def test_bad_settings(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^LossMemory: {text}"):
        LossMemory(**{"size": 3, **options})


def test_traces() -> None:
    torch.compiler.reset()
    memory, eager = LossMemory(100, max_age=1), LossMemory(100, max_age=1)

    def step(ids: Tensor, losses: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
        memory.update(ids, losses, now)
        return memory.read(ids, now)

    compiled: Any = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, size in enumerate((8, 12, 20)):
        ids, losses = torch.randint(0, 100, (size,)), torch.rand(size)
        now = torch.tensor([i])
        actual = compiled(ids, losses, now)
        eager.update(ids, losses, i)
        assert_same_bits(actual[0], eager.read(ids, i)[0])
        assert torch.equal(actual[1], eager.read(ids, i)[1])
    assert_same_bits(memory.losses, eager.losses)


def test_twelve_bytes_a_sample() -> None:
    memory = LossMemory(1000)
    assert memory.losses.nbytes + memory.seen.nbytes == 12_000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_without_waiting() -> None:
    memory, on_cpu = LossMemory(1000, max_age=3, device="cuda"), LossMemory(1000, max_age=3)
    torch.use_deterministic_algorithms(True)
    mode: Any = torch.cuda.get_sync_debug_mode()
    try:
        for step in range(5):
            ids, losses = torch.randint(0, 1000, (256,)), torch.rand(256)
            losses[::9] = NAN
            on_cuda = ids.cuda(), losses.cuda()
            torch.cuda.set_sync_debug_mode("error")
            memory.update(*on_cuda, step)
            loss, due = memory.read(on_cuda[0], step)
            torch.cuda.set_sync_debug_mode(mode)
            on_cpu.update(ids, losses, step)
            assert_same_bits(loss, on_cpu.read(ids, step)[0])
            assert torch.equal(due.cpu(), on_cpu.read(ids, step)[1])
    finally:
        torch.cuda.set_sync_debug_mode(mode)
        torch.use_deterministic_algorithms(False)
