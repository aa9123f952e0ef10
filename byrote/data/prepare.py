"""From a `DataConfig` to all that training needs: tokenizer, shards, validation texts. Cheap when it was done before.

    1. read every source once; hold validation documents back                            split.py
    2. train the tokenizer on the rest, or on a sample of TOKENIZER_BYTES where that is more; or load the one that is named
    3. tokenise the rest, one shard a source                                             shards.py

The synthetic source needs none of this. A run on nothing else gets the tokenizer of bytes alone.

    folder/  tokenizer/   source-0/ source-1/ …   validation.jsonl   prepared.json   (last: it makes the others count)

`prepared.json` carries a key made from the configuration and the state of the sources (names, sizes and times of files). While
the key fits, nothing is read again but the validation texts. A piece of text is in the tokenizer's sample if the SHA-256 of its
document's name and its number is small enough, so the sample is the same on every machine.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from byrote.data import corpus
from byrote.data.config import RECALL, DataConfig, RecallConfig, SourceConfig
from byrote.data.loader import Loader, ShardRows, Source
from byrote.data.shards import Shard, find_shard, write_shard
from byrote.data.sources import Document, Tally, read_documents, source_state
from byrote.data.split import RULE, Split, split_documents, training_documents
from byrote.data.synthetic import RecallRows, alphabet
from byrote.errors import DataError
from byrote.tokenizer.bpe import PIECES, Tokenizer, cut_long, train_bpe

FORMAT = "byrote-data-1"
TOKENIZER_BYTES = 64 << 20  # as much text as the tokenizer is trained on; more changes its merges very little
VERIFIED_BYTES = 1 << 30  # shards up to this size are checked whole when they are used again; larger ones by size only

Progress = Callable[[str, int, int], None]  # (stage, bytes done, bytes in all or 0 where unknown)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    config: DataConfig
    tokenizer: Tokenizer
    shards: tuple[Shard, ...]  # one a source that is text
    validation: list[Document]
    facts: dict[str, Any]  # counts for reports; plain JSON

    def train_loader(self, row_length: Callable[[int], int] | None = None) -> Loader:
        """A loader that stands at the beginning; for `row_length` see there."""
        c, shards = self.config, iter(self.shards)
        return Loader(
            [self._rows(source, (c.seed, number), shards) for number, source in enumerate(c.sources)],
            [source.weight for source in c.sources],
            sequence_length=c.sequence_length,
            batch_sequences=c.batch_sequences,
            pad_token=self.tokenizer.pad_id,
            seed=c.seed,
            row_length=row_length,
        )

    def _rows(self, source: SourceConfig, key: tuple[int, ...], shards: Iterator[Shard]) -> Source:
        if source.path != RECALL:
            return ShardRows(next(shards), self.config.sequence_length, key, self.config.packing)
        recall = source.recall or RecallConfig()
        return RecallRows(recall, alphabet(recall, self.tokenizer), self.config.sequence_length, key)


def prepare(config: DataConfig, folder: str | os.PathLike[str], progress: Progress | None = None) -> Prepared:
    """Read, split, tokenise into `folder`; or open what lies there if it was made from the same sources in the same way.

    Raises DataError for sources that are missing, empty or damaged, CapacityError for a full disk.
    """
    folder = Path(folder)
    tokenizer = None if config.tokenizer is None else Tokenizer.load(config.tokenizer)
    key = _key(config, tokenizer)
    done = _reuse(config, folder, key)
    return done or _build(config, folder, key, tokenizer, progress or _silent)


def _silent(_stage: str, _done: int, _total: int) -> None:
    pass


def _key(config: DataConfig, tokenizer: Tokenizer | None) -> str:
    sources = [(source.path, source.text_key, source.separator, source_state(source)) for source in config.texts]
    vocabulary = (config.vocab_size, PIECES, TOKENIZER_BYTES) if tokenizer is None else tokenizer.fingerprint()
    parts = (FORMAT, sources, vocabulary, config.validation_bytes)
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()


# --- what was prepared before -----------------------------------------------------------------------------------------


def _reuse(config: DataConfig, folder: Path, key: str) -> Prepared | None:
    try:
        saved = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
        validation = (folder / "validation.jsonl").read_bytes()
        if saved["key"] != key or saved["checksum"] != _checksum(saved["facts"], validation):
            return None
        tokenizer = Tokenizer.load(folder / "tokenizer")
        shards = [find_shard(_shard_folder(folder, source), key) for source in range(len(config.texts))]
        for shard in shards:
            if shard is None or shard.manifest["tokenizer"] != tokenizer.fingerprint():
                return None
            if shard.tokens.nbytes <= VERIFIED_BYTES:
                shard.verify()
    except (OSError, ValueError, KeyError, TypeError, DataError):  # missing, torn or altered: it is only a cache, and is made again
        return None
    documents = [Document(**json.loads(line)) for line in validation.splitlines()]
    return Prepared(config=config, tokenizer=tokenizer, shards=tuple(filter(None, shards)), validation=documents, facts=saved["facts"])


def _checksum(facts: dict[str, Any], validation: bytes) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode("utf-8") + validation).hexdigest()


def _shard_folder(folder: Path, source: int) -> Path:
    return folder / f"source-{source}"


# --- preparing --------------------------------------------------------------------------------------------------------


def _build(config: DataConfig, folder: Path, key: str, tokenizer: Tokenizer | None, progress: Progress) -> Prepared:
    folder.mkdir(parents=True, exist_ok=True)
    tallies = [Tally() for _ in config.texts]
    split = _split(config, tallies, progress)
    if tokenizer is None:
        tokenizer = _train_tokenizer(config, split, progress)
    tokenizer.save(folder / "tokenizer")
    shards = _write_shards(config, folder, key, tokenizer, split, progress)
    facts = _facts(config, tokenizer, split, shards, tallies)
    validation = "".join(json.dumps(document._asdict()) + "\n" for document in split.validation).encode("utf-8")
    _replace(folder / "validation.jsonl", validation)
    saved = {"key": key, "checksum": _checksum(facts, validation), "facts": facts}
    _replace(folder / "prepared.json", json.dumps(saved, indent=2).encode("utf-8"))
    return Prepared(config=config, tokenizer=tokenizer, shards=shards, validation=list(split.validation), facts=facts)


def _split(config: DataConfig, tallies: list[Tally], progress: Progress) -> Split:
    def reported(documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            progress("reading", sum(tally.text_bytes for tally in tallies), 0)
            yield document

    readers = [reported(read_documents(source, tally)) for source, tally in zip(config.texts, tallies, strict=True)]
    return split_documents(readers, config.validation_bytes)


def _training(config: DataConfig, split: Split, source: int) -> Iterator[Document]:
    return training_documents(read_documents(config.texts[source]), source, split)


def _train_tokenizer(config: DataConfig, split: Split, progress: Progress) -> Tokenizer:
    total = sum(split.training_bytes)
    share = min(1.0, TOKENIZER_BYTES / max(total, 1))
    documents = (document for source in range(len(config.texts)) for document in _training(config, split, source))
    expected = int(total * share)
    return train_bpe(_sample(documents, share), config.vocab_size, progress=lambda done: progress("tokenizer", done, expected))


def _sample(documents: Iterable[Document], share: float) -> Iterator[str]:
    """The documents, in the parts that the tokenizer takes; or about `share` of these parts, chosen by name and number."""
    below = int(share * 2**256)
    for name, text in documents:
        for number, part in enumerate(cut_long(text)):
            digest = hashlib.sha256(f"{name}:{number}".encode("utf-8", "surrogateescape")).digest()
            if int.from_bytes(digest, "big") < below:
                yield part


def _write_shards(config: DataConfig, folder: Path, key: str, tokenizer: Tokenizer, split: Split, progress: Progress) -> tuple[Shard, ...]:
    total, before = sum(split.training_bytes), 0
    shards = []
    for source, text_bytes in enumerate(split.training_bytes):

        def report(written: int, before: int = before) -> None:
            progress("tokenising", before + written, total)

        documents, target = _training(config, split, source), _shard_folder(folder, source)
        shards.append(write_shard(target, documents, tokenizer, key=key, text_bytes=text_bytes, progress=report))
        before += text_bytes
    return tuple(shards)


def _facts(config: DataConfig, tokenizer: Tokenizer, split: Split, shards: tuple[Shard, ...], tallies: list[Tally]) -> dict[str, Any]:
    held_bytes = sum(len(document.text.encode("utf-8")) for document in split.validation)
    num_tokens = sum(shard.num_tokens for shard in shards)
    text_bytes = sum(shard.manifest["text_bytes"] for shard in shards)
    sources = [
        {"path": source.path, **asdict(tally), "remarks": tally.remarks(), "training_tokens": shard.num_tokens}
        for source, tally, shard in zip(config.texts, tallies, shards, strict=True)
    ]
    facts: dict[str, Any] = {
        "sources": sources,
        "training": {"documents": sum(shard.num_documents for shard in shards), "bytes": text_bytes, "tokens": num_tokens},
        "validation": {"documents": len(split.validation), "bytes": held_bytes, "rule": RULE.format(limit=config.validation_bytes)},
        "tokenizer": {
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint(),
            "bytes_per_token": text_bytes / num_tokens if num_tokens else 1.0,  # begin and end tokens counted
        },
    }
    if any(source.path == corpus.NAME for source in config.texts):
        facts["python"] = corpus.corpus_facts()._asdict()
    return facts


def _replace(file: Path, content: bytes) -> None:
    beside = file.with_name(file.name + ".partial")
    beside.write_bytes(content)
    beside.replace(file)
