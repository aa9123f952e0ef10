"""What a model is: frozen dataclasses, one per part, and nothing derived from a device.

Every part can be switched off or exchanged here: `moe=None` is a dense model, `residual.kind` picks mHC, HC or the plain
residual, `engram=None` is a model without memory, `mtp=None` one without multi-token prediction, and `attention` is one kind for
all blocks or a tuple with one for each. Layer ids are 0-based block indices. The named presets live in `byrote.model.presets`,
sizes and costs in `byrote.model.count`.
"""

from dataclasses import dataclass, field, replace

from byrote.errors import ConfigError

CSA_RATIO, HCA_RATIO = 4, 128  # tokens behind one compressed entry of V4


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{name} is {value!r}; allowed: {', '.join(allowed)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnConfig:
    """Context extension by YaRN (V3 §4.3; reference constants of the release)."""

    factor: float  # new length / original length
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0  # amplitude rule: 0.1·mscale·ln(factor)+1 …
    mscale_all_dim: float = 1.0  # … divided by the same with this one; its square also scales the softmax


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    theta: float = 10_000.0
    layout: str = "interleaved"  # or "half": which channels form a pair
    yarn: YarnConfig | None = None

    def __post_init__(self) -> None:
        _one_of("rope.layout", self.layout, ("interleaved", "half"))


@dataclass(frozen=True, kw_only=True, slots=True)
class MLAConfig:
    """Multi-head latent attention (V3 §2.1.1)."""

    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None  # None: a full-rank query projection
    latent_norm_eps: float | None = None  # ε of the norms of the latents; None: the model's norm_eps (V3 fixes 1e-6 here)
    rope: RopeConfig = field(default_factory=RopeConfig)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def __post_init__(self) -> None:
        _require(self.qk_rope_head_dim % 2 == 0, f"attention.qk_rope_head_dim is {self.qk_rope_head_dim}; it must be even")


INDEX_STAGES = ("sparse", "dense_warmup")


@dataclass(frozen=True, kw_only=True, slots=True)
class DSAConfig:
    """DeepSeek sparse attention (V3.2): an indexer picks, for every query, the keys that latent attention reads."""

    mla: MLAConfig
    index_num_heads: int
    index_head_dim: int  # of an index query and key; its first mla.qk_rope_head_dim channels carry position, in half layout
    index_top_k: int  # keys a query keeps
    index_hadamard: bool = False  # turn index queries and keys by a Hadamard matrix, as the release does before FP8
    index_fp8: bool = False  # round index queries and keys to FP8 and back
    index_stage: str = "sparse"  # "dense_warmup": attend densely and let the indexer learn the whole distribution

    def __post_init__(self) -> None:
        _check_index(self.index_num_heads, self.index_top_k, self.index_stage)
        _require(
            self.index_head_dim >= self.mla.qk_rope_head_dim,
            f"attention.index_head_dim is {self.index_head_dim}; its rotary part alone has {self.mla.qk_rope_head_dim} channels",
        )
        width = self.index_head_dim
        _require(
            not self.index_hadamard or width & (width - 1) == 0, f"attention.index_hadamard needs a power of two; index_head_dim is {width}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class V4AttentionConfig:
    """V4's window plus compressed attention (arXiv 2606.19348 §2.3).

    Ratio 0 is the window alone; 4 is CSA (overlapping groups of four tokens, an indexer picks among them); 128 is HCA
    (every group of 128 tokens is read). MTP blocks use the window alone.
    """

    num_heads: int
    head_dim: int  # of a query head, and of the one head that serves as key and value for all of them
    rope_head_dim: int  # the last channels of head_dim
    q_lora_rank: int
    o_groups: int  # heads fall into this many groups, each with its own first output projection …
    o_lora_rank: int  # … to this width
    sliding_window: int
    compress_ratios: tuple[int, ...]  # one per block; a single one serves whatever block it is given to
    index_num_heads: int
    index_head_dim: int  # its last rope_head_dim channels carry position
    index_top_k: int  # compressed entries a query keeps in a CSA block
    index_stage: str = "sparse"  # "dense_warmup": read every entry and let the indexer learn the whole distribution
    rope: RopeConfig = field(default_factory=RopeConfig)  # of blocks with the window alone
    compress_rope: RopeConfig = field(default_factory=lambda: RopeConfig(theta=160_000.0))  # of blocks with compressed entries

    def __post_init__(self) -> None:
        _check_index(self.index_num_heads, self.index_top_k, self.index_stage)
        odd = sorted(set(self.compress_ratios) - {0, CSA_RATIO, HCA_RATIO})
        _require(not odd, f"attention.compress_ratios contains {odd}; allowed: 0 (window), {CSA_RATIO} (CSA), {HCA_RATIO} (HCA)")
        _require(self.num_heads % self.o_groups == 0, f"attention.o_groups {self.o_groups} must divide num_heads {self.num_heads}")
        _require(self.sliding_window > 0, f"attention.sliding_window is {self.sliding_window}; a query sees at least itself, so 1 or more")
        narrowest = min(self.head_dim, self.index_head_dim)
        fits = self.rope_head_dim % 2 == 0 and self.rope_head_dim <= narrowest
        _require(
            fits, f"attention.rope_head_dim is {self.rope_head_dim}; it must be even and at most {narrowest} (head_dim, index_head_dim)"
        )

    @property
    def ratio(self) -> int:
        """The compression ratio of a block's own configuration (`ModelConfig.attention_of`)."""
        assert len(self.compress_ratios) == 1, "a configuration of many blocks has no one ratio; ask attention_of(layer)"
        return self.compress_ratios[0]


AttentionConfig = MLAConfig | DSAConfig | V4AttentionConfig


def _check_index(num_heads: int, top_k: int, stage: str) -> None:
    _one_of("attention.index_stage", stage, INDEX_STAGES)
    for name, value in {"index_num_heads": num_heads, "index_top_k": top_k}.items():
        _require(value > 0, f"attention.{name} is {value}; it must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """DeepSeekMoE with auxiliary-loss-free balancing (V3 §2.1.2)."""

    num_experts: int
    top_k: int
    expert_hidden: int  # width of one routed expert
    num_shared: int = 1  # shared experts; together they are one SwiGLU of num_shared · expert_hidden
    score: str = "sigmoid"  # or "sqrt_softplus" (V4)
    num_groups: int = 1  # group-limited routing: experts split into groups …
    top_groups: int = 1  # … and only this many may be used by one token
    normalize_gate: bool = True  # divide the chosen scores by their sum
    route_scale: float = 1.0
    bias_rate: float = 0.001  # γ: step of the balancing bias
    balance_alpha: float = 0.0001  # α of the sequence-wise balance loss; 0 switches it off
    num_dense_layers: int = 1  # leading blocks with a dense feed-forward instead
    num_hash_layers: int = 0  # leading blocks whose experts are looked up by token id (V4)

    def __post_init__(self) -> None:
        _one_of("moe.score", self.score, ("sigmoid", "sqrt_softplus"))
        _require(1 <= self.top_k <= self.num_experts, f"moe.top_k is {self.top_k}; it must lie in 1..{self.num_experts} (num_experts)")
        _require(self.num_experts % self.num_groups == 0, f"moe.num_groups {self.num_groups} must divide num_experts {self.num_experts}")
        _require(
            1 <= self.top_groups <= self.num_groups,
            f"moe.top_groups is {self.top_groups}; it must lie in 1..{self.num_groups} (num_groups)",
        )
        reachable = self.top_groups * (self.num_experts // self.num_groups)
        _require(self.top_k <= reachable, f"moe.top_k {self.top_k} needs more experts than top_groups leaves ({reachable})")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResidualConfig:
    """The residual stream: mHC (arXiv 2512.24880), unconstrained HC, or plain addition."""

    kind: str = "mhc"  # "mhc" | "hc" | "plain"
    num_streams: int = 4
    sinkhorn_iters: int = 20
    eps: float = 1e-6

    def __post_init__(self) -> None:
        _one_of("residual.kind", self.kind, ("mhc", "hc", "plain"))
        _require(
            self.num_streams >= 2 or self.kind == "plain",
            "residual.num_streams must be at least 2 for mhc and hc; use kind='plain' for one",
        )

    @property
    def streams(self) -> int:
        """Number of parallel streams R that really exist."""
        return 1 if self.kind == "plain" else self.num_streams


@dataclass(frozen=True, kw_only=True, slots=True)
class EngramConfig:
    """Conditional memory (arXiv 2601.07372): hashed n-grams → rows of a table → a gated addition to the streams."""

    layers: tuple[int, ...]  # blocks that read memory, 0-based
    rows_per_order: int | tuple[int, ...]  # table size aimed at per (order, head) and layer; primes above it are taken
    head_dim: int  # numbers in one row
    num_heads: int = 8  # hash heads per order
    max_order: int = 3  # n-grams of orders 2..max_order
    hash_layer_ids: tuple[int, ...] | None = None  # ids that seed the hash; default: `layers`
    tokenizer_compression: bool = True  # a run maps its tokenizer's ids to canonical classes and fills `canonical_vocab`
    canonical_vocab: int | None = None  # classes of the compressed vocabulary; None: every token is its own class
    pad_token: int = 0  # raw token whose class stands before the start of a document
    hash_seed: int = 0
    conv_kernel: int = 4  # 0 leaves the short convolution out (V4.1)
    conv_dilation: int | None = None  # default: max_order
    gate: str = "soft"  # "soft": σ(signed sqrt); "hard": 0 or 1 with a straight-through gradient
    table_dtype: str = "float32"  # or "bfloat16"
    table_std: float = 0.02  # initial standard deviation of a row's numbers; 0: all zero

    def __post_init__(self) -> None:
        _one_of("engram.gate", self.gate, ("soft", "hard"))
        _one_of("engram.table_dtype", self.table_dtype, ("float32", "bfloat16"))
        _require(self.max_order >= 2, f"engram.max_order is {self.max_order}; n-grams start at order 2")
        for name in ("head_dim", "num_heads"):
            _require(getattr(self, name) > 0, f"engram.{name} is {getattr(self, name)}; it must be positive")
        _require(self.conv_kernel >= 0, f"engram.conv_kernel is {self.conv_kernel}; 0 leaves the convolution out, 4 is the paper's")
        _require(self.dilation > 0, f"engram.conv_dilation is {self.conv_dilation}; it must be positive")
        _require(len(set(self.layers)) == len(self.layers) > 0, f"engram.layers must name at least one block, each once; got {self.layers}")
        _require(
            self.hash_layer_ids is None or len(self.hash_layer_ids) == len(self.layers),
            f"engram.hash_layer_ids needs one id per layer: {len(self.layers)} expected, got {self.hash_layer_ids}",
        )

    @property
    def hash_ids(self) -> tuple[int, ...]:
        return self.layers if self.hash_layer_ids is None else self.hash_layer_ids

    @property
    def heads_per_layer(self) -> int:
        """Rows read per token and layer."""
        return (self.max_order - 1) * self.num_heads

    @property
    def memory_dim(self) -> int:
        """Length of the concatenated rows of one layer (d_mem)."""
        return self.heads_per_layer * self.head_dim

    @property
    def dilation(self) -> int:
        return self.max_order if self.conv_dilation is None else self.conv_dilation


@dataclass(frozen=True, kw_only=True, slots=True)
class MTPConfig:
    """Multi-token prediction (V3 §2.2): `depth` extra blocks in sequence, sharing embedding and head."""

    depth: int = 1
    form: str = "joined"  # "joined": one projection of embedding and hidden state (V3); "streams": one each, added per stream (V4)
    loss_weight: float = 0.3  # λ; a schedule in the run may change it over time
    train_fraction: float = 1.0  # share of a batch's sequences that MTP trains on: the head again is half the cost of a tiny model

    def __post_init__(self) -> None:
        _one_of("mtp.form", self.form, ("joined", "streams"))
        _require(self.depth >= 1, f"mtp.depth is {self.depth}; it must be at least 1 (mtp = none switches it off)")
        _require(0 < self.train_fraction <= 1, f"mtp.train_fraction is {self.train_fraction}; it must lie above 0 and at most at 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    vocab_size: int
    dim: int
    num_layers: int
    attention: AttentionConfig | tuple[AttentionConfig, ...]  # one for all blocks, or one per block
    ffn_hidden: int  # width of a dense SwiGLU
    max_positions: int = 4096
    moe: MoEConfig | None = None
    residual: ResidualConfig = field(default_factory=ResidualConfig)
    engram: EngramConfig | None = None
    mtp: MTPConfig | None = None
    norm_eps: float = 1e-6
    init_std: float = 0.02
    swiglu_limit: float | None = None  # V4: gate clipped from above, linear part from both sides
    pad_token: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "num_layers", "ffn_hidden", "max_positions"):
            _require(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be positive")
        self._check_attention()
        if self.engram is not None:
            outside = [layer for layer in self.engram.layers if not 0 <= layer < self.num_layers]
            _require(not outside, f"engram.layers names block {outside}; the model has blocks 0..{self.num_layers - 1}")
            pad = self.engram.pad_token
            _require(0 <= pad < self.vocab_size, f"engram.pad_token is {pad}; the vocabulary is 0..{self.vocab_size - 1}")

    def _check_attention(self) -> None:
        if isinstance(self.attention, tuple):
            listed = len(self.attention)
            _require(listed == self.num_layers, f"attention lists {listed} blocks; num_layers is {self.num_layers}")
        for part in self.attention if isinstance(self.attention, tuple) else (self.attention,):
            if isinstance(part, V4AttentionConfig) and len(part.compress_ratios) != 1:
                listed = len(part.compress_ratios)
                _require(listed == self.num_layers, f"attention.compress_ratios has {listed} entries; num_layers is {self.num_layers}")

    def attention_of(self, layer: int) -> AttentionConfig:
        """The attention of one block, V4's with its one ratio. MTP blocks are as the last block, V4's with the window alone."""
        inside = min(layer, self.num_layers - 1)
        kind = self.attention[inside] if isinstance(self.attention, tuple) else self.attention
        if not isinstance(kind, V4AttentionConfig):
            return kind
        ratio = kind.compress_ratios[inside if len(kind.compress_ratios) > 1 else 0]
        return replace(kind, compress_ratios=(ratio if layer == inside else 0,))

    def is_hashed(self, layer: int) -> bool:
        """Whether block `layer` looks its experts up by token id."""
        return self.moe is not None and self.is_moe(layer) and layer < min(self.moe.num_hash_layers, self.num_layers)

    def is_moe(self, layer: int) -> bool:
        """Whether block `layer` has experts (MTP blocks count on from num_layers and follow the same rule)."""
        return self.moe is not None and layer >= self.moe.num_dense_layers

    def engram_slot(self, layer: int) -> int | None:
        """Index of block `layer` among the memory layers, or None."""
        if self.engram is None or layer not in self.engram.layers:
            return None
        return self.engram.layers.index(layer)
