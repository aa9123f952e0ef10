"""Bits per byte: how many bits a model needs for each byte of text it has not seen. Comparable across tokenizers and compressors.

    bits per byte = Σ over scored tokens of −log2 p(token | the tokens before it in its document)  ÷  Σ bytes of the texts in UTF-8

Each document is  begin, t1 … tn.  Every t is scored exactly once; begin is given, not scored; no end token is scored (a text's
length is free, as it is for a compressor that is handed a file). Documents longer than the context are read in windows that move
on by `stride`: each feeds up to `context` tokens and scores those of its targets that no window before it scored. So every token
sees at least `context − stride` tokens of its document, or all there are:

    context 4, stride 2      window 0 feeds  ▸ t1 t2 t3           scores t1 t2 t3 t4
                             window 1 feeds  t2 t3 t4 t5          scores t5 t6
                             window 2 feeds  t4 t5 t6             scores t7                 (n = 7)

Windows of equal length go through the model together, whatever their document; padding stands on the right, as document −1.
The yardstick beside it is `xz -9` on the same bytes.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from byrote.errors import ConfigError, DataError

IGNORE = -100


class TextEncoder(Protocol):
    """What is needed of a tokenizer."""

    @property
    def begin_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


class TextBits(NamedTuple):
    name: str
    num_bytes: int
    bits: float


class BitsResult(NamedTuple):
    bits_per_byte: float
    per_text: list[TextBits]
    tokens: int  # scored
    seconds: float


class Window(NamedTuple):
    text: int
    start: int  # first token fed
    end: int  # one past the last token fed
    scored_from: int  # first token fed whose target is scored


def bits_per_byte(
    model: nn.Module,
    tokenizer: TextEncoder,
    texts: Sequence[tuple[str, str]],
    *,
    context: int = 1024,
    stride: int = 512,
    batch_windows: int = 8,
    device: torch.device | None = None,
    precision: str = "fp32",
    progress: Callable[[int, int], None] | None = None,
) -> BitsResult:
    """Score (name, text) pairs. `device`: where the model lies, by default that of its first parameter; `precision`: "fp32" or
    "bf16" (autocast; sums stay fp64); `progress` is told windows done and in all.

    Raises ConfigError for impossible windows, DataError if there is no text.
    """
    _check(texts, context, stride, batch_windows, precision)
    began = time.perf_counter()
    device = next(model.parameters()).device if device is None else device
    lines = [torch.tensor([tokenizer.begin_id, *ids]) for ids in tokenizer.encode_batch([text for _, text in texts])]
    windows = cut_windows([len(line) for line in lines], context, stride)
    nats = torch.zeros(len(texts), dtype=torch.float64)
    with _scoring(model, device, precision):
        nats_W = window_nats(model, lines, windows, tokenizer.pad_id, batch_windows=batch_windows, device=device, progress=progress)
    nats.index_add_(0, torch.tensor([window.text for window in windows]), nats_W)
    scored = sum(len(line) - 1 for line in lines)
    return _result(texts, (nats / math.log(2)).tolist(), scored, time.perf_counter() - began)


def xz_bits_per_byte(blobs: Sequence[bytes]) -> float:
    """What `xz -9` needs for the blobs one after the other, container included. Raises ConfigError where Python has no lzma."""
    try:
        import lzma  # some builds of Python leave it out
    except ImportError:
        raise ConfigError(
            "this Python was built without lzma; install liblzma's headers (liblzma-dev, xz-devel) and build it again"
        ) from None
    together = b"".join(blobs)
    if not together:
        raise DataError("there are no bytes to compress; give at least one text that is not empty")
    return 8 * len(lzma.compress(together, preset=9)) / len(together)


def _check(texts: Sequence[tuple[str, str]], context: int, stride: int, batch_windows: int, precision: str) -> None:
    if not 1 <= stride <= context:
        raise ConfigError(f"stride is {stride}; it must lie in 1..{context} (context)")
    if batch_windows < 1:
        raise ConfigError(f"batch_windows is {batch_windows}; it must be at least 1")
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"precision is {precision!r}; allowed: fp32, bf16")
    if not any(text for _, text in texts):
        raise DataError("there is no text to score; give at least one that is not empty")


def cut_windows(lengths: Sequence[int], context: int, stride: int) -> list[Window]:
    """Windows over lines of these `lengths`, in the order of the lines. A length counts begin; the last token is a target only."""
    windows = []
    for text, length in enumerate(lengths):
        scored = 0
        while scored < length - 1:
            start = max(0, scored - context + stride)
            end = min(start + context, length - 1)
            windows.append(Window(text, start, end, scored))
            scored = end
    return windows


def window_nats(
    model: nn.Module,
    lines: Sequence[Tensor],
    windows: Sequence[Window],
    pad: int,
    *,
    batch_windows: int,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """float64 [W] on the CPU: nats of what each window scores. Windows of like length go together."""
    order = sorted(range(len(windows)), key=lambda place: windows[place].start - windows[place].end)
    nats_W = torch.zeros(len(windows), dtype=torch.float64)
    for first in range(0, len(order), batch_windows):
        some = order[first : first + batch_windows]
        nats_W[some] = _window_losses(model, _batch([windows[place] for place in some], lines, pad), device)
        if progress is not None:
            progress(first + len(some), len(windows))
    return nats_W


def _batch(windows: Sequence[Window], lines: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, targets, documents), each [B, T]."""
    shape = len(windows), max(window.end - window.start for window in windows)
    tokens_BT, targets_BT = torch.full(shape, pad), torch.full(shape, IGNORE)
    document_BT = torch.full(shape, -1, dtype=torch.int32)
    for row, (text, start, end, scored_from) in enumerate(windows):
        tokens_BT[row, : end - start] = lines[text][start:end]
        targets_BT[row, scored_from - start : end - start] = lines[text][scored_from + 1 : end + 1]
        document_BT[row, : end - start] = 0
    return tokens_BT, targets_BT, document_BT


def _window_losses(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor], device: torch.device) -> Tensor:
    """float64 [B] on the CPU: nats of each window's scored tokens."""
    tokens_BT, targets_BT, document_BT = (part.to(device) for part in batch)
    padded = bool((batch[2] < 0).any())  # without padding every row is one document, which is what None says, and costs no mask
    out = model(tokens_BT, targets_BT=targets_BT, document_BT=document_BT if padded else None, want=("token_losses",))
    return out.extras["token_losses"].cpu().double().sum(1)


@contextlib.contextmanager
def _scoring(model: nn.Module, device: torch.device, precision: str) -> Iterator[None]:
    """The model in evaluation mode, without gradients, in the precision asked for; afterwards as it was."""
    was_training = model.training
    model.eval()
    autocast: contextlib.AbstractContextManager[Any] = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    try:
        with torch.no_grad(), autocast:
            yield
    finally:
        model.train(was_training)


def _result(texts: Sequence[tuple[str, str]], bits: Sequence[float], tokens: int, seconds: float) -> BitsResult:
    per_text = [TextBits(name, len(text.encode("utf-8")), own) for (name, text), own in zip(texts, bits, strict=True)]
    return BitsResult(sum(bits) / sum(text.num_bytes for text in per_text), per_text, tokens, seconds)
