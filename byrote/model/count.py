"""Parameters, FLOPs and bytes of a model, exactly, from its configuration alone.

Nothing is built: a trillion-parameter model is counted in a millisecond. For models small enough to build, the count equals
the sum over `model.parameters()` to the last number (tests/model/test_count.py).

**Parameters.** A model is a bag of parts (`Parts`: name → numbers). `main` is the model that is served, `mtp` the extra
modules that only training and speculative decoding use, `active` what one token passes through: all of `main`, but of the experts
only `top_k`. The memory table is no parameter of the model and stands apart.

Papers count the vocabulary matrix (V · D, once as embedding, once as head) differently, and active figures differ from totals:

    counted      totals of                       active figures of
    twice        mHC (27.05B), V3, V4            –
    once         Engram (26.72B)                 mHC (4.14B), V3, V4
    not at all   –                               Engram (3.8B)

so every total here takes `vocabulary` = 2, 1 or 0.

**FLOPs.** Two per multiply-add. Forward: every matrix a token meets, once (so without the embedding, which is a look-up);
attention scores and weighted values for the mean number of keys a position sees in a sequence (causal: (T + 1) / 2); the
mixing of residual streams; memory gate and convolution. Norms, activations, softmax and Sinkhorn are left out. Training is
three times forward, MTP modules included (each runs the head again), without any recomputation.

    worked example: 2 matrices of 10 × 10, no attention: 200 multiply-adds, 400 FLOPs forward, 1200 in training.

**Bytes.** Weights by number format; gradients and optimizer state in fp32; the cache in the layout that decoding keeps.
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from byrote.memory.ngram import table_primes
from byrote.model.config import CSA_RATIO, AttentionConfig, DSAConfig, MLAConfig, ModelConfig, V4AttentionConfig

Parts = Counter[str]

# Parts that are matrices: Muon trains them, FP8 may store them (all but the router).
MATRIX_PARTS = frozenset(
    ("attention", "compressor", "indexer", "dense_ffn", "experts", "shared_experts", "router", "engram_projection", "mtp_projection")
)
# Parts with no multiply-add per number; "residual" is counted by what it does, see `_residual_work`.
_NO_WORK = frozenset(("embedding", "norms", "attention_biases", "residual"))
VOCABULARY_WORDS = {2: "twice", 1: "once", 0: "not at all"}  # how often a total counts the vocabulary matrix
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class ParameterCount:
    main: Parts
    active: Parts  # the share of `main` that one token passes through
    mtp: Parts
    mtp_depth: int
    table_rows: tuple[int, ...]  # of each memory layer
    table: int  # numbers in all tables

    @property
    def trained(self) -> int:
        """Numbers in `model.parameters()`: everything but the table."""
        return self.main.total() + self.mtp.total()

    @property
    def vocabulary(self) -> int:
        """Numbers in one vocabulary matrix, V · D."""
        return self.main["embedding"]

    def total(self, *, vocabulary: int = 2, mtp: str = "none") -> int:
        """Main model and table; `mtp` adds "own" weights, or those as "stored" with a copy of embedding and head in each module."""
        extra = {"none": 0, "own": self.mtp.total(), "stored": self.mtp.total() + 2 * self.mtp_depth * self.vocabulary}[mtp]
        return self.main.total() + self.table + extra - (2 - vocabulary) * self.vocabulary

    def active_total(self, *, vocabulary: int = 2) -> int:
        """Numbers one token passes through; rows read from the table are not among them."""
        return self.active.total() - (2 - vocabulary) * self.vocabulary


def count_parameters(config: ModelConfig) -> ParameterCount:
    main, mtp = _main_parts(config), _mtp_parts(config)
    rows = table_rows(config)
    return ParameterCount(
        main=main,
        active=_active(config, main),
        mtp=mtp,
        mtp_depth=0 if config.mtp is None else config.mtp.depth,
        table_rows=rows,
        table=0 if config.engram is None else sum(rows) * config.engram.head_dim,
    )


def table_rows(config: ModelConfig) -> tuple[int, ...]:
    """Rows of each layer's memory table: sums of the primes the hash takes."""
    engram = config.engram
    if engram is None:
        return ()
    primes = table_primes(engram.rows_per_order, engram.max_order, engram.num_heads, engram.hash_ids)
    return tuple(sum(layer) for layer in primes)


