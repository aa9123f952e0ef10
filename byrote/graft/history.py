"""What a graft remembers of a text between two calls: a layer of its own inside transformers' `Cache`.

A Hugging Face model that decodes with a cache is fed only the newest tokens. The n-grams that end there reach back, and so does the short
convolution. `History` keeps what they need. It stands behind the attention layers in `cache.layers`, so that whatever is done to
the cache is done to it too: `reorder_cache` (beam search), `crop` (assisted decoding), `batch_repeat_interleave`, `batch_select_indices`,
`reset`, `copy.deepcopy`.

A token is real (document 0, or counted where a packed row holds several) or padding (−1). N-grams and the convolution of a later call look
back over the last *real* tokens of their row, wherever padding stands:

    left    · · a b │ c          c follows b; a stands at the start of its text
    right   a b · · │ c          c follows b

Within one call, padding is a border.

Shapes: B batch, T tokens of this call, S tokens before it, N entries looked back on, R = 1 stream, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from byrote.errors import RequestError
from byrote.memory.ngram import NgramHistory

PADDING = -1


class History:
    """One graft's layer of a cache. Knows the protocol of a cache layer, and holds no keys and no values."""

    is_croppable = True
    supports_early_init = False
    is_initialized = True
    keys = values = None

    def __init__(self, number: int, first: Any, pad: int, reach: int) -> None:
        """`number`: of the graft. In kind this is as the `first` layer of the cache: masks depend on which layers are what."""
        self.number = number
        self.is_sliding, self.is_compileable = getattr(first, "is_sliding", False), first.is_compileable
        self._pad, self._reach = pad, reach
        self._ids_BS = self._document_BS = torch.zeros(1, 0, dtype=torch.int64)
        self._normed: dict[int, Tensor] = {}

    # --- what the graft asks ------------------------------------------------------------------------------------------

    def ngram_history(self, *, numbered: bool) -> NgramHistory:
        """The canonical ids before the chunk; `numbered` is of the protocol: documents are always told."""
        assert numbered, "a chunk behind a history names its documents"
        index_BN = self._recent(self._ids_BS.shape[1], self._reach)
        return NgramHistory(_pick(self._ids_BS, index_BN, self._pad), _real(index_BN))

    def borders(self, reach: int) -> Tensor:
        """Documents [B, reach] of what the convolution looks back on."""
        return _real(self._recent(self.get_seq_length(), reach))

    def append(self, ids_BT: Tensor, document_BT: Tensor) -> None:
        """The canonical ids and documents of a chunk; the layers' values follow through `extend`."""
        self._ids_BS = torch.cat((self._ids_BS, ids_BT), dim=1)
        self._document_BS = torch.cat((self._document_BS, document_BT), dim=1)

    def extend(self, slot: int, reach: int, normed_BTRD: Tensor) -> Tensor:
        """The last `reach` normed values of memory layer `slot` before these, then these: [B, reach + T, R, D]."""
        kept = self._normed.get(slot, normed_BTRD.detach()[:, :0])
        past = _pick(kept, self._recent(kept.shape[1], reach), 0)
        self._normed[slot] = torch.cat((kept, normed_BTRD.detach()), dim=1)
        return torch.cat((past, normed_BTRD), dim=1)

    def go_on(self, ids_BT: Tensor, cached: int) -> None:
        """Before each call. Raises RequestError unless this history is of the text that the cache, with `cached` tokens, is of."""
        if self.get_seq_length() != cached:
            raise RequestError(
                f"the cache holds {cached} tokens, of which memory has seen {self.get_seq_length()}: it was filled before this memory was "
                "attached. Begin with an empty cache"
            )
        if cached and len(self._ids_BS) != len(ids_BT):
            raise RequestError(f"the cache holds {len(self._ids_BS)} texts and {len(ids_BT)} go on; their numbers must agree")
        if not cached:
            self._ids_BS = self._document_BS = ids_BT[:, :0]

    def _recent(self, before: int, count: int) -> Tensor:
        """int64 [B, count]: places of the last real tokens among the first `before`, oldest first; −1 where there is none."""
        document_BS = self._document_BS[:, :before]
        place_BS = torch.arange(document_BS.shape[1], device=document_BS.device).where(document_BS != PADDING, -1)
        last_BN = place_BS.topk(min(count, place_BS.shape[1]), dim=1).values.flip(1)
        return torch.nn.functional.pad(last_BN, (count - last_BN.shape[1], 0), value=-1)

    # --- what transformers asks of a layer of a cache -----------------------------------------------------------------

    def reset(self) -> None:
        self._change(lambda part: part[:, :0])

    def get_seq_length(self) -> int:
        return self._ids_BS.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def crop(self, tokens: int) -> None:
        """Forget the last `-tokens` tokens; a positive number (transformers before 5.18) is the length to keep."""
        keep = min(tokens, self.get_seq_length()) if tokens > 0 else self.get_seq_length() + tokens
        if keep < 0:
            raise RequestError(f"{-tokens} tokens were to be cropped and only {self.get_seq_length()} are held")
        self._change(lambda part: part[:, :keep])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda part: part[indices.to(part.device)])

    def offload(self) -> None:
        """Stays where it is: it is small."""

    def prefetch(self) -> None:
        """See `offload`."""

    def _change(self, how: Callable[[Tensor], Tensor]) -> None:
        if self.get_seq_length():
            self._ids_BS, self._document_BS = how(self._ids_BS), how(self._document_BS)
            self._normed = {slot: how(part) for slot, part in self._normed.items()}


