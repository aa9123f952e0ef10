"""Blocks with an indexer or a window on the tape: V3.2's sparse attention and V4's window with compressed entries.

A block describes itself to C once, in a structure of its own (`kernels/decode_step/sparse.py`); before every call `prepare` makes room
in the block's caches and enters their addresses. Windows and open groups are extended in place (`Tail.extend`), so that a step costs
the same however far back they reach.

Shapes: M rows, J index heads, I index width, H heads, K head width, X channels of a compressor, G output groups.
"""

import ctypes
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from byrote.kernels.decode_step.cpu import MOST_ROWS, Code, Kept, Sizes
from byrote.kernels.decode_step.sparse import Chooser, LatentIndex, Pool, Window
from byrote.model.batch import Batch
from byrote.model.config import DSAConfig, MLAConfig, ModelConfig
from byrote.model.csa import Compressor, GroupedProjection, V4Attention
from byrote.model.csa import Indexer as EntryIndexer
from byrote.model.dsa import DSA
from byrote.model.dsa import Indexer as LatentIndexer
from byrote.model.norm import RMSNorm
from byrote.model.rope import amplitude, frequencies, softmax_factor
from byrote.model.state import Entries, Tail, Track

if TYPE_CHECKING:
    from byrote.model.tape_writer import Writer

_ALL = 1 << 62  # keys: as many as there are


def latents_of(c: ModelConfig) -> dict[int, MLAConfig]:
    """The latent attention of every block that has one."""
    kinds = {layer: c.attention_of(layer) for layer in range(c.num_layers)}
    kinds |= {layer: kind.mla for layer, kind in kinds.items() if isinstance(kind, DSAConfig)}
    return {layer: kind for layer, kind in kinds.items() if isinstance(kind, MLAConfig)}


def size_latents(sizes: Sizes, a: MLAConfig, writer: "Writer") -> None:
    """Latent attention, as C knows it."""
    frequencies_K = frequencies(a.qk_rope_head_dim, a.rope)
    sizes.heads, sizes.latent, sizes.rope = a.num_heads, a.kv_lora_rank, a.qk_rope_head_dim
    sizes.nope, sizes.value, sizes.half = a.qk_nope_head_dim, a.v_head_dim, a.rope.layout == "half"
    sizes.attend_scale, sizes.turn_scale = a.qk_head_dim**-0.5 * softmax_factor(a.rope.yarn), amplitude(a.rope.yarn)
    sizes.frequencies, sizes.turn = writer.weight(frequencies_K), writer.buffer("turn", a.qk_rope_head_dim).data_ptr()


class Ends(NamedTuple):
    """Which rows close groups of one ratio."""

    closes_BT: Tensor  # int64
    any: bool


def ends_of(batch: Batch, ratio: int) -> Ends:
    """Of this call; the same for all blocks of a ratio."""

    def make() -> Ends:
        closes_BT = batch.place_BT % ratio == ratio - 1
        if batch.document_BT is not None:
            closes_BT = closes_BT & (batch.document_BT >= 0)
        return Ends(closes_BT.to(torch.int64), bool(closes_BT.any()))

    ends: Ends = batch.once(("ends", ratio), make)
    return ends


class Choice:
    """Room for what one block's indexer scores and chooses, shared by blocks that choose as many of as many."""

    def __init__(self, top_k: int) -> None:
        self.chosen = torch.zeros(MOST_ROWS, top_k, dtype=torch.int64, device="cpu")
        self._scores = torch.zeros(2, MOST_ROWS, 0, device="cpu")

    def enter(self, into: Chooser, keys: int) -> None:
        """Addresses of room for so many keys."""
        if keys > self._scores.shape[2]:
            self._scores = torch.empty(2, MOST_ROWS, 2 * keys, dtype=torch.float32, device="cpu")
        scores, left = self._scores
        into.scores, into.left, into.room = scores.data_ptr(), left.data_ptr(), scores.shape[1]


def rows_of(track: Track | Entries) -> Kept:
    return Kept(track.values.data_ptr(), track.values.stride(0))


def with_room(cache: Any, tokens: int) -> Kept:
    """Of a track that the new tokens fit into."""
    assert isinstance(cache, Track), "the caller looks for other caches"
    cache.extend(tokens)
    return rows_of(cache)


def _extended(tail: Tail, tokens: int) -> Kept:
    """Where the new rows of a tail go."""
    buffer, start = tail.extend(tokens)
    return Kept(buffer.data_ptr() + start * buffer.stride(1) * buffer.element_size(), buffer.stride(0))


def point(writer: "Writer", code: Code, block: ctypes.Structure, *, at: int = 0, **more: Any) -> None:
    """Append an operation whose w[at] is a block's structure."""
    writer.op(code, **more)
    writer.ops[-1].w[at] = ctypes.addressof(block)


