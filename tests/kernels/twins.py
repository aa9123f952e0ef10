"""Two functions that must agree, values and gradients: a native kernel on the inputs as they are, its reference in fp64."""

import ctypes
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tests.tolerances import assert_close_bf16, assert_close_fp32

Function = Callable[..., Tensor | tuple[Tensor, ...]]
SIZES = (0, 1, 7, 257)  # tokens: none, one, and two numbers that no vector or thread count divides
DTYPES = (torch.float32, torch.bfloat16)


def need(library: Callable[[], ctypes.CDLL | None]) -> None:
    """Skips the test where no compiler built the library; the reference serves there and has its own tests."""
    if library() is None:
        pytest.skip("no native kernels here")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pull_back(function: Function, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients of the inputs) for cotangents drawn from a fixed seed."""
    leaves = [part.detach().requires_grad_() for part in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    cotangents = [random(*out.shape, seed=100 + place, dtype=torch.bfloat16).to(out.dtype) for place, out in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, leaves, cotangents)
    return [out.detach() for out in outputs], list(grads)


def assert_twins(native: Function, reference: Function, inputs: Sequence[Tensor]) -> None:
    """Values and gradients within the grade of the inputs' dtype, and in that dtype."""
    outputs, grads = pull_back(native, inputs)
    wanted_outputs, wanted_grads = pull_back(reference, [part.double() for part in inputs])
    assert_close = assert_close_bf16 if torch.bfloat16 in {part.dtype for part in inputs} else assert_close_fp32
    for got, want in zip((*outputs, *grads), (*wanted_outputs, *wanted_grads), strict=True):
        assert_close(got, want)
    assert [grad.dtype for grad in grads] == [part.dtype for part in inputs]
