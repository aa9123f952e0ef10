"""The structures of tape.h, and the one call that runs a tape.

Everything here is addresses: who fills them in keeps the tensors alive and in place (`byrote/model/capture.py`).
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_long, c_void_p
from enum import IntEnum, IntFlag
from pathlib import Path

from byrote.kernels import native

FOLDER = Path(__file__).parent
HEADERS = ("tape.h", "rows.h", "attend.h", "experts.h", "streams.h", "index.h", "latent_index.h", "window.h", "draft.h")
SHARED = ("sinkhorn/sinkhorn.h", "sparse_index/threshold.h", "lanes.h")
SOURCES = (*(FOLDER / file for file in ("decode_step.c", *HEADERS)), *(native.INCLUDE / header for header in SHARED))
MOST_ROWS, MOST_STREAMS, MOST_CHOSEN = 16, 8, 32
POINTERS = 8
LINE = 16  # floats of a cache line


class Code(IntEnum):
    """What an operation does, in the order of decode_step.c."""

    EMBED, TURN, LINEAR, LATENT, ATTEND, ROUTE, EXPERTS_UP, EXPERTS_DOWN = range(8)
    MANIFOLD_ENTER, FREE_ENTER, LEAVE, MEAN, NORM, MEMORY = range(8, 14)
    INDEX_SCORE, INDEX_CHOOSE, INDEX_KEEP, ATTEND_CHOICE, WINDOW_TURN, WINDOW_KEEP, WINDOW_ATTEND, GROUPED = range(14, 22)
    JOIN, SPREAD = range(22, 24)


class Flag(IntFlag):
    """Of LINEAR."""

    NORMED, ADDS, GATES, FROM_MEMORY = 1, 2, 4, 8


class Sizes(Structure):
    """`sizes` of tape.h."""

    _fields_ = (
        *((name, c_long) for name in ("dim", "streams", "vocab", "heads", "latent", "rope", "nope", "value", "half")),
        *((name, c_long) for name in ("experts", "top_k", "groups", "top_groups", "normalize", "softplus", "hidden")),
        *((name, c_long) for name in ("taps", "dilation", "hard", "sinkhorn_iters")),
        *((name, c_float) for name in ("attend_scale", "turn_scale", "route_scale", "limit", "mix_eps")),
        *((name, c_void_p) for name in ("frequencies", "turn")),
    )


class Op(Structure):
    """`op` of tape.h."""

    _fields_ = (
        *((name, c_long) for name in ("code", "sync", "index", "width", "outputs", "flags")),
        ("eps", c_float),
        ("w", c_void_p * POINTERS),
        ("x", c_void_p),
        ("y", c_void_p),
    )


class Kept(Structure):
    """`kept` of tape.h."""

    _fields_ = (("start", c_void_p), ("stride", c_long))


class Tail(Structure):
    """`tail` of tape.h."""

    _fields_ = (("old", c_void_p), ("new", c_void_p), ("keep", c_long))


class Call(Structure):
    """`call` of tape.h."""

    _fields_ = (
        *((name, c_long) for name in ("threads", "batch", "tokens", "before")),
        *((name, c_void_p) for name in ("ids", "positions", "document", "memory", "caches", "tails", "hidden", "logits", "own")),
        ("own_numbers", c_long),
    )


_STEP = (POINTER(Sizes), POINTER(Op), c_long, POINTER(Call))
FUNCTIONS = {"decode_step": _STEP, "decode_drafts": (*_STEP, c_long, c_void_p)}


def library() -> ctypes.CDLL | None:
    """The compiled step, or None."""
    return native.load("decode_step", SOURCES, FUNCTIONS)


def tape_of(ops: Sequence[Op]) -> ctypes.Array[Op]:
    """The operations side by side, as C reads them."""
    return (Op * len(ops))(*ops)


def own_numbers(longest_row: int, top_k: int) -> int:
    """Floats of working memory a thread owns: coefficients, gates, normed rows; whole cache lines."""
    numbers = MOST_STREAMS * (MOST_STREAMS + 2) * MOST_ROWS + MOST_ROWS * (top_k + 1) + MOST_ROWS * longest_row
    return -(-numbers // LINE) * LINE


def run(sizes: Sizes, tape: ctypes.Array[Op], call: Call) -> None:
    """Walk the tape once."""
    opened = library()
    assert opened is not None, "a tape is written only where there is a library"
    native.check(opened.decode_step(sizes, tape, len(tape), call))


def run_drafts(sizes: Sizes, tape: ctypes.Array[Op], call: Call, steps: int, picked: int | None) -> None:
    """Walk a tape that drafts `steps` times; `picked`: where the ids go, int64 [steps, batch]."""
    opened = library()
    assert opened is not None, "a tape is written only where there is a library"
    native.check(opened.decode_drafts(sizes, tape, len(tape), call, steps, picked))
