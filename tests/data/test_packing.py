"""Rows hold the documents exactly: none lost, none joined to its neighbour."""

from pathlib import Path

import numpy as np
import pytest
import torch

from byrote.data import packing
from byrote.data.order import counter_hash, permutation
from byrote.data.packing import IGNORE, PADDING, CutRows, TokenBatch, WholeRows, shorten, stack_rows
from byrote.data.shards import Shard, write_shard
from byrote.data.sources import Document
from byrote.tokenizer.bpe import Tokenizer


def epoch(shard: Shard, length: int, key: tuple[int, ...] = (0,)) -> TokenBatch:
    rows = CutRows(shard, length, key)
    return stack_rows([rows.row(index) for index in range(rows.num_rows)], length, pad_token=2)


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


# --- whole documents in long rows -------------------------------------------------------------------------------------


def whole(shard: Shard, length: int, key: tuple[int, ...] = (0,)) -> TokenBatch:
    rows = WholeRows(shard, length, key)
    return stack_rows([rows.row(index) for index in range(rows.num_rows)], length, pad_token=2)


@pytest.mark.parametrize("length", [1, 7, 64, 257, 100_000])
def test_whole_rows_too_have_every_token_but_begin_as_a_target_once(shard: Shard, tokenizer: Tokenizer, length: int) -> None:
    batch = whole(shard, length)
    targets = batch.targets_BT[batch.targets_BT != IGNORE].sort().values
    assert targets.tolist() == np.sort(shard.tokens[shard.tokens != tokenizer.begin_id]).tolist()
    assert ((batch.targets_BT != IGNORE) == (batch.document_BT != PADDING)).all(), "nothing is fed that predicts nothing"


@pytest.mark.parametrize("length", [64, 257, 100_000])
def test_no_document_is_cut_that_fits_a_row(shard: Shard, tokenizer: Tokenizer, length: int) -> None:
    texts = [shard.document(number).tolist() for number in range(shard.num_documents)]
    batch = whole(shard, length)
    pieces = [
        [*tokens_T[document_T == number].tolist(), int(targets_T[document_T == number][-1])]
        for tokens_T, targets_T, document_T in zip(*batch, strict=True)
        for number in range(int(document_T.max()) + 1)
    ]
    short = [text for text in texts if len(text) - 1 <= length]
    assert sorted(piece for piece in pieces if piece[0] == tokenizer.begin_id and piece[-1] == tokenizer.end_id) == sorted(short)
    assert sum(len(piece) - 1 for piece in pieces) == sum(len(text) - 1 for text in texts)


def test_whole_rows_waste_little_and_no_two_of_them_would_fit_in_one(shard: Shard) -> None:
    batch = whole(shard, 257)
    filled = sorted((batch.document_BT != PADDING).sum(1).tolist())
    assert len(filled) == 1 or filled[0] + filled[1] > 257


def test_the_key_changes_who_shares_a_row_and_not_how_many_rows_there_are(shard: Shard) -> None:
    batches = [whole(shard, 64, (key,)) for key in range(4)]
    assert len({len(batch.tokens_BT) for batch in batches}) == 1
    assert not torch.equal(batches[0].tokens_BT, batches[1].tokens_BT)


def test_the_example_of_whole_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = [Document("a", "\x01" * 3), Document("b", "\x02" * 2), Document("c", "\x03" * 4)]
    shard = write_shard(tmp_path, documents, tokenizer, key="k", text_bytes=9)
    (a, b, c), begin, end, no = (tokenizer.encode(d.text)[0] for d in documents), tokenizer.begin_id, tokenizer.end_id, IGNORE
    batch = whole(shard, 5)
    assert batch.tokens_BT.tolist() == [[begin, c, c, c, c], [begin, a, a, a, 2], [begin, b, b, 2, 2]]
    assert batch.targets_BT.tolist() == [[c, c, c, c, end], [a, a, a, end, no], [b, b, end, no, no]]
    assert batch.document_BT.tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 0, -1], [0, 0, 0, -1, -1]]


def test_best_fit_takes_the_row_with_the_least_space_left() -> None:
    """Random sizes against a plain search over all rows."""
    sizes = sorted(np.random.default_rng(0).integers(1, 60, 300).tolist(), reverse=True)
    rows: list[list[int]] = []
    for size in sizes:
        fitting = [row for row in rows if 60 - sum(row) >= size]
        (min(fitting, key=lambda row: 60 - sum(row)) if fitting else rows.append([]) or rows[-1]).append(size)
    got = packing._best_fit([packing._Piece(0, size) for size in sizes], 60)
    sums = [sorted(sum(row) for row in some) for some in (rows, [[piece.size for piece in row] for row in got])]
    assert sums[0] == sums[1], "which of two rows with equal space takes a piece makes no difference"


def test_shortened_rows_hold_the_same_tokens_in_the_same_order(shard: Shard) -> None:
    batch = epoch(shard, 64)
    short = shorten(batch, 16)
    assert short.tokens_BT.shape == (4 * len(batch.tokens_BT), 16)
    assert all(torch.equal(one.flatten(), two.flatten()) for one, two in zip(batch, short, strict=True))
