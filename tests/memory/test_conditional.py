"""Tokens in, unique rows and their places out; mistakes with the canonical map are refused."""

import pytest
import torch

from byrote.errors import ConfigError
from byrote.memory.conditional import Memory
from byrote.memory.ngram import NgramHash
from byrote.memory.table import DeviceTable
from tests.tolerances import assert_bitwise

VOCAB, CLASSES = 11, 4
MAP = torch.arange(VOCAB) % CLASSES


def memory(*, canonical: bool = True, pad_token: int = 0) -> Memory:
    hash_ = NgramHash(
        canonical_vocab=CLASSES if canonical else VOCAB, rows_per_order=23, max_order=3, num_heads=2, layers=(0, 3), pad=pad_token % CLASSES
    )
    table = DeviceTable(sum(hash_.num_rows), 3, std=1.0)
    made = Memory(hash_, table, vocab_size=VOCAB, needs_canonical=canonical, pad_token=pad_token)
    if canonical:
        made.set_canonical(MAP)
    return made


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


def test_every_read_finds_its_row_and_every_row_is_unique():
    made = memory()
    rows = made.fetch(tokens())
    assert_bitwise(rows.rows_U, rows.rows_U.unique())
    assert_bitwise(rows.rows_U[rows.inverse_BTLN], made.global_rows(tokens()))
    assert_bitwise(rows.vectors_UE.detach(), made.store.vectors_NE[rows.rows_U])


def test_layers_read_behind_one_another_and_each_in_its_own_part():
    made = memory()
    rows_BTLN, sizes = made.global_rows(tokens()), made.hash.num_rows
    assert (rows_BTLN[:, :, 0] < sizes[0]).all()
    assert ((rows_BTLN[:, :, 1] >= sizes[0]) & (rows_BTLN[:, :, 1] < sum(sizes))).all()


def test_a_layer_gets_its_rows_side_by_side():
    made = memory()
    rows = made.fetch(tokens())
    wanted = made.store.vectors_NE[made.global_rows(tokens())[:, :, 1]].flatten(2)
    assert_bitwise(rows.layer(1).detach(), wanted)


def test_gradients_end_in_the_unique_rows_and_count_every_read():
    rows = memory().fetch(tokens())
    assert rows.vectors_UE.is_leaf
    (rows.layer(0).sum() + rows.layer(1).sum()).backward()
    reads_U = torch.bincount(rows.inverse_BTLN.flatten(), minlength=len(rows.rows_U))
    assert_bitwise(rows.vectors_UE.grad, reads_U[:, None].expand(-1, 3).float())


def test_without_gradients_nothing_is_tracked():
    with torch.no_grad():
        assert not memory().fetch(tokens()).vectors_UE.requires_grad


def test_tokens_of_one_class_share_their_rows():
    made = memory()
    alike = (tokens() + CLASSES).where(tokens() + CLASSES < VOCAB, tokens())
    assert not torch.equal(alike, tokens())
    assert_bitwise(made.global_rows(alike), made.global_rows(tokens()))


def test_the_class_of_the_pad_token_stands_before_the_text():
    made = memory(pad_token=7)
    assert made.hash.pad == 7 % CLASSES
    with_pad = made.global_rows(torch.cat((torch.full((2, 2), 7), tokens()), dim=1))[:, 2:]
    assert_bitwise(made.global_rows(tokens()), with_pad)


def test_without_its_map_a_compressed_memory_refuses_to_read():
    made = memory()
    made.canonical_V = None
    with pytest.raises(ConfigError, match="set_canonical"):
        made.fetch(tokens())


@pytest.mark.parametrize(
    ("map_", "message"),
    [
        (MAP[:-1], r"shape \(10,\).*needs \(11,\)"),
        (MAP[None], "needs"),
        (MAP + 1, r"classes 1\.\.4.*0\.\.3"),
        (MAP - 1, r"classes -1\.\.2"),
    ],
    ids=["short", "two dims", "too high", "negative"],
)
def test_a_map_that_does_not_fit_is_refused_and_the_old_one_stays(map_, message):
    made = memory()
    with pytest.raises(ConfigError, match=message):
        made.set_canonical(map_)
    assert_bitwise(made.canonical_V, MAP)


def test_a_table_of_another_size_than_the_hash_addresses_is_refused():
    hash_ = NgramHash(canonical_vocab=4, rows_per_order=23, max_order=3, num_heads=2, layers=(0,), pad=0)
    with pytest.raises(ConfigError, match="the table holds 5"):
        Memory(hash_, DeviceTable(5, 3), vocab_size=4)


def test_without_compression_every_token_is_its_own_class():
    assert_bitwise(memory(canonical=False).canonical(tokens()), tokens())
