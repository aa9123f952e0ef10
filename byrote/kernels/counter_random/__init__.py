"""Random numbers without a state: each is a function of where it is wanted. The definition: reference.py.

A table's first values depend on (seed, row, column) and on nothing else, so a row that was never trained needs no memory and no disk: it
is made again whenever it is read. The rounding of bf16 rows depends on (seed, row, number of updates, column), so it is the same
in every store, in any company of other rows, and after any resume.
"""

from torch import Tensor

from byrote.kernels.counter_random import cpu, reference


def normal_rows(rows_U: Tensor, dim: int, *, std: float, seed: int = 0) -> Tensor:
    """float32 [U, dim]: the initial numbers of these rows, near-normal with mean 0, cut off at 3.46 · `std`."""
    backend = cpu if cpu.can_run(rows_U) else reference
    return backend.normal_rows(rows_U, dim, std=std, seed=seed)


def round_to_bf16(x_UE: Tensor, rows_U: Tensor, counts_U: Tensor, *, seed: int = 0) -> Tensor:
    """float32 → bfloat16, up or down by chance so that the mean is x; `counts_U` tells the occasions of a row apart."""
    backend = cpu if cpu.can_run(x_UE, rows_U, counts_U) else reference
    return backend.round_to_bf16(x_UE, rows_U, counts_U, seed=seed)
