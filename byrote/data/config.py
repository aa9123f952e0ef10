"""What to train on: the sources and how their text becomes rows of tokens."""

from dataclasses import dataclass

from byrote.errors import ConfigError

RECALL = "recall"  # the name of the synthetic source


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallConfig:
    """The synthetic task of key–value recall (`synthetic.py`)."""

    shortest: int = 64  # tokens of the shortest documents; lengths double up to the row's
    pair_every: int = 16  # a document holds one pair for this many of its tokens …
    max_pairs: int = 32  # … and at most this many
    num_keys: int = 64
    num_values: int = 64
    num_hay: int = 128

    def __post_init__(self) -> None:
        for name in ("shortest", "pair_every", "max_pairs", "num_keys", "num_values", "num_hay"):
            if getattr(self, name) < 1:
                raise ConfigError(f"recall.{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_pairs > self.num_keys:
            raise ConfigError(f"recall.max_pairs is {self.max_pairs}; there are only {self.num_keys} keys (recall.num_keys)")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One corpus of a mixture."""

    path: str  # folder, .txt, .jsonl(.gz), .parquet, "python-stdlib", "hf:NAME[:SPLIT]", or "recall" (synthetic)
    weight: float = 1.0  # share of the training rows, relative to the other sources
    text_key: str = "text"  # column or key that holds the text (jsonl, parquet, hf)
    separator: str | None = None  # the line that parts one text file into documents; None: a file is a document
    recall: RecallConfig | None = None  # sizes of the source "recall"; none: the defaults

    def __post_init__(self) -> None:
        if self.path != RECALL and self.recall is not None:
            raise ConfigError(f"source {self.path!r} has sizes for recall; only the source {RECALL!r} takes them")
        if not self.weight > 0:
            raise ConfigError(
                f"the weight of source {self.path!r} is {self.weight}; it must be positive (leave the source out to not use it)"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    sources: tuple[SourceConfig, ...]
    vocab_size: int = 4096  # of the byte-level BPE trained on the sources
    tokenizer: str | None = None  # folder of an existing tokenizer; None: train one
    sequence_length: int = 256
    length_start: int | None = None  # tokens of the first rows, doubled to sequence_length; none: full length from the start
    length_warmup_fraction: float = 0.3  # share of the steps with shorter rows; a step feeds as many tokens as ever
    batch_sequences: int = 8  # sequences in one forward pass, at full length
    accumulate: int = 1  # forward passes per optimizer step
    packing: str = "cut"  # "cut": documents in one line, rows cut from it; "whole": what fits a row is never cut (long rows)
    validation_bytes: int = 512 * 1024  # documents in order of SHA-256(name) until this many bytes
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("data.sources is empty; name at least one corpus, such as python-stdlib or a folder of text")
        if self.packing not in ("cut", "whole"):
            raise ConfigError(f"data.packing is {self.packing!r}; allowed: cut, whole")
        for name in ("sequence_length", "batch_sequences", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} is {getattr(self, name)}; it must be at least 1")
        if self.validation_bytes < 0:
            raise ConfigError(f"data.validation_bytes is {self.validation_bytes}; it must not be negative (0: no validation)")
        self._check_length_warmup()

    def _check_length_warmup(self) -> None:
        if not 0 <= self.length_warmup_fraction <= 1:
            raise ConfigError(f"data.length_warmup_fraction is {self.length_warmup_fraction}; it must lie in 0..1")
        if self.length_start is None:
            return
        doublings, rest = divmod(self.sequence_length, self.length_start) if self.length_start > 0 else (0, 1)
        if rest or doublings.bit_count() != 1:
            raise ConfigError(
                f"data.length_start is {self.length_start}; sequence_length {self.sequence_length} must be that times a power of two"
            )
        if len(self.texts) < len(self.sources):
            raise ConfigError(
                "data.length_start would cut recall documents off their pairs; they start short by themselves: recall.shortest"
            )

    @property
    def texts(self) -> tuple[SourceConfig, ...]:
        """The sources that are read; the synthetic one is made as it is needed."""
        return tuple(source for source in self.sources if source.path != RECALL)