def _pick(values_BS: Tensor, index_BN: Tensor, missing: int) -> Tensor:
    """The entries at `index_BN`, and `missing` where that is −1."""
    if values_BS.shape[1] == 0:
        return values_BS.new_full((len(values_BS), index_BN.shape[1], *values_BS.shape[2:]), missing)
    index_BN = index_BN.to(values_BS.device).expand(len(values_BS), -1)
    picked = values_BS[torch.arange(len(values_BS), device=values_BS.device)[:, None], index_BN.clamp_min(0)]
    return picked.masked_fill((index_BN < 0).view(*index_BN.shape, *(1,) * (values_BS.dim() - 2)), missing)


def _real(index_BN: Tensor) -> Tensor:
    return torch.zeros_like(index_BN).masked_fill(index_BN < 0, PADDING)


# --- which tokens are real --------------------------------------------------------------------------------------------


def chunk_documents(mask: Any, position_ids: Tensor | None, ids_BT: Tensor, history: History | None) -> Tensor | None:
    """int64 [B, T]: documents of the tokens of this call; None where each row is one document without padding."""
    real_BT = _unmasked(mask, ids_BT.shape[1], 0 if history is None else history.get_seq_length())
    if real_BT is not None and not bool(real_BT.all()):
        return torch.zeros_like(ids_BT).masked_fill(~real_BT, PADDING)
    if history is not None:
        return torch.zeros_like(ids_BT)
    return _packed(position_ids, ids_BT) if mask is None and position_ids is not None else None


def _unmasked(mask: Any, tokens: int, before: int) -> Tensor | None:
    """bool [B, T] from an attention mask: [B, S + T]; or [B, 1, T, keys], in which a real token sees itself; or several such by kind."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise RequestError(
            f"memory cannot tell padding from an attention mask of type {type(mask).__name__}; give one of shape [batch, keys]"
        )
    if mask.dim() == 2:
        return mask[:, -tokens:] > 0
    seen_BTS = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0  # additive masks hold 0 where a query may look
    if before + tokens > seen_BTS.shape[2]:  # a window that has moved on: what it holds is past the padding
        return None
    return seen_BTS[:, :, before : before + tokens].diagonal(dim1=1, dim2=2)


def _packed(position_ids: Tensor, ids_BT: Tensor) -> Tensor | None:
    """Documents of rows that hold several: one begins where the position does not go up by one (as transformers' masks have it)."""
    if position_ids.shape[-1] != ids_BT.shape[1] or position_ids.dim() != 2:
        return None
    step_BT = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=1)
    document_BT = (step_BT != 1).cumsum(1)
    return document_BT.expand_as(ids_BT) if bool(document_BT[:, -1].any()) else None
