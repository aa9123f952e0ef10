"""What to train on: the sources and how their text becomes rows of tokens."""

from dataclasses import dataclass

from byrote.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One corpus of a mixture."""

    path: str  # folder, .txt, .jsonl(.gz), .parquet, "python-stdlib", or "hf:NAME[:SPLIT]"
    weight: float = 1.0  # share of the training rows, relative to the other sources
    text_key: str = "text"  # column or key that holds the text (jsonl, parquet, hf)
    separator: str | None = None  # the line that parts one text file into documents; None: a file is a document

    def __post_init__(self) -> None:
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
    batch_sequences: int = 8  # sequences in one forward pass
    accumulate: int = 1  # forward passes per optimizer step
    validation_bytes: int = 512 * 1024  # documents in order of SHA-256(name) until this many bytes
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("data.sources is empty; name at least one corpus, such as python-stdlib or a folder of text")
        for name in ("sequence_length", "batch_sequences", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} is {getattr(self, name)}; it must be at least 1")
        if self.validation_bytes < 0:
            raise ConfigError(f"data.validation_bytes is {self.validation_bytes}; it must not be negative (0: no validation)")
