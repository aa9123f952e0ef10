"""The hash in C: decoding asks for a handful of rows a token, and thirty small tensors for them take longer than reading them.

The contract is reference.py's, bit by bit.
"""

import ctypes
from ctypes import c_int, c_int64, c_long, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from byrote.kernels import native

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "ngram_hash.c",)
# threads, B, T, L, M, H, vocab, pad, ids, document, multipliers, primes, starts, to
FUNCTIONS = {"ngram_hash": (c_int, *[c_long] * 5, *[c_int64] * 2, *[c_void_p] * 6)}


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None."""
    return native.load("ngram_hash", SOURCES, FUNCTIONS)


def can_run(*tensors: Tensor) -> bool:
    """Whether this back end serves such tensors here."""
    return native.can_take(*tensors) and library() is not None


def hash_rows(
    ids_BS: Tensor, document_BS: Tensor | None, *, pad: int, vocab: int, multipliers_LM: Tensor, primes_LNH: Tensor, starts_LN: Tensor
) -> Tensor | None:
    """As the reference."""
    numbers = (ids_BS, document_BS, multipliers_LM, primes_LNH, starts_LN)
    held = [None if part is None else part.to(torch.int64).contiguous() for part in numbers]
    (B, S), (L, M), H = ids_BS.shape, multipliers_LM.shape, primes_LNH.shape[2]
    to_BTLN = native.empty((B, S - M + 1, L, (M - 1) * H), torch.int64)
    sizes = (native.threads_for(to_BTLN.numel()), B, S - M + 1, L, M, H, vocab, pad)
    outside = _library().ngram_hash(*sizes, *map(native.address, held), to_BTLN.data_ptr())
    return None if outside else to_BTLN


def _library() -> ctypes.CDLL:
    opened = library()
    assert opened is not None, "can_run comes first"
    return opened