def count_buffers(config: ModelConfig) -> int:
    """Numbers kept but not trained by gradients: balancing biases, and the expert tables of V4's hash-routed blocks."""
    moe = config.moe
    if moe is None:
        return 0
    mtp_depth = 0 if config.mtp is None else config.mtp.depth
    hashed = sum(config.is_hashed(layer) for layer in range(config.num_layers))
    routed = sum(config.is_moe(layer) for layer in range(config.num_layers + mtp_depth))
    return (routed - hashed) * moe.num_experts + hashed * moe.top_k * config.vocab_size


# --- parts of a block -------------------------------------------------------------------------------------------------


def _main_parts(config: ModelConfig) -> Parts:
    vocabulary = config.vocab_size * config.dim
    parts = Parts(embedding=vocabulary, head=vocabulary, norms=config.dim, residual=_read_out(config))
    for layer in range(config.num_layers):
        parts += _block(config, layer)
        if config.engram_slot(layer) is not None:
            parts += _engram(config)
    return parts


def _mtp_parts(config: ModelConfig) -> Parts:
    """Own weights of all MTP modules: two input norms, projection, block, final norm, and a read-out where streams exist."""
    parts = Parts()
    if config.mtp is not None:
        for step in range(config.mtp.depth):
            parts += Parts(mtp_projection=2 * config.dim**2, norms=3 * config.dim, residual=_read_out(config))
            parts += _block(config, config.num_layers + step)
    return parts


def _active(config: ModelConfig, parts: Parts) -> Parts:
    active = Parts(parts)
    if config.moe is not None:
        active["experts"] = parts["experts"] * config.moe.top_k // config.moe.num_experts
    return active


def _block(config: ModelConfig, layer: int) -> Parts:
    two_sites = Parts(norms=2 * config.dim, residual=2 * _site(config))
    return two_sites + _attention(config, layer) + _feed_forward(config, layer)


def _attention(config: ModelConfig, layer: int) -> Parts:
    attention = config.attention_of(layer)
    if isinstance(attention, V4AttentionConfig):
        return _v4_attention(attention, config.dim, attention.ratio)
    return _mla(attention, config.dim) if isinstance(attention, MLAConfig) else _dsa(attention, config.dim)


def _dsa(dsa: DSAConfig, dim: int) -> Parts:
    """Latent attention, and V3.2's indexer: queries from the low-rank query, one key with a LayerNorm, a weight per head."""
    width = dsa.index_num_heads * dsa.index_head_dim
    indexer = (dsa.mla.q_lora_rank or dim) * width + dim * (dsa.index_head_dim + dsa.index_num_heads)
    return _mla(dsa.mla, dim) + Parts(indexer=indexer, norms=2 * dsa.index_head_dim)


def _mla(mla: MLAConfig, dim: int) -> Parts:
    heads, query_width = mla.num_heads, mla.num_heads * mla.qk_head_dim
    query = query_width * dim if mla.q_lora_rank is None else mla.q_lora_rank * (dim + query_width)
    latent = (mla.kv_lora_rank + mla.qk_rope_head_dim) * dim
    keys_values = heads * (mla.qk_nope_head_dim + mla.v_head_dim) * mla.kv_lora_rank
    output = dim * heads * mla.v_head_dim
    return Parts(attention=query + latent + keys_values + output, norms=mla.kv_lora_rank + (mla.q_lora_rank or 0))


def _v4_attention(v4: V4AttentionConfig, dim: int, ratio: int) -> Parts:
    """V4's core attention, and what a block of this compression ratio adds (shapes: arXiv 2606.19348 §2.3 and the release)."""
    width = v4.num_heads * v4.head_dim
    query = v4.q_lora_rank * (dim + width)
    output = v4.o_lora_rank * width + dim * v4.o_groups * v4.o_lora_rank
    parts = Parts(attention=query + v4.head_dim * dim + output, norms=v4.q_lora_rank + v4.head_dim, attention_biases=v4.num_heads)
    if ratio:
        parts += _compressor("compressor", v4.head_dim, dim, ratio)
    if ratio == CSA_RATIO:
        parts += _compressor("indexer", v4.index_head_dim, dim, ratio)
        parts["indexer"] += v4.index_num_heads * (v4.index_head_dim * v4.q_lora_rank + dim)
    return parts


def _compressor(part: str, width: int, dim: int, ratio: int) -> Parts:
    halves = 2 if ratio == CSA_RATIO else 1  # overlapping groups: one half of the channels for each group a token serves
    return Parts({part: 2 * halves * width * dim, "attention_biases": ratio * halves * width, "norms": width})


def _feed_forward(config: ModelConfig, layer: int) -> Parts:
    moe = config.moe
    if moe is None or not config.is_moe(layer):
        return Parts(dense_ffn=3 * config.dim * config.ffn_hidden)
    expert = 3 * config.dim * moe.expert_hidden
    return Parts(experts=moe.num_experts * expert, shared_experts=moe.num_shared * expert, router=moe.num_experts * config.dim)


