"""The backends under test, hypothesis profiles, and small helpers shared by the tests."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsel import ops

ROOT = Path(__file__).resolve().parent.parent

# "ci" runs the same examples every time, so that a failure is the change's and not the day's;
# "search" looks further.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.register_profile("search", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("FASTSEL_HYPOTHESIS_PROFILE", "ci"))

# Orders in which the emulator runs the threads of a block and the blocks of a grid.
SIMT_ORDERS = {"forward": 0, "reverse": 1, "random": 2}


class Backend:
    """One build of the operators and the device its tensors live on.

    Attributes:
        name: ``cpu``, ``simt`` (the CUDA kernels, emulated on the host) or ``cuda``.
        device: Where inputs go.
        ops: The namespace of the raw operators.
        max_elements: Inputs larger than this take too long here.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.device = torch.device("cuda" if name == "cuda" else "cpu")
        namespace = "fastsel_simt" if name == "simt" else "fastsel"
        self.ops: Any = getattr(torch.ops, namespace)
        self.max_elements = 300_000 if name == "simt" else 1 << 30

    def sample_scores(self, logits: Tensor, target: Tensor, **kwargs: Any) -> ops.SampleScores:
        """Calls `fastsel.sample_scores` here; tensors are moved to the device."""
        logits, target = logits.to(self.device), target.to(self.device)
        if self.name != "simt":
            return ops.sample_scores(logits, target, **kwargs)
        return ops.SampleScores(*self.ops.sample_scores(logits, target, **kwargs))

    def topk(self, scores: Tensor, k: int, **kwargs: Any) -> ops.TopK:
        """Calls `fastsel.topk` here; the tensor is moved to the device."""
        scores = scores.to(self.device)
        if self.name != "simt":
            return ops.topk(scores, k, **kwargs)
        return ops.TopK(*self.ops.topk(scores, k, **kwargs))

    def weighted_sample(self, weights: Tensor, n: int, seed: Tensor, **kwargs: Any) -> ops.Draws:
        """Calls `fastsel.weighted_sample` here; tensors are moved to the device."""
        weights, seed = weights.to(self.device), seed.to(self.device)
        if self.name != "simt":
            return ops.weighted_sample(weights, n, seed, **kwargs)
        return ops.Draws(*self.ops.weighted_sample(weights, n, seed, **kwargs))

    def neighbor_sample(
        self, table: Tensor, anchors: Tensor, anchor_weights: Tensor, n: int, seed: Tensor
    ) -> ops.Draws:
        """Calls `fastsel.neighbor_sample` here; tensors are moved to the device."""
        table, anchors = table.to(self.device), anchors.to(self.device)
        weights, seed = anchor_weights.to(self.device), seed.to(self.device)
        if self.name != "simt":
            return ops.neighbor_sample(table, anchors, weights, n, seed)
        return ops.Draws(*self.ops.neighbor_sample(table, anchors, weights, n, seed))

    def neighbor_probs(
        self, table: Tensor, anchors: Tensor, anchor_weights: Tensor, ids: Tensor
    ) -> Tensor:
        """Calls `fastsel.neighbor_probs` here; tensors are moved to the device."""
        table, anchors = table.to(self.device), anchors.to(self.device)
        weights, ids = anchor_weights.to(self.device), ids.to(self.device)
        function = self.ops.neighbor_probs if self.name == "simt" else ops.neighbor_probs
        result: Tensor = function(table, anchors, weights, ids)
        return result

    def knn(self, queries: Tensor, data: Tensor, k: int) -> ops.Neighbors:
        """Calls `fastsel.knn` here; tensors are moved to the device."""
        queries, data = queries.to(self.device), data.to(self.device)
        if self.name != "simt":
            return ops.knn(queries, data, k)
        return ops.Neighbors(*self.ops.knn(queries, data, k))

    def grad_norm_sq(self, op: str, *args: Any, **kwargs: Any) -> Tensor:
        """Calls ``fastsel.<op>_grad_norm_sq`` here; tensors are moved to the device."""
        moved = [arg.to(self.device) if isinstance(arg, Tensor) else arg for arg in args]
        name = f"{op}_grad_norm_sq"
        function = getattr(self.ops if self.name == "simt" else ops, name)
        result: Tensor = function(*moved, **kwargs)
        return result

    def need(self, elements: int) -> None:
        """Skips a test whose input is too large for an emulator."""
        if elements > self.max_elements:
            pytest.skip(f"{elements} elements take too long on the {self.name} backend")


