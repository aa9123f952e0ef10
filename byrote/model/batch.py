"""Batch: all that a block needs to know about the tokens besides their hidden states, so that a pipeline stage can be handed it whole.

Documents: a number per token, −1 is padding, None means that every row is one document. Attention, positions, n-grams and the
Engram convolution stop where the number changes. In a `Batch` they are numbered by their runs (`documents.py`).

What kinds of attention need of it in forms of their own (cosines and sines, a mask) is made when first asked for and kept for
the other blocks of the call.

    place       tokens of the same document before this one: what windows and groups are counted by
    position    what rotary embeddings turn by: the place, unless the caller gave another

Shapes: B batch, T tokens of this call, S keys (T plus what the state held before).
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from byrote.errors import ConfigError
from byrote.kernels.cross_entropy import IGNORE
from byrote.memory.conditional import Rows
from byrote.model.config import RopeConfig
from byrote.model.documents import document_positions
from byrote.model.rope import Rotation, rotation
from byrote.model.state import DecodeState, Track

if TYPE_CHECKING:
    from byrote.model.voice import Voice


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    tokens_BT: Tensor
    document_BT: Tensor | None
    keys_document_BS: Tensor | None  # documents of all keys
    position_BT: Tensor
    place_BT: Tensor
    keys: int  # S
    rows: Rows | None = None
    state: DecodeState | None = None
    voices: tuple["Voice", ...] = ()  # of attached packs
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returns, made once a call."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def turn(self, dim: int, rope: RopeConfig) -> Rotation:
        """Cosines and sines of the tokens' positions for `dim` rotary channels."""
        turn: Rotation = self.once((dim, rope), lambda: rotation(self.position_BT, dim, rope))
        return turn

    def mask(self) -> tuple[Tensor | None, bool]:
        """(mask_B1TS, causal) for `kernels.attention`: True where a query may look; None: see `causal`."""
        queries, device = self.tokens_BT.shape[1], self.tokens_BT.device
        pair: tuple[Tensor | None, bool] = self.once(
            "mask", lambda: attention_mask(self.document_BT, self.keys_document_BS, queries, self.keys, device)
        )
        return pair

    def without_memory(self, sequences: int) -> "Batch":
        """The first `sequences` sequences of a whole text, for blocks that read no memory (MTP)."""
        part = slice(sequences)
        return Batch(
            tokens_BT=self.tokens_BT[part],
            document_BT=None if self.document_BT is None else self.document_BT[part],
            keys_document_BS=None if self.keys_document_BS is None else self.keys_document_BS[part],
            position_BT=self.position_BT[part],
            place_BT=self.place_BT[part],
            keys=self.keys,
        )


def count_on(tokens_BT: Tensor, document_BT: Tensor | None, state: DecodeState | None, earlier: Track | None) -> Tensor:
    """Numbers 0, 1, … inside each document, going on from the last of `earlier` where the state's last document goes on."""
    length = tokens_BT.shape[1]
    if state is None or earlier is None or state.length == 0 or length == 0:
        return _from_zero(tokens_BT, document_BT)
    next_B1 = earlier.all()[:, -1:] + 1
    if document_BT is None:
        return next_B1 if length == 1 else next_B1 + _from_zero(tokens_BT, None)
    last_B1 = torch.zeros_like(next_B1) if state.documents is None else state.documents.all()[:, -1:]
    leading_BT = (document_BT == last_B1).to(torch.int64).cumprod(dim=1)
    return _from_zero(tokens_BT, document_BT) + leading_BT * next_B1


def _from_zero(tokens_BT: Tensor, document_BT: Tensor | None) -> Tensor:
    if document_BT is not None:
        return document_positions(document_BT)
    return torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand(tokens_BT.shape)


def attention_mask(
    document_BT: Tensor | None, keys_BS: Tensor | None, queries: int, keys: int, device: torch.device
) -> tuple[Tensor | None, bool]:
    """(mask, causal) for `kernels.attention`."""
    if keys_BS is None and queries == keys:
        return None, True
    if keys_BS is None and queries == 1:
        return None, False
    order_TS = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    if keys_BS is None:
        return order_TS[None, None], False
    assert document_BT is not None
    same_BTS = (document_BT[:, :, None] == keys_BS[:, None, :]) & (document_BT >= 0)[:, :, None]
    return (same_BTS & order_TS)[:, None], False


def check_tokens(tokens_BT: Tensor, vocab_size: int, *, targets_BT: Tensor | None, **others: Tensor | None) -> None:
    """Refuse what would index out of range or broadcast by mistake. `others`, by name: one number a token each.

    Values are looked at on the CPU only: on an accelerator that would wait for it.
    """
    if tokens_BT.dim() != 2 or tokens_BT.dtype not in (torch.int64, torch.int32):
        raise ConfigError(f"tokens must be integers [batch, tokens]; got {tokens_BT.dtype} of shape {tuple(tokens_BT.shape)}")
    for name, other in {"targets_BT": targets_BT, **others}.items():
        if other is not None and other.shape != tokens_BT.shape:
            raise ConfigError(f"{name} has shape {tuple(other.shape)}, tokens {tuple(tokens_BT.shape)}; they must agree")
    _check_range(tokens_BT, vocab_size, "token ids")
    if targets_BT is not None:
        _check_range(targets_BT.masked_fill(targets_BT == IGNORE, 0), vocab_size, f"targets other than {IGNORE} (not scored)")


def _check_range(ids_BT: Tensor, vocab_size: int, what: str) -> None:
    if ids_BT.numel() == 0 or ids_BT.device.type != "cpu":
        return
    low, high = (int(end) for end in torch.aminmax(ids_BT))
    if low < 0 or high >= vocab_size:
        raise ConfigError(
            f"{what} span {low}..{high}, the model's vocabulary is 0..{vocab_size - 1}; was the text encoded with another tokenizer?"
        )
