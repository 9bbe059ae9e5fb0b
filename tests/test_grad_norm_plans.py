"""Which kernel takes a gradient norm, and whether it fills a GPU."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from fastsel_native import grad_norm
from grad_norm_cases import FORMS, LINEAR, Conv, Linear

H200 = 132  # multiprocessors


def test_the_cheaper_form_is_taken_anew_for_every_call() -> None:
    # GPT-2's projections: the two forms cost alike at some 770 positions.
    for positions, kernel in [(128, "gram"), (512, "gram"), (1024, "direct"), (4096, "direct")]:
        assert Linear(256, positions, 768, 768).plan("auto", H200)["kernel"] == kernel
    # ResNet-50's first and last 3 x 3 convolutions, and a depthwise one.
    early = Conv(64, 64, 64, (56, 56), (3, 3), (1, 1), (1, 1), (1, 1))
    late = Conv(64, 512, 512, (7, 7), (3, 3), (1, 1), (1, 1), (1, 1))
    depthwise = Conv(64, 256, 256, (14, 14), (3, 3), (1, 1), (1, 1), (1, 1), 256)
    assert early.plan("auto", H200)["kernel"] == "direct"
    assert late.plan("auto", H200)["kernel"] == "gram"
    assert depthwise.plan("auto", H200)["kernel"] == "narrow"


def test_a_form_that_was_asked_for_is_taken() -> None:
    for case in (*LINEAR, Linear(32, 512, 768, 768)):
        assert case.plan("direct", H200)["kernel"] == "direct"
        gram = "packed" if case.positions <= 32 else "gram"
        assert case.plan("gram", H200)["kernel"] == gram
    assert Linear(8, 1, 9, 9).plan("direct", H200)["kernel"] == "direct"


@pytest.mark.parametrize(
    "case",
    [
        Linear(1, 512, 4096, 4096),
        Linear(1, 4096, 4096, 4096),
        Linear(1, 4096, 768, 768),
        Linear(1, 2048, 256, 256),
        Linear(4096, 8, 64, 64),
        Linear(4096, 30, 512, 512),
        Linear(4096, 2, 16, 16),
        Linear(256, 196, 768, 3072),
        Linear(1, 1, 4_000_000, 1000),
        Linear(4096, 1, 512, 10),
    ],
    ids=str,
)
def test_plans_fill_the_device(case: Linear) -> None:
    assert case.plan("auto", H200)["grid"] >= 120


@pytest.mark.parametrize(
    "case",
    [
        Conv(1, 512, 512, (28, 28), (3, 3), (1, 1), (1, 1), (1, 1)),
        Conv(4096, 1, 8, (28, 28), (3, 3), (1, 1), (0, 0), (1, 1)),
        Conv(1, 256, 256, (56, 56), (3, 3), (1, 1), (1, 1), (1, 1), 256),
        Conv(4096, 32, 32, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1), 32),
    ],
    ids=str,
)
def test_conv_plans_fill_the_device(case: Conv) -> None:
    assert case.plan("auto", H200)["grid"] >= 120


def test_plans_are_sound() -> None:
    for conv in (False, True):
        for batch in (1, 70, 10**6):
            for positions in (1, 2, 65, 10**5):
                for columns, outputs in [(1, 1), (9, 1), (4608, 512), (768, 50_257)]:
                    for form in FORMS:
                        plan = grad_norm.plan(
                            conv, batch, 3, positions, columns, outputs, form, H200
                        )
                        assert 1 <= plan["grid"] < 2**31
                        assert plan["items"] == batch * plan["per_sample"] > 0
                        groups = 1 if plan["kernel"] in ("outer", "packed") else 3
                        assert plan["per_sample"] % groups == 0


def test_the_sanitized_shapes_reach_every_kernel() -> None:
    path = Path(__file__).resolve().parent.parent / "bench" / "sanitize.py"
    shapes = runpy.run_path(str(path), run_name="shapes")
    keys = ("kernel", "tile", "lanes")

    def key(plan: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(plan[name] for name in keys)

    linear = {
        (*key(plan), plan["per_sample"] > 1 and plan["kernel"] == "outer")
        for *sizes, form in shapes["LINEAR_SHAPES"]
        for plan in [Linear(*sizes).plan(form, H200)]
    }
    assert linear == {
        ("outer", 0, 8, False),
        ("outer", 0, 32, False),
        ("outer", 0, 256, True),
        *((kernel, tile, 0, False) for kernel in ("direct", "gram") for tile in (64, 128)),
        *(("packed", rows, 0, False) for rows in (16, 32)),
    }
    conv = {
        (*key(case.plan(form, H200)), case.kernel == (1, 1))
        for *sizes, form in shapes["CONV_SHAPES"]
        for case in [Conv(*sizes)]
    }
    assert conv == {
        ("narrow", 0, 32, False),
        ("narrow", 0, 256, False),
        *((kernel, 64, 0, one_tap) for kernel in ("direct", "gram") for one_tap in (False, True)),
    }