@functools.cache
def simt_library() -> Path | None:
    """The emulated CUDA kernels: FASTSEL_SIMT_LIBRARY, or what `make build` makes."""
    named = os.environ.get("FASTSEL_SIMT_LIBRARY")
    path = Path(named) if named else ROOT / "build" / "dev" / "tests" / "libfastsel_simt.so"
    return path if path.exists() else None


@functools.cache
def load_simt() -> ctypes.CDLL | None:
    """Loads and registers the emulated kernels once; None where they are not built."""
    path = simt_library()
    if path is None:
        return None
    torch.ops.load_library(str(path))
    ops.register("fastsel_simt")
    return ctypes.CDLL(str(path))


def set_simt_order(order: str, seed: int = 0) -> None:
    """Makes the emulator run threads and blocks in one of SIMT_ORDERS."""
    library = load_simt()
    assert library is not None
    library.fastsel_simt_set_order(ctypes.c_int(SIMT_ORDERS[order]), ctypes.c_uint64(seed))


def set_simt_device(
    multiprocessors: int = 4, shared_bytes: int = 96 * 1024, threads: int = 2048
) -> None:
    """Gives the emulated GPU a size; launchers choose kernels and grids by it."""
    library = load_simt()
    assert library is not None
    assert library.fastsel_simt_set_device(multiprocessors, shared_bytes, threads) == 0


def backend_names() -> list[str]:
    """The backends that this machine can be asked for; ``cuda`` only where there is a GPU."""
    return ["cpu", "simt", *(["cuda"] if torch.cuda.is_available() else [])]


def make_backend(name: str) -> Backend:
    """A backend by name; skips, or fails if FASTSEL_REQUIRE_SIMT=1, where it is not built."""
    if name == "simt" and load_simt() is None:
        missing = "libfastsel_simt.so is not built, so the CUDA kernels cannot be emulated"
        if os.environ.get("FASTSEL_REQUIRE_SIMT") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    return Backend(name)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drops the combinations that do not exist: float64 is for the CPU, GPU kernels refuse it."""

    def exists(item: pytest.Item) -> bool:
        params: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
        wide = params.get("dtype") == torch.float64 or getattr(
            params.get("sample"), "cpu_only", False
        )
        return not (wide and params.get("backend", "cpu") != "cpu")

    config.hook.pytest_deselected(items=[item for item in items if not exists(item)])
    items[:] = [item for item in items if exists(item)]


@pytest.fixture(params=backend_names())
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every backend in turn."""
    return make_backend(request.param)


@pytest.fixture
def cpu() -> Backend:
    """The CPU backend alone."""
    return Backend("cpu")


@pytest.fixture
def simt() -> Iterator[Backend]:
    """The emulated backend alone; its scheduling order is put back afterwards."""
    backend = make_backend("simt")
    yield backend
    set_simt_order("forward")
    set_simt_device()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts torch's thread count back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def to_numpy(tensor: Tensor) -> NDArray[np.float64]:
    """A floating tensor as float64, exactly."""
    return np.asarray(tensor.detach().to("cpu", torch.float64).numpy())


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal dtype, shape and bytes: NaN payloads and the sign of zero included."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    as_bytes = [
        tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        for tensor in (actual, expected)
    ]
    assert torch.equal(*as_bytes)


def assert_norms_close(
    actual: Tensor,  # [B]
    expected: NDArray[np.float64],  # [B]
    of_magnitudes: NDArray[np.float64],  # [B]
    backend: Backend,
) -> None:
    """Squared norms as close to the truth as the rounding of sums allows.

    Where terms cancel, what a sum loses is a share of the norm that the terms' magnitudes have,
    `of_magnitudes`: s(1 + e) with |e| < u m / s, so s^2 is off by 2 u m s. The CPU sums in double;
    GPU kernels add a few terms in float first.
    """
    is_double = actual.dtype == torch.float64
    assert actual.dtype == (torch.float64 if is_double else torch.float32)
    assert actual.device.type == backend.device.type
    # Float32: half a unit in the last place is 6e-8. The rest is a few roundings of either type.
    share = 1e-14 if is_double else 1e-7
    lost = 1e-13 if backend.name == "cpu" else 1e-6
    with np.errstate(all="ignore"):
        rounded = expected if is_double else np.asarray(expected, np.float32).astype(np.float64)
        tolerance = share * expected + lost * np.sqrt(expected) * np.sqrt(of_magnitudes) + 1e-44
        numbers = to_numpy(actual)
        finite = np.isfinite(rounded)
        assert numbers.shape == expected.shape
        np.testing.assert_array_equal(numbers[~finite], rounded[~finite])
        error = np.abs(numbers[finite] - expected[finite])
    assert (error <= tolerance[finite]).all(), (numbers, expected, tolerance)