def choosing(writer: "Writer", block: Any, config: Any, inputs: Tensor) -> Choice:
    """Fill in the chooser of a block; `inputs` [M, J·I] are its queries."""
    choice = writer.once(("choice", type(config), config.index_top_k), lambda: Choice(config.index_top_k))
    c: Chooser = block.index
    c.heads, c.width, c.top_k = config.index_num_heads, config.index_head_dim, config.index_top_k
    c.scale = (c.heads * c.width) ** -0.5
    c.queries, c.weights = inputs.data_ptr(), writer.buffer("index weights", c.heads).data_ptr()
    c.chosen = choice.chosen.data_ptr()
    return choice


# ── V3.2 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class SparseLatents:
    """One DSA block: its operations, and its caches before every call."""

    def __init__(self, writer: "Writer", layer: int, attn: DSA, x: Tensor, norm: RMSNorm) -> None:
        writer.expect(attn.indexer, LatentIndexer)
        writer.expect(attn.indexer.k_norm, nn.LayerNorm)
        self._attn, c, indexer, self._block = attn, attn.config, attn.indexer, LatentIndex(hadamard=attn.config.index_hadamard)
        queries, keys = writer.buffer("index queries", c.index_num_heads * c.index_head_dim), writer.buffer("index keys", c.index_head_dim)
        self._choice = choosing(writer, self._block, c, queries)
        gain, bias = indexer.k_norm.weight, indexer.k_norm.bias
        self._block.queries, self._block.gain, self._block.bias = queries.data_ptr(), writer.weight(gain), writer.weight(bias)
        writer.linear(x, indexer.k, keys, norm=norm, sync=False)
        writer.linear(x, indexer.weights, writer.buffer("index weights", c.index_num_heads), norm=norm, sync=False)
        query, source = writer.latents(layer, attn.mla, x, norm)
        writer.linear(source, indexer.q_b, queries, norm=norm if c.mla.q_lora_rank is None else attn.mla.q_a_norm)
        point(writer, Code.INDEX_KEEP, self._block, x=keys, eps=indexer.k_norm.eps)
        point(writer, Code.INDEX_SCORE, self._block)
        point(writer, Code.INDEX_CHOOSE, self._block)
        heads = writer.buffer("heads", c.mla.num_heads * c.mla.v_head_dim)
        point(writer, Code.ATTEND_CHOICE, self._block, at=1, x=query, y=heads, w=(attn.mla.kv_b.weight,), index=layer)
        out, flags = writer.result()
        writer.linear(heads, attn.mla.o, out, flags=flags)

    def prepare(self, cache: Any, batch: Batch) -> Kept:
        """The cache of latents, with room."""
        tokens, block = batch.tokens_BT.shape[1], self._block
        for name in ("latents", "index"):
            cache[name].extend(tokens)
        self._choice.enter(block.index, batch.keys)
        block.index.keys, block.places = rows_of(cache["index"]), batch.place_BT.data_ptr()
        block.index.top_k = self._attn.config.index_top_k if self._attn.stage == "sparse" else _ALL
        return rows_of(cache["latents"])


