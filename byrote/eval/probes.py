"""Looks inside a trained model: what memory is worth, where it speaks, how the streams mix, which experts work, what MTP guesses,
what sparse attention misses.

Every probe runs the model on given text and changes nothing in it.

Shapes: B batch, T tokens, R streams, E experts, S keys, K chosen keys.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from byrote.kernels.sparse_index import select
from byrote.kernels.sparse_index.reference import attention_weights
from byrote.memory.conditional import Rows
from byrote.model.dsa import DSA, causal_spans
from byrote.model.hyper_connection import FreeSite, ManifoldSite
from byrote.model.transformer import Model

IGNORE = -100


class _SilentMemory:
    """A model's memory in which every row is zero: it is read and gated as ever, and says nothing."""

    def __init__(self, memory: Any) -> None:
        self._memory = memory

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def fetch(self, *args: Any, **kwargs: Any) -> Rows:
        rows = self._memory.fetch(*args, **kwargs)
        return rows._replace(vectors_UE=torch.zeros_like(rows.vectors_UE))


@contextmanager
def memory_silenced(model: Model) -> Iterator[None]:
    """Inside, all rows read as zero, those of attached packs too; afterwards the model is as it was."""
    speakers: list[Any] = [model, *model.packs.values()]
    owners = [owner for owner in speakers if owner.memory is not None]
    memories = [owner.memory for owner in owners]
    try:
        for owner, memory in zip(owners, memories, strict=True):
            owner.memory = _SilentMemory(memory)
        yield
    finally:
        for owner, memory in zip(owners, memories, strict=True):
            owner.memory = memory


@contextmanager
def _quiet(model: Model) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def memory_gates(model: Model, ids: Sequence[int]) -> Tensor:
    """float32 [T, layers, R]: how far memory may speak at each token, layers in the order in which they do, those of packs included."""
    with _quiet(model):
        tokens_BT = torch.tensor([list(ids)], device=model.embed.weight.device)
        gates = model(tokens_BT, want=("gates",)).extras["gates"]
    return torch.stack([gate_BTR[0].float().cpu() for gate_BTR in gates], dim=1)


class Gain(NamedTuple):
    """Largest amplification of the composite mixing over the first `sites` sites, averaged over tokens (mHC §3.1)."""

    sites: int
    forward: float  # largest absolute row sum of the composite
    backward: float  # largest absolute column sum


def composite_gain(model: Model, ids: Sequence[int]) -> list[Gain]:
    """One entry per site, from the first to the last; empty for the plain residual."""
    mixes: list[Tensor] = []
    with _quiet(model), _recorded(model, mixes):
        model(torch.tensor([list(ids)], device=model.embed.weight.device))
    gains, composite = [], None
    for sites, comb_NRR in enumerate(mixes, 1):
        step = comb_NRR.float().transpose(1, 2)  # applied transposed: new = combᵀ old
        composite = step if composite is None else step @ composite
        size = composite.abs()
        gains.append(Gain(sites, size.sum(2).amax(1).mean().item(), size.sum(1).amax(1).mean().item()))
    return gains


@contextmanager
def _recorded(model: Model, mixes: list[Tensor]) -> Iterator[None]:
    """Inside, the mixing matrices of every site of the blocks are appended to `mixes`, in order."""
    sites = [site for block in model.blocks for site in (block.attn_site, block.ffn_site) if isinstance(site, ManifoldSite | FreeSite)]

    def record(enter: Any) -> Any:
        def recording(streams_BTRD: Tensor) -> Any:
            x_BTD, carry = enter(streams_BTRD)
            mixes.append(carry[1].reshape(-1, *carry[1].shape[-2:]))
            return x_BTD, carry

        return recording

    for site in sites:
        site.__dict__["enter"] = record(site.enter)
    try:
        yield
    finally:
        for site in sites:
            del site.__dict__["enter"]


