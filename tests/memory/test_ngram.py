"""The hash against published integers, and what it may and may not look at: papers.md §1.3–1.4."""

from itertools import pairwise

import pytest
import torch

from byrote.errors import ConfigError
from byrote.memory.ngram import NgramHash, NgramHistory, hash_multipliers, is_prime, table_primes
from tests.tolerances import assert_bitwise

PAD = 2
TOY = NgramHash(canonical_vocab=1000, rows_per_order=1000, max_order=3, num_heads=2, layers=(0, 1), pad=PAD)
FOUR = NgramHash(canonical_vocab=50, rows_per_order=(101, 67, 31), max_order=4, num_heads=3, layers=(5,), pad=0, seed=7)


def ids(rows: int, length: int, seed: int = 0, vocab: int = 50) -> torch.Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_toy_text_reads_the_published_rows():
    rows_BTLN = TOY.rows(torch.tensor([[5, 17, 999, 0, 3]]))
    assert rows_BTLN[0, :, 0].tolist() == [
        [37, 1459, 2818, 3986], [994, 1890, 2398, 3385], [657, 1329, 2971, 3515], [332, 1307, 2030, 3621], [549, 1455, 2242, 4007],
    ]  # fmt: skip
    assert rows_BTLN[0, :, 1].tolist() == [
        [286, 2023, 2970, 4122], [115, 2056, 2426, 3625], [792, 1473, 2422, 3922], [480, 1666, 3056, 3941], [932, 1561, 2783, 3187],
    ]  # fmt: skip


def test_toy_primes_and_multipliers_are_the_published_ones():
    assert TOY.primes == ((1009, 1013, 1019, 1021), (1031, 1033, 1039, 1049))
    assert TOY.multipliers == (
        (5874934615388535, 2488343231644625, 377914054924497),
        (7593627661414631, 479593001838623, 3563315849468963),
    )


def test_primes_of_the_27b_model_are_the_published_ones():
    first, second = table_primes(2_262_400, 3, 8, (2, 15))
    tails = (
        "409 413 437 443 451 457 461 467 499 521 529 541 563 569 593 619",
        "629 641 643 679 713 727 761 769 811 817 823 833 847 851 857 859",
    )
    assert [first, second] == [tuple(2_262_000 + int(tail) for tail in line.split()) for line in tails]
    assert (sum(first), sum(second)) == (36_199_972, 36_204_260)


def test_row_totals_of_the_published_models_come_out():
    demo = table_primes(646_400, 3, 8, (1, 15))
    assert [sum(layer) for layer in demo] == [10_344_164, 10_348_242]
    assert sum(map(sum, table_primes(7_239_680, 3, 8, (2, 15)))) == 231_678_892
    assert sum(map(sum, table_primes(16_000_000, 4, 8, (1, 14)))) == 768_022_850


def test_multipliers_of_v41_are_the_published_ones():
    assert hash_multipliers(99_092, 4, 14, 0) == (67716810739261, 51510806800915, 30921347202721, 82619226485591)


def test_is_prime_agrees_with_trial_division_and_knows_strong_pseudoprimes():
    for number in range(-3, 2000):
        assert is_prime(number) == (number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1)))
    assert not any(map(is_prime, (3215031751, 3825123056546413051, 2**61 + 1)))
    assert is_prime(2**61 - 1)


def test_no_product_overflows_for_any_vocabulary():
    for vocab in (1, 2, 3, 1000, 99_092, 2**31 - 1):
        for layer in (0, 1, 39):
            assert all(m % 2 == 1 and (vocab - 1) * m < 2**63 for m in hash_multipliers(vocab, 4, layer, 0))


def test_every_prime_is_used_once_and_every_row_lies_in_its_own_sub_table():
    primes = [prime for layer in TOY.primes for prime in layer]
    assert len(set(primes)) == len(primes)
    rows_BTLN = TOY.rows(ids(3, 257, vocab=1000))
    for layer, sizes in enumerate(TOY.primes):
        ends = torch.tensor(sizes).cumsum(0)
        assert (rows_BTLN[:, :, layer] >= ends - torch.tensor(sizes)).all()
        assert (rows_BTLN[:, :, layer] < ends).all()
    assert TOY.num_rows == tuple(map(sum, TOY.primes))


@pytest.mark.parametrize("hash_", [TOY, FOUR], ids=["order 3", "order 4"])
def test_a_token_alters_the_rows_of_the_next_positions_only(hash_):
    length, at = 17, 6
    before = ids(1, length)
    after = before.clone()
    after[0, at] += 1
    changed_T = (hash_.rows(before) != hash_.rows(after)).flatten(2).any(-1)[0]
    assert changed_T.nonzero().flatten().tolist() == list(range(at, at + hash_.max_order))


