"""What a graft is made of, before anything is trained: its configuration, its text as shards, its sizes, and a fresh pack.

Rows begin at zero and projections at random (not the other way round): a fresh graft is bitwise the host, and an n-gram that training
never met stays silent for ever, so that text outside the domain feels only collisions. With `like`, projections are those of another
pack and stay so; then the two can be merged.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from byrote.checkpoint.packs import open_pack
from byrote.data.config import SourceConfig
from byrote.data.shards import Shard, find_shard, write_shard
from byrote.data.sources import Document, read_documents, source_state
from byrote.data.split import split_documents, training_documents
from byrote.device import check_disk, check_memory
from byrote.errors import ConfigError
from byrote.graft.controls import CONTROLS
from byrote.graft.facts import Fact, fact_documents, read_facts
from byrote.graft.host import Host, HostText, base_fingerprint, find_host
from byrote.model.config import EngramConfig
from byrote.model.pack import Pack, PackFacts, new_pack
from byrote.optim.rowwise import state_dim

MOST_ROWS = 1 << 20  # per order and head, where the number is derived
FACT_STEPS = 400  # for a catalogue alone: a few passes over so little text are a handful of steps, and teach nothing
TABLE_RULE = "rowwise"

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class GraftConfig:
    """What to graft on what. Sizes that are none are derived from the text and the host."""

    text: tuple[str, ...] = ()  # the domain: folders, files, hf:NAME, python-stdlib
    facts: str | None = None  # a catalogue: .csv with a header, or .jsonl
    layers: tuple[int, ...] = ()  # blocks of the host that get memory, from 0; none: block 1 and the middle one
    like: str | None = None  # a pack whose projections are taken over and frozen, so that the two can be merged
    outside: str = "python-stdlib"  # text outside the domain, to see what the graft costs there
    controls: tuple[str, ...] = ()  # of: one-row, shuffled, frozen-rows, no-lookup, lora
    seeds: tuple[int, ...] = (0,)  # one training each; the first becomes the pack
    epochs: float | None = None  # times the text is read; none: 3, or for facts alone as many as make 400 steps
    sequence_length: int = 256
    batch_sequences: int = 8
    rows_per_order: int | None = None  # rows per order, head and layer; none: as many as training tokens, at most 2^20
    head_dim: int | None = None  # numbers in a row; none: a sixteenth of the host's width
    num_heads: int = 4
    max_order: int = 3
    lr: float = 1e-3  # of projections, gate and convolution
    row_lr: float = 0.02  # of table rows
    precision: str = "fp32"  # or bf16: autocast over fp32 weights of the graft
    validation_bytes: int = 128 * 1024  # of the domain, held back; and as much from outside
    context: int | None = None  # tokens a window of held-out text sees; none: 512, or as many as the host has positions
    save_every_s: float = 120.0  # seconds between states kept for resuming
    name: str = "graft"  # of the pack
    licence: str = "not stated"  # of the text, for the manifest

    def __post_init__(self) -> None:
        if not self.text and self.facts is None:
            raise ConfigError("there is nothing to learn: give text (--text FOLDER) or a catalogue (--facts TABLE.csv)")
        unknown = [name for name in self.controls if name not in CONTROLS]
        if unknown:
            raise ConfigError(f"controls names {unknown[0]!r}; allowed: {', '.join(CONTROLS)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds is {self.seeds}; give at least one, each once")
        for name in ("epochs", "sequence_length", "batch_sequences", "lr", "row_lr"):
            if not (getattr(self, name) is None or 0 < getattr(self, name) < math.inf):
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be positive")


class Prepared(NamedTuple):
    shards: list[Shard]
    inside: list[Document]
    outside: list[Document]
    facts: list[Fact]

    @property
    def tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)


# --- data -------------------------------------------------------------------------------------------------------------


def prepare_data(config: GraftConfig, text: HostText, folder: Path, progress: Progress) -> Prepared:
    """Shards to train on and documents held back."""
    sources = [SourceConfig(path=path) for path in config.text]
    progress("reading the text")
    split = split_documents([read_documents(source) for source in sources], config.validation_bytes)
    facts = [] if config.facts is None else read_facts(config.facts)
    if facts:
        progress(f"{len(facts)} facts, such as: {facts[0].prompt}{facts[0].answer}")
    key = _digest([text.fingerprint(), config.validation_bytes, [(source.path, source_state(source)) for source in sources], facts])
    streams = [(training_documents(read_documents(s), n, split), split.training_bytes[n]) for n, s in enumerate(sources)]
    if facts:
        sentences = fact_documents(facts)
        streams.append((iter(sentences), sum(len(sentence.text.encode()) for sentence in sentences)))
    shards = []
    for number, (documents, num_bytes) in enumerate(streams):
        place = folder / f"source-{number}"
        progress(f"tokenising source {number + 1} of {len(streams)}")
        shards.append(find_shard(place, key) or write_shard(place, documents, cast(Any, text), key=key, text_bytes=num_bytes))
    progress("reading text from outside")
    outside = split_documents([read_documents(SourceConfig(path=config.outside))], config.validation_bytes).validation
    return Prepared(shards, list(split.validation), list(outside), facts)


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def training_steps(config: GraftConfig, tokens: int) -> tuple[int, float]:
    """(optimizer steps, times that the `tokens` are read)."""
    passes = tokens / (config.sequence_length * config.batch_sequences)
    if config.epochs is None and not config.text:
        return FACT_STEPS, FACT_STEPS / passes
    epochs = 3.0 if config.epochs is None else config.epochs
    return max(1, round(epochs * passes)), epochs


# --- sizes ------------------------------------------------------------------------------------------------------------


def engram_config(config: GraftConfig, host: Host, text: HostText, tokens: int) -> EngramConfig:
    """Sizes in numbered steps: 1 rows ← tokens of the text, 2 numbers in a row ← width of the host, 3 blocks ← depth."""
    rows = config.rows_per_order or min(MOST_ROWS, max(1024, tokens))
    blocks = len(host.blocks)
    layers = config.layers or tuple(sorted({min(1, blocks - 1), blocks // 2}))
    outside = [layer for layer in layers if not 0 <= layer < blocks]
    if outside:
        raise ConfigError(f"layers names block {outside[0]}; the model has blocks 0..{blocks - 1}")
    return EngramConfig(
        layers=layers,
        rows_per_order=rows,
        head_dim=config.head_dim or max(4, host.dim // 16),
        num_heads=config.num_heads,
        max_order=config.max_order,
        canonical_vocab=text.canonical(host.vocab_size).num_classes,
        pad_token=text.pad_id,
        table_std=0.0,
    )


def window(config: GraftConfig, host: Any) -> int:
    """Tokens of a window of held-out text. ConfigError where that, or a training row, is longer than the host reads."""
    positions = getattr(host.config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf
    context = int(min(512, positions)) if config.context is None else config.context
    for name, length in (("sequence_length", config.sequence_length), ("context", context)):
        if not 2 <= length <= positions:
            raise ConfigError(f"{name} is {length}; the model reads 2..{positions} tokens")
    return context


class Size(NamedTuple):
    ram: int
    disk: int


def graft_bytes(engram: EngramConfig, host: Any) -> Size:
    """Beside the host: table and projections with their optimizer state; on disk that twice, while it is replaced, and the pack."""
    rows = len(engram.layers) * engram.heads_per_layer * _largest(engram.rows_per_order)
    table = 4 * rows * (engram.head_dim + state_dim(TABLE_RULE, engram.head_dim) + 1)
    modules = 4 * 4 * len(engram.layers) * engram.memory_dim * 2 * find_host(host).dim
    return Size(table + modules, 3 * (table + modules))


def check_fits_machine(engram: EngramConfig, host: Any, work: Path) -> None:
    """Refuse what cannot fit before it is begun."""
    size = graft_bytes(engram, host)
    check_memory(size.ram, "the graft's table, projections and their optimizer state")
    check_disk(work, size.disk, "the state of the training and the pack")


def _largest(rows: int | tuple[int, ...]) -> int:
    return rows if isinstance(rows, int) else max(rows)


def make_pack(config: GraftConfig, engram: EngramConfig, model: Any, text: HostText, seed: int) -> Pack:
    """A fresh pack: zero rows, random projections of unit gain; or, with `like`, the other's projections."""
    host = find_host(model)
    facts = PackFacts(
        name=config.name,
        tokenizer=text.fingerprint(),
        base=base_fingerprint(model),
        provenance=f"{', '.join((*config.text, *filter(None, [config.facts])))}, seed {seed}",
        licence=config.licence,
    )
    canonical = text.canonical(host.vocab_size)
    if config.like is not None:
        return _like(open_pack(config.like), engram, facts, seed, host)
    width = engram.memory_dim**-0.5
    state = state_dim(TABLE_RULE, engram.head_dim)
    pack = new_pack(engram, dim=host.dim, vocab_size=host.vocab_size, init_std=width, seed=seed, table_state_dim=state, facts=facts)
    pack.memory.set_canonical(canonical.class_V)
    return pack


def _like(other: Pack, engram: EngramConfig, facts: PackFacts, seed: int, host: Host) -> Pack:
    """The other's hash and projections, the latter frozen, over an empty table."""
    config = replace(other.config, table_std=0.0, table_dtype="float32")
    state = state_dim(TABLE_RULE, config.head_dim)
    pack = new_pack(config, dim=host.dim, vocab_size=host.vocab_size, eps=other.eps, seed=seed, table_state_dim=state, facts=facts)
    assert other.memory.canonical_V is not None, "packs of a graft have a canonical map"
    pack.memory.set_canonical(other.memory.canonical_V)
    pack.layers.load_state_dict(other.layers.state_dict())
    pack.layers.requires_grad_(False)
    return pack