def _site(config: ModelConfig) -> int:
    """Residual mixing at one site: maps for pre, post and res (arXiv 2512.24880, Eq 5 for hc and Eq 7 for mhc)."""
    streams, maps = config.residual.streams, config.residual.streams + 2
    if config.residual.kind == "plain":
        return 0
    dynamic = maps * config.dim if config.residual.kind == "hc" else streams * maps * streams * config.dim
    return dynamic + streams * maps + 3


def _read_out(config: ModelConfig) -> int:
    """From streams to one vector: learnt for mhc; HC takes the mean."""
    streams = config.residual.streams
    return streams * streams * config.dim + streams + 1 if config.residual.kind == "mhc" else 0


def _engram(config: ModelConfig) -> Parts:
    """One memory layer: a value and, per stream, a key projection, query and key norms, and the depthwise convolution."""
    assert config.engram is not None, "called for memory layers only"
    width, engram = config.residual.streams * config.dim, config.engram
    has_conv = engram.conv_kernel > 0
    return Parts(
        engram_projection=(config.dim + width) * engram.memory_dim,
        engram_convolution=width * engram.conv_kernel,
        norms=(3 if has_conv else 2) * width,
    )


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def mean_entries(sequence: int, ratio: int = 1, limit: int | None = None) -> float:
    """Mean over positions t = 1 … `sequence` of min(t // ratio, limit): entries a position sees of those made every `ratio` tokens."""
    entries = sequence // ratio if limit is None else min(limit, sequence // ratio)
    return (entries * (sequence + 1) - ratio * entries * (entries + 1) / 2) / sequence


def forward_flops(config: ModelConfig, sequence: int) -> dict[str, float]:
    """FLOPs per token of the main model by part, as a mean over the positions of a sequence."""
    work = {name: float(numbers) for name, numbers in _active(config, _main_parts(config)).items() if name not in _NO_WORK}
    layers = range(config.num_layers)
    work |= {"attention_scores": sum(_score_work(config, layer, sequence) for layer in layers)}
    work |= {"residual": 2 * len(layers) * _site_work(config) + _read_out_work(config)}
    if config.engram is not None:
        work["engram_gate"] = len(config.engram.layers) * 2.0 * config.residual.streams * config.dim
    return {name: 2 * multiply_adds for name, multiply_adds in work.items() if multiply_adds}


def mtp_flops(config: ModelConfig, sequence: int) -> float:
    """FLOPs per token of all MTP modules, forward; each runs the shared head once more."""
    if config.mtp is None:
        return 0.0
    parts = _active(config, _mtp_parts(config))
    work = float(sum(numbers for name, numbers in parts.items() if name not in _NO_WORK))
    for step in range(config.mtp.depth):
        work += config.vocab_size * config.dim + _score_work(config, config.num_layers + step, sequence)
        work += 2 * _site_work(config) + _read_out_work(config)
    return 2 * work


def training_flops(config: ModelConfig, sequence: int) -> float:
    """FLOPs per token of forward and backward, MTP on its share of the sequences included: three times forward."""
    share = 0.0 if config.mtp is None else config.mtp.train_fraction
    return 3 * (sum(forward_flops(config, sequence).values()) + share * mtp_flops(config, sequence))


def _score_work(config: ModelConfig, layer: int, sequence: int) -> float:
    """Multiply-adds of scores and weighted values (and of index scores) of one block."""
    attention = config.attention_of(layer)
    if isinstance(attention, MLAConfig):
        return attention.num_heads * (attention.qk_head_dim + attention.v_head_dim) * mean_entries(sequence)
    if isinstance(attention, DSAConfig):
        mla, keys = attention.mla, mean_entries(sequence, limit=attention.index_top_k)
        index = attention.index_num_heads * attention.index_head_dim * mean_entries(sequence)
        return mla.num_heads * (mla.qk_head_dim + mla.v_head_dim) * keys + index
    ratio, keys, index = attention.ratio, mean_entries(sequence, limit=attention.sliding_window), 0.0
    if ratio:
        keys += mean_entries(sequence, ratio, attention.index_top_k if ratio == CSA_RATIO else None)
    if ratio == CSA_RATIO:
        index = attention.index_num_heads * attention.index_head_dim * mean_entries(sequence, ratio)
    return attention.num_heads * 2 * attention.head_dim * keys + index


