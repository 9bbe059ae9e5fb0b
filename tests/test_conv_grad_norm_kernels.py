"""The CUDA kernels of `conv_grad_norm_sq`, emulated: both forms, small groups, every order."""

from __future__ import annotations

import pytest
import torch
from conftest import Backend, assert_same_bits, set_simt_device
from grad_norm_cases import (
    CONV,
    DTYPES,
    FORMS,
    NARROW,
    Conv,
    assert_norms,
    conv_reference,
    same_in_every_order,
)

NAN = float("nan")


@pytest.mark.parametrize("form", ["direct", "gram"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONV, ids=str)
def test_conv(simt: Backend, case: Conv, dtype: torch.dtype, form: str) -> None:
    x, g = case.make(dtype)
    norms = simt.ops.conv_grad_norm_sq(x, g, *case.rest(), form=form)
    assert_norms(norms, conv_reference(x, g, case), form)


def test_the_cases_reach_both_forms_tiles() -> None:
    kernels = [case.plan("direct")["kernel"] for case in CONV]
    assert kernels.count("direct") >= 9
    assert {case.plan("gram")["kernel"] for case in CONV} == {"gram"}


@pytest.mark.parametrize("form", ["direct", "auto"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "lanes"), NARROW, ids=str)
def test_small_groups(simt: Backend, case: Conv, lanes: int, dtype: torch.dtype, form: str) -> None:
    plan = case.plan(form)
    assert (plan["kernel"], plan["lanes"]) == ("narrow", lanes)
    x, g = case.make(dtype)
    norms = simt.ops.conv_grad_norm_sq(x, g, *case.rest(), form=form)
    assert_norms(norms, conv_reference(x, g, case), form)


@pytest.mark.parametrize("form", FORMS)
def test_conv_of_any_strides(simt: Backend, form: str) -> None:
    case = Conv(2, 16, 24, (6, 8), (3, 3), (1, 1), (1, 1), (1, 1))
    x, g = case.make(torch.bfloat16)
    expected = conv_reference(x, g, case)
    for a, b in [
        (x.contiguous(memory_format=torch.channels_last), g),
        (x, g.contiguous(memory_format=torch.channels_last)),
        (x.transpose(2, 3).contiguous().transpose(2, 3), g),
    ]:
        assert_norms(simt.ops.conv_grad_norm_sq(a, b, *case.rest(), form=form), expected, form)


@pytest.mark.parametrize("form", FORMS)
def test_conv_with_nothing_to_sum(simt: Backend, form: str) -> None:
    for batch, channels, outputs, size in [(0, 2, 3, 5), (2, 0, 3, 5), (2, 2, 0, 5), (2, 2, 3, 1)]:
        x, g = torch.ones(batch, channels, size), torch.ones(batch, outputs, max(size - 2, 0))
        norms = simt.ops.conv_grad_norm_sq(x, g, [3], [1], [0], [1], 1, form=form)
        assert_same_bits(norms, torch.zeros(batch))


@pytest.mark.parametrize("form", ["direct", "gram"])
@pytest.mark.parametrize("case", [CONV[3], CONV[11], NARROW[0][0]], ids=str)
def test_nan_stays_in_its_sample_of_a_conv(simt: Backend, case: Conv, form: str) -> None:
    x, g = case._replace(batch=3).make(torch.float32)
    clean = simt.ops.conv_grad_norm_sq(x, g, *case.rest(), form=form)
    for tensor in (x, g):
        kept = tensor[1].clone()
        tensor[1, 1, 4] = NAN
        norms = simt.ops.conv_grad_norm_sq(x, g, *case.rest(), form=form)
        assert_same_bits(norms[::2], clean[::2])
        assert norms[1].isnan()
        tensor[1] = kept


def test_sizes_beyond_32_bits(simt: Backend) -> None:
    endless = torch.ones(1).expand(1, 1, 2**31)
    with pytest.raises(RuntimeError, match="a group of one sample must have at most 2147483647"):
        simt.ops.conv_grad_norm_sq(endless, endless, [1], [1], [0], [1], 1)
    x = torch.ones(1, 1, 4)
    with pytest.raises(RuntimeError, match="padded spatial dimension must be below"):
        pad = 2**30
        simt.ops.conv_grad_norm_sq(x, torch.ones(1, 1, 2), [4], [2 * pad], [pad], [1], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("case", "form"),
    [
        (CONV[3], "direct"),
        (CONV[3], "gram"),
        (CONV[8], "gram"),
        (CONV[11], "direct"),
        (CONV[11], "gram"),
        (NARROW[1][0], "direct"),
        (Conv(70, 10, 10, (5,), (3,), (1,), (1,), (1,), 10), "auto"),
        (Conv(2, 40, 40, (5,), (3,), (1,), (1,), (1,), 40), "gram"),
    ],
    ids=str,
)
def test_conv_in_any_order(simt: Backend, case: Conv, form: str, dtype: torch.dtype) -> None:
    set_simt_device(1)
    x, g = case.make(dtype)
    same_in_every_order(lambda: simt.ops.conv_grad_norm_sq(x, g, *case.rest(), form=form))
