"""The sketch of the most visited n-grams against counting them all."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from byrote.memory.heavy import HeavyHitters, TopNgram
from tests.tolerances import assert_bitwise

VOCAB = 50


def count_all(batches: list[Tensor], documents: list[Tensor] | None = None, orders: tuple[int, ...] = (2, 3)) -> Counter[tuple[int, ...]]:
    """The slow twin: every n-gram of every row, one by one."""
    counts: Counter[tuple[int, ...]] = Counter()
    for number, ids_BT in enumerate(batches):
        for row in range(len(ids_BT)):
            for order in orders:
                for end in range(order, ids_BT.shape[1] + 1):
                    inside = None if documents is None else documents[number][row, end - order : end].tolist()
                    if inside is None or (len(set(inside)) == 1 and inside[0] >= 0):
                        counts[tuple(ids_BT[row, end - order : end].tolist())] += 1
    return counts


def zipf(batches: int, rows: int, length: int, seed: int = 0) -> list[Tensor]:
    """Few ids are frequent, most are rare, as in text."""
    generator = torch.Generator().manual_seed(seed)
    share = 1 / torch.arange(1, VOCAB + 1)
    return [torch.multinomial(share, rows * length, replacement=True, generator=generator).view(rows, length) for _ in range(batches)]


def test_with_room_for_all_every_count_is_exact() -> None:
    batches, sketch = zipf(5, 3, 17), HeavyHitters(VOCAB, 3, capacity=10**5)
    for batch in batches:
        sketch.update(batch)
    assert dict(sketch.top(10**6)) == count_all(batches) and sketch.lost == 0


@pytest.mark.parametrize("capacity", [1, 7, 100])
def test_counts_are_never_too_high_and_too_low_by_no_more_than_was_lost(capacity: int) -> None:
    batches, sketch = zipf(30, 4, 33), HeavyHitters(VOCAB, 3, capacity)
    for batch in batches:
        sketch.update(batch)
        assert len(sketch.keys_K) <= 2 * capacity
    truth, kept = count_all(batches), dict(sketch.top(10**6))
    assert sketch.seen == sum(truth.values())
    assert 0 < sketch.lost <= sketch.seen / (capacity + 1)
    assert all(kept.get(ngram, 0) <= count <= kept.get(ngram, 0) + sketch.lost for ngram, count in truth.items())
    assert kept.keys() <= truth.keys()


def test_ngrams_stop_at_documents_and_padding() -> None:
    batches = zipf(3, 2, 12)
    documents = [torch.tensor([[0] * 5 + [1] * 4 + [-1] * 3, [-1] * 2 + [4] * 10])] * 3
    sketch = HeavyHitters(VOCAB, 3, capacity=1000)
    for batch, document in zip(batches, documents, strict=True):
        sketch.update(batch, document)
    assert dict(sketch.top(1000)) == count_all(batches, documents)


def test_a_sketch_goes_on_from_where_it_was_saved() -> None:
    batches, whole, first = zipf(20, 2, 20), HeavyHitters(VOCAB, 3, 10), HeavyHitters(VOCAB, 3, 10)
    for batch in batches:
        whole.update(batch)
    for batch in batches[:9]:
        first.update(batch)
    second = HeavyHitters(VOCAB, 3, 99)
    second.load_state_dict(first.state_dict())
    for batch in batches[9:]:
        second.update(batch)
    for name, tensor in whole.state_dict().items():
        assert_bitwise(second.state_dict()[name], tensor)


def test_orders_too_long_for_one_number_are_left_out_and_short_rows_have_none() -> None:
    sketch = HeavyHitters(128_000, 5, 10)
    assert sketch.orders == [2, 3]
    sketch.update(torch.tensor([[127_999, 127_998, 127_999]]))
    sketch.update(torch.tensor([[5]]))
    assert dict(sketch.top(9)) == {(127_999, 127_998): 1, (127_998, 127_999): 1, (127_999, 127_998, 127_999): 1}


def test_the_example_of_the_essay() -> None:
    sketch = HeavyHitters(3, 2, 1)
    sketch.orders = [1]
    sketch.update(torch.tensor([[0], [1], [0]]))
    assert dict(sketch.top(9)) == {(0,): 2, (1,): 1}
    sketch.update(torch.tensor([[2]]))
    assert dict(sketch.top(9)) == {(0,): 1} and sketch.lost == 1


def test_ngrams_are_named_by_the_first_token_of_each_class() -> None:
    sketch = HeavyHitters(3, 2, 9)
    sketch.update(torch.tensor([[0, 2, 0, 2]]))
    words = [" The", "the", "CAT", "cat"]
    named = sketch.named(1, torch.tensor([0, 0, 2, 2]), lambda ids: "".join(words[token] for token in ids))
    assert named == [TopNgram(" thecat", 2, 2)]
    assert sketch.named(1, None, str) == [TopNgram("[0, 2]", 2, 2)]
