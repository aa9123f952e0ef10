"""Rows hold the documents exactly: none lost, none joined to its neighbour."""

from pathlib import Path

import numpy as np
import pytest
import torch

from byrote.data.order import counter_hash, permutation
from byrote.data.packing import IGNORE, PADDING, Line, TokenBatch, count_rows, pack_rows
from byrote.data.shards import Shard, write_shard
from byrote.data.sources import Document
from byrote.tokenizer.bpe import Tokenizer


def epoch(shard: Shard, length: int, key: tuple[int, ...] = (0,)) -> TokenBatch:
    line = Line(shard, key)
    rows = range(count_rows(shard.num_tokens, length))
    return pack_rows([line.cut(row * length, length + 1) for row in rows], length, pad_token=2)


@pytest.mark.parametrize("length", [1, 7, 64, 257, 100_000])
def test_every_token_but_begin_is_a_target_once_an_epoch(shard: Shard, tokenizer: Tokenizer, length: int) -> None:
    batch = epoch(shard, length)
    targets = batch.targets_BT[batch.targets_BT != IGNORE].sort().values
    expected = np.sort(shard.tokens[shard.tokens != tokenizer.begin_id])
    assert targets.tolist() == expected.tolist()
    fed = batch.tokens_BT[batch.document_BT != PADDING]
    assert shard.num_tokens - 1 <= fed.numel() <= shard.num_tokens


@pytest.mark.parametrize("length", [5, 64, 100_000])
def test_a_document_number_stands_for_one_stretch_of_one_document(shard: Shard, tokenizer: Tokenizer, length: int) -> None:
    texts = [shard.document(number).tolist() for number in range(shard.num_documents)]
    batch = epoch(shard, length)
    for tokens_T, targets_T, document_T in zip(*batch, strict=True):
        for number in range(int(document_T.max()) + 1):
            inside = document_T == number
            stretch = tokens_T[inside].tolist()
            assert any(stretch == text[at : at + len(stretch)] for text in texts for at in range(len(text)) if text[at] == stretch[0])
            assert tokenizer.begin_id not in stretch[1:]
            assert targets_T[inside].tolist()[:-1] == stretch[1:]
            assert number == 0 or stretch[0] == tokenizer.begin_id


def test_the_example_of_the_docstring(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = [Document("a", "\x01" * 3), Document("b", "\x02" * 2), Document("c", "\x03" * 4)]
    shard = write_shard(tmp_path, documents, tokenizer, key="k", text_bytes=9)
    key = next(key for key in range(1000) if permutation((key,), 3).tolist() == [0, 1, 2])
    (a, b, c), begin, end, no = (tokenizer.encode(d.text)[0] for d in documents), tokenizer.begin_id, tokenizer.end_id, IGNORE
    batch = epoch(shard, 5, (key,))
    assert batch.tokens_BT.tolist() == [[begin, a, a, a, end], [begin, b, b, end, begin], [c, c, c, c, end]]
    assert batch.targets_BT.tolist() == [[a, a, a, end, no], [b, b, end, no, c], [c, c, c, end, no]]
    assert batch.document_BT.tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]


def test_padding_is_no_document_and_no_target(shard: Shard) -> None:
    batch = epoch(shard, shard.num_tokens + 10)
    assert batch.document_BT[0, -10:].tolist() == [PADDING] * 10
    assert batch.targets_BT[0, -11:].tolist() == [IGNORE] * 11
    assert batch.tokens_BT[0, -10:].tolist() == [2] * 10
    assert [part.dtype for part in batch] == [torch.int64, torch.int64, torch.int32]


def test_an_order_is_a_permutation_that_its_whole_key_decides() -> None:
    orders = {tuple(permutation(key, 257)) for key in [(0,), (1,), (0, 0), (0, 1), (1, 0), (-1,)]}
    assert len(orders) == 6
    assert all(sorted(order) == list(range(257)) for order in orders)
    assert permutation((0,), 0).tolist() == []


def test_the_hash_is_splitmix64_on_every_machine() -> None:
    """First outputs of SplitMix64 from seed 0, as its authors publish them: with the empty key, state and seed are both 0."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [int(bits) for bits in counter_hash((), np.arange(3))] == expected