def test_an_order_looks_back_exactly_its_length():
    before = ids(1, 9)
    after = before.clone()
    after[0, 3] += 1
    rows, other = (FOUR.rows(text).view(9, 3, 3) for text in (before, after))  # token, order, head
    for order in (2, 3, 4):
        changed = (rows[:, order - 2] != other[:, order - 2]).any(-1).nonzero().flatten().tolist()
        assert changed == list(range(3, 3 + order))


@pytest.mark.parametrize("cuts", [(1,), (2, 3), (1, 2, 3, 4, 5, 6), (16,)])
def test_chunks_with_their_history_read_what_the_whole_reads(cuts):
    text, reach = ids(2, 17), FOUR.max_order - 1
    padded = torch.cat((torch.full((2, reach), FOUR.pad), text), dim=1)
    borders = [0, *cuts, 17]
    parts = [FOUR.rows(text[:, a:b], history_BN=padded[:, a : a + reach]) for a, b in pairwise(borders)]
    assert_bitwise(torch.cat(parts, dim=1), FOUR.rows(text))


def test_packed_documents_read_what_each_reads_alone():
    lengths, rows = (1, 2, 7, 3), ids(1, 13)
    document_BT = torch.repeat_interleave(torch.tensor([4, 1, 9, 2]), torch.tensor(lengths))[None]
    alone = [FOUR.rows(part) for part in rows.split(lengths, dim=1)]
    assert_bitwise(FOUR.rows(rows, document_BT=document_BT), torch.cat(alone, dim=1))


def test_left_padding_changes_nothing():
    text = ids(1, 5)
    padded = torch.cat((ids(1, 4, seed=1), text), dim=1)
    document_BT = torch.tensor([[-1] * 4 + [0] * 5])
    assert_bitwise(FOUR.rows(padded, document_BT=document_BT)[:, 4:], FOUR.rows(text))


def test_a_border_seen_from_beyond_stays_closed_when_the_old_number_returns():
    text = ids(1, 4)
    document_BT = torch.tensor([[0, 1, 0, 0]])  # the second 0 is another document than the first, however it is called
    assert_bitwise(FOUR.rows(text, document_BT=document_BT)[:, 2:], FOUR.rows(text[:, 2:]))


def test_history_of_another_document_is_not_seen():
    text = ids(1, 6)
    history = NgramHistory(text[:, :3], torch.tensor([[7, 7, 3]]))
    rows = FOUR.rows(text[:, 3:], document_BT=torch.tensor([[3, 3, 8]]), history_BN=history)
    assert_bitwise(rows, FOUR.rows(text[:, 2:], document_BT=torch.tensor([[3, 3, 3, 8]]))[:, 1:])
    without_numbers = FOUR.rows(text[:, 3:], history_BN=history)
    assert_bitwise(without_numbers, FOUR.rows(text[:, 2:])[:, 1:])


@pytest.mark.parametrize("bad", [-1, 1000, 2**40])
def test_ids_outside_the_canonical_vocabulary_raise(bad):
    with pytest.raises(ConfigError, match=r"allowed are 0\.\.999"):
        TOY.rows(torch.tensor([[5, bad]]))
    with pytest.raises(ConfigError, match="canonical ids span"):
        TOY.rows(torch.tensor([[5]]), history_BN=torch.tensor([[bad, 3]]))


@pytest.mark.parametrize("reach", [1, 3])
def test_a_history_of_the_wrong_length_raises(reach):
    with pytest.raises(ConfigError, match="last 2 ids"):
        TOY.rows(torch.tensor([[5]]), history_BN=torch.zeros(1, reach, dtype=torch.int64))


def test_impossible_hashes_raise():
    with pytest.raises(ConfigError, match="pad class 50"):
        NgramHash(canonical_vocab=50, rows_per_order=9, max_order=3, num_heads=1, layers=(0,), pad=50)
    with pytest.raises(ConfigError, match="one per order"):
        table_primes((9, 9, 9), 3, 1, (0,))


def test_no_tokens_read_no_rows():
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    for document_BT in (None, nothing):
        assert TOY.rows(nothing, document_BT=document_BT).shape == (2, 0, 2, 4)


def test_seed_and_layer_change_the_rows_and_int32_does_not():
    def rows(**changes):
        options = {"canonical_vocab": 50, "rows_per_order": 1000, "max_order": 3, "num_heads": 2, "layers": (0,), "pad": 0}
        return NgramHash(**(options | changes)).rows(ids(1, 50))

    assert (rows(seed=1) != rows()).float().mean() > 0.9
    assert (rows(layers=(3,)) != rows()).float().mean() > 0.9
    assert_bitwise(TOY.rows(ids(1, 50).int()), TOY.rows(ids(1, 50)))