def _site_work(config: ModelConfig) -> float:
    """Coefficients (R·D inputs, R(R+2) outputs; HC: D inputs per stream) and application: read, write, mix."""
    streams, dim = config.residual.streams, config.dim
    if config.residual.kind == "plain":
        return 0.0
    inputs = streams * dim if config.residual.kind == "mhc" else dim
    return float(inputs * streams * (streams + 2) + streams * dim * (streams + 2))


def _read_out_work(config: ModelConfig) -> float:
    """Coefficients (mhc only) and the weighted sum."""
    streams, kind = config.residual.streams, config.residual.kind
    return 0.0 if kind == "plain" else float(streams * config.dim * (streams + 1 if kind == "mhc" else 1))


# --- bytes ------------------------------------------------------------------------------------------------------------


class CacheSize(NamedTuple):
    """What decoding keeps for the main model, in numbers and in bytes of the named layout."""

    numbers_per_token: float
    bytes_per_token: float
    bytes_fixed: int  # per sequence, whatever its length (windows)
    layout: str


def weight_bytes(count: ParameterCount) -> dict[str, int]:
    """Bytes of main and MTP weights, table apart. "fp8": matrices but the router in one byte (scales, 0.02 %, left out), the rest bf16."""
    parts = count.main + count.mtp
    matrices = sum(parts[name] for name in MATRIX_PARTS - {"router"})
    return {"fp32": 4 * count.trained, "bf16": 2 * count.trained, "fp8": 2 * count.trained - matrices}


def optimizer_bytes(count: ParameterCount, matrix_rule: str = "muon") -> int:
    """fp32 state of all weights: one momentum for matrices under Muon, two moments under AdamW, which also has everything else."""
    parts = count.main + count.mtp
    matrices = sum(parts[name] for name in MATRIX_PARTS)
    return 8 * (count.trained - matrices) + (4 if matrix_rule == "muon" else 8) * matrices


def table_bytes(config: ModelConfig) -> int:
    if config.engram is None:
        return 0
    return sum(table_rows(config)) * config.engram.head_dim * _DTYPE_BYTES[config.engram.table_dtype]


def table_optimizer_bytes(config: ModelConfig, table_rule: str = "rowwise") -> int:
    """State beside the rows: one fp32 (or two full moments), and a 4-byte count of updates, per row."""
    if config.engram is None:
        return 0
    state = 4 if table_rule == "rowwise" else 8 * config.engram.head_dim
    return sum(table_rows(config)) * (state + 4)


def table_read_bytes(config: ModelConfig) -> int:
    """Bytes of table rows one token reads, over all memory layers."""
    if config.engram is None:
        return 0
    return len(config.engram.layers) * config.engram.memory_dim * _DTYPE_BYTES[config.engram.table_dtype]


def cache_size(config: ModelConfig) -> CacheSize:
    blocks = [_block_cache(config.attention_of(layer)) for layer in range(config.num_layers)]
    return CacheSize(
        numbers_per_token=sum(block.numbers_per_token for block in blocks),
        bytes_per_token=sum(block.bytes_per_token for block in blocks),
        bytes_fixed=sum(block.bytes_fixed for block in blocks),
        layout=", ".join(dict.fromkeys(block.layout for block in blocks)),
    )


def _block_cache(attention: AttentionConfig) -> CacheSize:
    if isinstance(attention, MLAConfig):
        numbers = attention.kv_lora_rank + attention.qk_rope_head_dim
        return CacheSize(numbers, 2 * numbers, 0, "latent and rope key, bf16")
    if isinstance(attention, DSAConfig):
        latent, index = _block_cache(attention.mla), attention.index_head_dim
        return CacheSize(
            latent.numbers_per_token + index, latent.bytes_per_token + index + 4, 0, "latent and rope key, bf16; index key, fp8"
        )
    per_token = 1 / attention.ratio if attention.ratio else 0.0
    entry, index = _v4_entry_bytes(attention)
    numbers = attention.head_dim + (attention.index_head_dim if attention.ratio == CSA_RATIO else 0)
    size = entry + (index if attention.ratio == CSA_RATIO else 0)
    return CacheSize(per_token * numbers, per_token * size, attention.sliding_window * entry, "released V4: fp8 entries, fp4 index keys")


def _v4_entry_bytes(v4: V4AttentionConfig) -> tuple[int, int]:
    """(entry, index key): fp8 with a scale per 64 channels and bf16 rope channels, padded by one; fp4 with a scale per 32."""
    plain = v4.head_dim - v4.rope_head_dim
    return plain + 2 * v4.rope_head_dim + plain // 64 + 1, v4.index_head_dim // 2 + v4.index_head_dim // 32