# ── V4 ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class WindowBlock:
    """One block of V4's attention: its operations, and its caches before every call."""

    def __init__(self, writer: "Writer", attn: V4Attention, x: Tensor, norm: RMSNorm) -> None:
        c, self._attn, self._block = attn.config, attn, Window()
        self._choice: Choice | None = None
        self._counts: list[Tensor] = []  # what C reads in this call
        low, key = writer.buffer("low", c.q_lora_rank), writer.buffer("key", c.head_dim)
        query, heads = writer.buffer("query", c.num_heads * c.head_dim), writer.buffer("heads", c.num_heads * c.head_dim)
        self._describe(writer, query)
        writer.linear(x, attn.q_a, low, norm=norm, sync=False)
        for number, (_, compressor) in enumerate(self._compressors()):
            self._compress(writer, number, compressor, x, norm)
        if attn.indexer is not None:
            self._index(writer, attn.indexer, x, norm)
        writer.linear(x, attn.kv, key, norm=norm)
        if attn.indexer is not None:
            queries = writer.buffer("index queries", c.index_num_heads * c.index_head_dim)
            writer.linear(low, attn.indexer.q_b, queries, norm=attn.q_a_norm, sync=False)
        writer.linear(low, attn.q_b, query, norm=attn.q_a_norm)
        writer.expect(attn.kv_norm, RMSNorm)
        point(writer, Code.WINDOW_KEEP, self._block, x=key, eps=attn.kv_norm.eps)
        if attn.indexer is not None:
            point(writer, Code.INDEX_SCORE, self._block)
            point(writer, Code.INDEX_CHOOSE, self._block)
        point(writer, Code.WINDOW_ATTEND, self._block, y=heads)
        self._project(writer, heads)

    def _describe(self, writer: "Writer", query: Tensor) -> None:
        c, attn, block = self._attn.config, self._attn, self._block
        block.heads, block.width, block.rope, block.window = c.num_heads, c.head_dim, c.rope_head_dim, c.sliding_window
        block.scale, block.eps, block.turn_scale = attn.scale, attn.eps, amplitude(attn.rope.yarn)
        block.frequencies, block.turn = writer.once(("turn", c.rope_head_dim, attn.rope), lambda: self._turn(writer))
        block.sink, block.gain, block.queries = writer.weight(attn.sink), writer.weight(attn.kv_norm.weight), query.data_ptr()
        block.ratio, block.pools = c.ratio, len(self._compressors())
        block.overlaps = attn.compressor is not None and attn.compressor.overlaps

    def _turn(self, writer: "Writer") -> tuple[int, int]:
        """Addresses of frequencies and, of every call, cosines and sines; made once for all blocks that turn alike."""
        rope, width = self._attn.rope, self._attn.config.rope_head_dim
        frequencies_K, table = frequencies(width, rope), torch.zeros(MOST_ROWS, width, dtype=torch.float32, device="cpu")
        writer.held.append(table)
        writer.op(Code.WINDOW_TURN, y=table, w=(frequencies_K,), width=width, eps=amplitude(rope.yarn))
        return frequencies_K.data_ptr(), table.data_ptr()

    def _compressors(self) -> list[tuple[str, Compressor]]:
        """By the names of their caches."""
        attn = self._attn
        parts = {"compressor": attn.compressor, "indexer": None if attn.indexer is None else attn.indexer.compressor}
        return [(name, part) for name, part in parts.items() if part is not None]

    def _compress(self, writer: "Writer", number: int, part: Compressor, x: Tensor, norm: RMSNorm) -> None:
        writer.expect(part, Compressor)
        writer.expect(part.norm, RMSNorm)
        values, gates = (writer.buffer(f"{name} {number}", part.channels) for name in ("values", "gates"))
        writer.linear(x, part.kv, values, norm=norm, sync=False)
        writer.linear(x, part.gate, gates, norm=norm, sync=False)
        weights = (writer.weight(part.bias), writer.weight(part.norm.weight))
        self._block.pool[number] = Pool(part.width, part.channels, part.norm.eps, values.data_ptr(), gates.data_ptr(), *weights)

    def _index(self, writer: "Writer", indexer: EntryIndexer, x: Tensor, norm: RMSNorm) -> None:
        c = self._attn.config
        writer.expect(indexer, EntryIndexer)
        queries = writer.buffer("index queries", c.index_num_heads * c.index_head_dim)
        self._choice, self._block.index_queries = choosing(writer, self._block, c, queries), queries.data_ptr()
        writer.linear(x, indexer.weights, writer.buffer("index weights", c.index_num_heads), norm=norm, sync=False)

    def _project(self, writer: "Writer", heads: Tensor) -> None:
        attn, c, (out, flags) = self._attn, self._attn.config, writer.result()
        writer.expect(attn.o_a, GroupedProjection)
        between = writer.buffer("grouped", c.o_groups * c.o_lora_rank)
        weight = attn.o_a.weight
        writer.op(Code.GROUPED, x=heads, y=between, w=(weight,), index=c.o_groups, width=weight.shape[1], outputs=c.o_lora_rank)
        writer.reads(weight)
        writer.linear(between, attn.o_b, out, flags=flags)

    def prepare(self, cache: Any, batch: Batch) -> Kept:
        """Room in all drawers; there is no cache of latents."""
        tokens, block, c = batch.tokens_BT.shape[1], self._block, self._attn.config
        block.near, block.places = _extended(cache["window"], tokens), batch.place_BT.data_ptr()
        if not c.ratio:
            return Kept()
        ends, limit = ends_of(batch, c.ratio), batch.keys // c.ratio
        self._counts.clear()
        for pool, (name, _) in zip(block.pool, self._compressors(), strict=False):
            drawers = cache[name]
            pool.open = _extended(drawers["open"], tokens)
            counts_B = drawers["entries"].extend(ends.closes_BT, limit, closes=ends.any)
            self._counts.append(counts_B)
            pool.counts, pool.entries = counts_B.data_ptr(), rows_of(drawers["entries"])
        if self._choice is not None:
            self._choice.enter(block.index, limit)
            block.index.keys = block.pool[1].entries
            block.index.top_k = c.index_top_k if self._attn.stage == "sparse" else _ALL
        return Kept()
