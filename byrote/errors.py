"""Every error byrote raises on purpose, in one tree.

    ByroteError
    ├── ConfigError        an option, key or value that cannot be used; also "that needs an extra that is not installed"
    ├── DataError          text, shards or tokenizer files that are missing, empty, binary or damaged
    ├── CheckpointError    a checkpoint that is incomplete, altered, or belongs to another model
    ├── MemoryPackError    a memory pack that cannot be attached (wrong tokenizer, hash, size, checksum, path)
    ├── CapacityError      not enough disk, RAM or device memory for what was asked
    ├── TrainingError      training stopped itself: a loss or gradient that is not finite
    └── RequestError       a request the engine or server cannot honour
        └── PromptTooLong  its prompt leaves no room for an answer

A message says what was got, what is allowed, and what to do next.
"""


class ByroteError(Exception):
    """Base of everything byrote raises on purpose; the command line prints its text and exits with 2."""


class ConfigError(ByroteError):
    """An option, key or value that cannot be used."""


class DataError(ByroteError):
    """Input text, shards or tokenizer files that are missing, empty, binary or damaged."""


class CheckpointError(ByroteError):
    """A checkpoint that is incomplete, altered, or belongs to another model."""


class MemoryPackError(ByroteError):
    """A memory pack that cannot be attached."""


class CapacityError(ByroteError):
    """Not enough disk, RAM or device memory."""


class TrainingError(ByroteError):
    """Training stopped itself: a loss or gradient that is not finite."""


class RequestError(ByroteError):
    """A request the engine or server cannot honour."""


class PromptTooLong(RequestError):
    """A prompt that leaves no room for an answer."""