def expert_loads(model: Model, lines: Sequence[Sequence[int]]) -> dict[str, list[float]]:
    """Share of choices each expert gets, times the number of experts (1 is even), per MoE layer."""
    totals: dict[str, Tensor] = {}
    with _quiet(model):
        for ids in lines:
            for name, load_E in model(torch.tensor([list(ids)], device=model.embed.weight.device)).loads.items():
                totals[name] = totals.get(name, 0) + load_E
    return {name: (load.float() / load.float().mean()).tolist() for name, load in totals.items()}


def mtp_acceptance(model: Model, lines: Sequence[Sequence[int]]) -> list[float]:
    """Per MTP depth: share of positions where its greedy guess equals what the model itself says one step later, on this text.

    That is the acceptance of greedy speculation along the text. Depth k counts where all shallower guesses hold too.
    """
    if not model.mtp:
        return []
    kept, seen = [0] * len(model.mtp), [0] * len(model.mtp)
    with _quiet(model):
        for ids in lines:
            tokens_BT = torch.tensor([list(ids)], device=model.embed.weight.device)
            targets_BT = torch.full_like(tokens_BT, IGNORE)
            targets_BT[:, :-1] = tokens_BT[:, 1:]
            extras = model(tokens_BT, targets_BT=targets_BT, want=("hidden", "mtp_logits")).extras
            said_T = model.head(extras["hidden"])[0].argmax(-1)
            right_T = torch.ones_like(said_T, dtype=torch.bool)
            for depth, logits in enumerate(extras["mtp_logits"]):
                ahead = depth + 1
                right_T = right_T[: len(said_T) - ahead] & (logits[0, : len(said_T) - ahead].argmax(-1) == said_T[ahead:])
                kept[depth] += int(right_T.sum())
                seen[depth] += len(right_T)
    return [good / max(all_, 1) for good, all_ in zip(kept, seen, strict=True)]


_QUERIES = 64  # looked at together: their attention to all keys is held


def index_recall(model: Model, lines: Sequence[Sequence[int]]) -> dict[str, float]:
    """How good the indexers' choice is, per block of V3.2's sparse attention: 1 is perfect.

    Of every query that sees more keys than it may choose: the attention it would pay, were it dense, to the keys its indexer
    chooses, divided by what it would pay to the best choice of as many. The mean over queries; NaN where there is none.
    """
    shares: dict[str, list[Tensor]] = {}

    def look(name: str, attention: DSA) -> Any:
        return attention.register_forward_pre_hook(lambda _module, args: shares.setdefault(name, []).append(_shares(attention, *args)))

    hooks = [look(f"blocks.{layer}", block.attn) for layer, block in enumerate(model.blocks) if isinstance(block.attn, DSA)]
    try:
        with _quiet(model):
            for ids in lines:
                model(torch.tensor([list(ids)], device=model.embed.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(found).mean().item() for name, found in shares.items()}


def _shares(attention: DSA, x_BTD: Tensor, batch: Any, _cache: object = None) -> Tensor:
    """One number for every query with a real choice."""
    new, top_k = attention.mla.project(x_BTD), attention.config.index_top_k
    query_BTHX, kept_BSX = attention.mla.absorb(new, batch)
    spans = causal_spans(batch)
    q_BTJI, k_BSI, weight_BTJ = attention.indexer(x_BTD, new.source_BTQ, batch)
    chosen = select(q_BTJI, k_BSI, weight_BTJ, spans, top_k)
    shares = []
    for start in range(0, x_BTD.shape[1], _QUERIES):
        part = slice(start, start + _QUERIES)
        mask_BTS, choice = spans.part(part).mask(batch.keys), chosen.part(part)
        paid_BTS = attention_weights(query_BTHX[:, part].float(), kept_BSX.float(), mask_BTS, attention.mla.scale).mean(2)
        got_BT = (paid_BTS.gather(2, choice.index_BTK) * choice.valid_BTK).sum(-1)
        best_BT = paid_BTS.topk(min(top_k, paid_BTS.shape[2])).values.sum(-1)
        shares.append((got_BT / best_BT)[mask_BTS.sum(-1) > top_k])
    return torch.cat(shares)
