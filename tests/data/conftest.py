"""A small corpus and a small tokenizer for every test of this folder."""

import random

import pytest

from byrote.data.shards import Shard, write_shard
from byrote.data.sources import Document
from byrote.tokenizer.bpe import Tokenizer, train_bpe

WORDS = ("for", "in", "return", "self", "value", "row", "é", "日本", "_name", "0x7F", "    ", "\n", "(", "):\n    ", "🦜")


def make_documents(count: int, longest: int = 60, seed: int = 0) -> list[Document]:
    """Documents of 1 to `longest` words, so that some fill many rows and some less than one."""
    choose = random.Random(seed)
    return [Document(f"d{i}.txt", " ".join(choose.choices(WORDS, k=1 + (i * 7) % longest))) for i in range(count)]


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    return make_documents(41)


@pytest.fixture(scope="session")
def tokenizer(documents: list[Document]) -> Tokenizer:
    return train_bpe((document.text for document in documents), 280)


@pytest.fixture(scope="session")
def shard(documents: list[Document], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Shard:
    return write_shard(tmp_path_factory.mktemp("shard"), documents, tokenizer, key="k", text_bytes=10_000)


@pytest.fixture(scope="session")
def second_shard(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Shard:
    documents = make_documents(13, seed=1)
    return write_shard(tmp_path_factory.mktemp("second"), documents, tokenizer, key="k", text_bytes=10_000)
