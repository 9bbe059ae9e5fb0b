"""The host emulation of CUDA does what a GPU does, and shows the faults a GPU may hide."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from fastsel_native import simt

FORWARD, REVERSE, RANDOM = 0, 1, 2
ORDERS = [(FORWARD, 0), (REVERSE, 0), (RANDOM, 1), (RANDOM, 2)]
FULL = 0xFFFFFFFF
UNDEFINED = -1  # all bits set: what an undefined result reads as
INDEX, XOR, UP, DOWN = range(4)


@pytest.fixture(autouse=True)
def default_settings() -> Iterator[None]:
    yield
    assert simt.set_order(FORWARD, 0) == 0
    assert simt.set_device(4, 96 * 1024, 2048) == 0


@pytest.fixture(params=ORDERS, ids=["forward", "reverse", "random1", "random2"])
def order(request: pytest.FixtureRequest) -> tuple[int, int]:
    assert simt.set_order(*request.param) == 0
    param: tuple[int, int] = request.param
    return param


# ---- warp operations ----


def expected_shuffle(kind: int, amount: int, width: int, mask: int) -> list[int]:
    out = []
    for lane in range(32):
        if not mask >> lane & 1:
            out.append(-2)
            continue
        first = lane // width * width
        last = first + width - 1
        if kind == INDEX:
            source = first + amount % width
        elif kind == XOR:
            source = lane ^ amount if lane ^ amount <= last else lane
        elif kind == UP:
            source = lane - amount if lane - amount >= first else lane
        else:
            source = lane + amount if lane + amount <= last else lane
        out.append(source if mask >> source & 1 else UNDEFINED)
    return out


@pytest.mark.parametrize("kind", [INDEX, XOR, UP, DOWN])
@pytest.mark.parametrize("width", [1, 2, 8, 32])
@pytest.mark.parametrize("mask", [FULL, 0x0000FFFF, 0xA5A5A5A5, 1 << 7])
def test_shuffle(order: tuple[int, int], kind: int, width: int, mask: int) -> None:
    for amount in (0, 1, 3, 16, 31):
        assert simt.shuffle(kind, amount, width, mask) == expected_shuffle(
            kind, amount, width, mask
        )


def test_shuffle_width_must_be_a_power_of_two() -> None:
    with pytest.raises(RuntimeError, match="width must be a power of two"):
        simt.shuffle(XOR, 1, 12, FULL)


@pytest.mark.parametrize("lanes", [32, 20, 1])
@pytest.mark.parametrize("mask", [FULL, 0x000F0F0F])
def test_votes_and_reductions(order: tuple[int, int], lanes: int, mask: int) -> None:
    values = [(5 * i) % 7 - 2 for i in range(lanes)]
    members = [i for i in range(lanes) if mask >> i & 1]
    rows = simt.votes(values, mask)
    for lane in range(lanes):
        if lane not in members:
            assert rows[lane] == []
            continue
        assert rows[lane] == [
            sum(1 << i for i in members if values[i] > 0),
            sum(1 << i for i in members if values[i] == values[lane]),
            any(values[i] > 0 for i in members),
            all(values[i] > 0 for i in members),
            sum(values[i] for i in members),
            min(values[i] for i in members),
            max(values[i] % 2**32 for i in members),
        ]


def test_sum_wraps_around() -> None:
    assert simt.votes([2**31 - 1, 1], FULL)[0][4] == -(2**31)


def test_halves_of_a_warp_go_different_ways(order: tuple[int, int]) -> None:
    assert simt.halves() == [sum(range(16))] * 16 + [0b1010101010101010] * 16


def test_mask_without_the_caller_throws() -> None:
    with pytest.raises(RuntimeError, match="mask lacks the calling lane 1"):
        simt.foreign_mask()


def test_lanes_at_different_operations_throw(order: tuple[int, int]) -> None:
    with pytest.raises(RuntimeError, match="divergent barrier") as caught:
        simt.split_warp()
    assert "threads 0..7 in a warp operation (simt_selftest.cpp:" in str(caught.value)
    assert "threads 8..31 at a block barrier (simt_selftest.cpp:" in str(caught.value)
    with pytest.raises(RuntimeError, match="divergent barrier"):
        simt.mixed_operations()


# ---- blocks ----


@pytest.mark.parametrize("threads", [1, 31, 64, 100, 1024])
def test_barrier_and_shared_memory(order: tuple[int, int], threads: int) -> None:
    expected = [(i + 1) % threads for i in range(threads)]
    assert simt.neighbors(3, threads, True) == expected * 3


def test_missing_barrier_shows() -> None:
    expected = [(i + 1) % 64 for i in range(64)]
    seen = {}
    for order, seed in ORDERS:
        simt.set_order(order, seed)
        seen[order, seed] = simt.neighbors(1, 64, False)
        assert seen[order, seed] != expected
    assert seen[FORWARD, 0] == [UNDEFINED] * 63 + [0]
    assert seen[REVERSE, 0] == [*range(1, 64), UNDEFINED]
    assert seen[RANDOM, 1] != seen[RANDOM, 2]
    simt.set_order(RANDOM, 1)
    assert simt.neighbors(1, 64, False) == seen[RANDOM, 1]  # a seed repeats its order


def test_unwritten_shared_memory_is_poison_in_every_block(order: tuple[int, int]) -> None:
    simt.dynamic_shared(2, 8, True)  # leaves numbers behind
    assert all(math.isnan(v) for v in simt.dynamic_shared(4, 8, False))
    assert simt.dynamic_shared(2, 8, True) == [float(i) for i in range(8)] * 2


@pytest.mark.skipif(not simt.address_sanitizer, reason="only AddressSanitizer sees an overrun")
def test_shared_memory_overrun_is_reported() -> None:
    code = "from fastsel_native import simt; simt.dynamic_overrun()"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "heap-buffer-overflow" in run.stderr
    assert "dynamic_overrun_kernel" in run.stderr


@pytest.mark.parametrize(("threads", "stay"), [(64, 10), (64, 32), (64, 33), (20, 20), (256, 64)])
def test_ended_threads_count_nowhere(order: tuple[int, int], threads: int, stay: int) -> None:
    lanes = min(stay, 32)
    from_last = 7 if lanes == 32 else UNDEFINED
    assert simt.early_exit(threads, stay) == [(stay + 1) // 2, 1, 0, lanes, from_last]


def test_divergent_barrier_throws(order: tuple[int, int]) -> None:
    simt.divergent(32)  # all threads go the same way
    with pytest.raises(
        RuntimeError, match=r"divergent barrier: thread 0 waits at .*, thread 32 at "
    ):
        simt.divergent(64)


def test_exception_reaches_the_launcher(order: tuple[int, int]) -> None:
    for threads, thread in [(64, 33), (1, 0), (256, 255)]:
        with pytest.raises(IndexError, match=f"^thread {thread}$"):
            simt.throwing(threads, thread)
    simt.throwing(64, 64)  # nobody throws: the fibers left behind do not disturb
    assert simt.neighbors(2, 256, True) == [(i + 1) % 256 for i in range(256)] * 2


# ---- grids ----


def test_order_of_turns() -> None:
    assert simt.turns(3, 40) == list(range(120))
    simt.set_order(REVERSE, 0)
    assert simt.turns(3, 40) == list(range(119, -1, -1))
    simt.set_order(RANDOM, 5)
    random = simt.turns(3, 40)
    assert sorted(random) == list(range(120))
    assert random not in (list(range(120)), list(range(119, -1, -1)))
    assert simt.set_order(3, 0) == -1


@pytest.mark.parametrize(("blocks", "threads"), [(1, 1), (2, 32), (7, 33), (8, 256)])
def test_cooperative_grid(order: tuple[int, int], blocks: int, threads: int) -> None:
    for rounds in (1, 2, 5):
        expected = [(b + rounds) % blocks for b in range(blocks) for _ in range(threads)]
        assert simt.ring(blocks, threads, rounds, True) == expected
        assert simt.split_ring(blocks, threads, rounds) == expected


def test_resident_blocks_have_their_own_shared_memory(order: tuple[int, int]) -> None:
    assert simt.own_shared(5, 64) == [b for b in range(5) for _ in range(64)]


def test_grid_barrier_needs_a_cooperative_launch() -> None:
    with pytest.raises(RuntimeError, match=r"a grid barrier in a grid started by launch\(\)"):
        simt.ring(1, 32, 1, False)


def test_grid_barrier_needs_every_thread(order: tuple[int, int]) -> None:
    with pytest.raises(RuntimeError, match="divergent barrier") as caught:
        simt.incomplete_grid()
    assert "threads 0..31 at a grid barrier" in str(caught.value)
    assert "block (1, 0, 0) threads 0..31 ended" in str(caught.value)


def test_indices_in_three_dimensions(order: tuple[int, int]) -> None:
    assert simt.indices() == list(range(1, 2 * 3 * 4 * 5 * 2 * 3 + 1))


def test_launch_limits() -> None:
    simt.set_device(2, 4096, 1024)
    simt.launch_shape(4, 512, 2048, True)
    for blocks, threads, shared_bytes, cooperative, message in [
        (0, 32, 0, False, "invalid launch: grid"),
        (1, 0, 0, False, "invalid launch: grid"),
        (1, 1025, 0, False, "invalid launch: grid"),
        (1, 32, 4097, False, "4097 bytes of shared memory"),
        (5, 512, 0, True, "5 cooperative blocks, the device holds 4"),
        (3, 32, 3000, True, "3 cooperative blocks, the device holds 2"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            simt.launch_shape(blocks, threads, shared_bytes, cooperative)
    assert simt.set_device(0, 4096, 1024) == -1
    assert simt.set_device(1, 0, 1024) == -1
    assert simt.set_device(1, 4096, 1023) == -1


def test_shared_memory_limits() -> None:
    simt.static_shared(False, 72 * 1024)
    with pytest.raises(
        RuntimeError, match="45056 bytes of static shared memory, the limit is 40960"
    ):
        simt.static_shared(True, 0)
    with pytest.raises(RuntimeError, match="98305 bytes of shared memory a block, the device has"):
        simt.static_shared(False, 72 * 1024 + 1)


# ---- atomics, memory, arithmetic ----


def test_atomics(order: tuple[int, int]) -> None:
    i, u, long, f = simt.atomics()
    assert i == [sum(range(32)), 26, -5]
    chain = {(FORWARD, 0): 32, (REVERSE, 0): 1}.get(order, u[3])
    assert u == [32 % 10, FULL, 0, chain, 77]
    assert long == [32 << 40]
    assert f == [16.0]


def test_vector_loads_must_be_aligned() -> None:
    assert simt.vector_load(4) == [4.0, 5.0, 6.0, 7.0, 4.0]
    with pytest.raises(RuntimeError, match="16 bytes is misaligned"):
        simt.vector_load(1)


def test_arithmetic() -> None:
    assert simt.fast_exp2(3.0) == 8.0
    assert simt.fast_exp2(-130.0) == 0.0  # a subnormal result is flushed
    assert simt.fast_exp2(-math.inf) == 0.0
    assert simt.fast_exp2(math.inf) == math.inf
    assert math.isnan(simt.fast_exp2(math.nan))
    for v in (0, 1, 0x80000000, 0x00F0, FULL):
        bits = f"{v:032b}"
        lowest = bits[::-1].find("1") + 1
        highest_zeros = len(bits) - len(bits.lstrip("0"))
        assert simt.bit_functions(v) == (bits.count("1"), lowest, highest_zeros, int(bits[::-1], 2))
