"""Resumed equals never interrupted, bitwise; and what is prepared ahead changes nothing."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from byrote.data import loader as loader_module
from byrote.data.loader import Loader, ShardRows
from byrote.data.packing import IGNORE, PADDING, TokenBatch
from byrote.data.shards import Shard
from byrote.errors import DataError


def make(*shards: Shard, seed: int = 0, length: int = 16, batch: int = 3) -> Loader:
    weights = [2.0, 1.0][: len(shards)]
    sources = [ShardRows(shard, length, (seed, number)) for number, shard in enumerate(shards)]
    return Loader(sources, weights, sequence_length=length, batch_sequences=batch, pad_token=2, seed=seed)


def take(loader: Loader, count: int) -> Iterator[TokenBatch]:
    return (loader.next_batch() for _ in range(count))


def same(first: TokenBatch, second: TokenBatch) -> bool:
    return all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("steps", [0, 1, 20, 200])
def test_resumed_equals_never_interrupted(shard: Shard, second_shard: Shard, steps: int) -> None:
    with closing(make(shard, second_shard)) as whole, closing(make(shard, second_shard)) as resumed:
        list(take(whole, steps))
        state = json.loads(json.dumps(whole.state_dict()))
        list(take(resumed, 5))  # a loader that stands somewhere else goes where the state says
        resumed.load_state_dict(state)
        assert resumed.state_dict() == whole.state_dict()
        assert all(same(one, two) for one, two in zip(take(whole, 30), take(resumed, 30), strict=True))
        assert resumed.state_dict() == whole.state_dict()
        assert max(whole.epochs) > 1 or steps < 200


def test_what_is_prepared_ahead_changes_neither_batches_nor_state(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(make(shard)) as ahead, closing(make(shard)) as plain:
        for _ in range(30):
            first, first_state = ahead.next_batch(), ahead.state_dict()
            monkeypatch.setattr(loader_module, "AHEAD", 0)
            second, second_state = plain.next_batch(), plain.state_dict()
            monkeypatch.undo()
            assert same(first, second)
            assert first_state == second_state


def test_the_state_stays_small(shard: Shard, second_shard: Shard) -> None:
    with closing(make(shard, second_shard)) as loader:
        list(take(loader, 100))
        assert len(json.dumps(loader.state_dict())) < 500


@pytest.mark.parametrize("length", [16, 33])
def test_an_epoch_holds_every_target_once_and_the_next_one_another_order(shard: Shard, length: int) -> None:
    with closing(make(shard, length=length, batch=1)) as loader:
        rows = -(-(shard.num_tokens - 1) // length)
        first, second = ([batch.targets_BT for batch in take(loader, rows)] for _ in range(2))
        assert loader.epochs == (2.0,)
    begin = int(shard.tokens[0])
    expected = Counter(token for token in shard.tokens.tolist() if token != begin)
    for epoch in (first, second):
        assert Counter(torch.cat(epoch, 1)[0].tolist()) - Counter({IGNORE: 1 << 40}) == expected
    assert not torch.equal(torch.cat(first), torch.cat(second))


def test_tokens_seen_counts_what_was_fed_without_padding(shard: Shard) -> None:
    with closing(make(shard, length=100)) as loader:
        fed = sum(int((batch.document_BT != PADDING).sum()) for batch in take(loader, 40))
        assert loader.tokens_seen == loader.state_dict()["tokens"] == fed


def test_a_seed_decides_the_order(shard: Shard) -> None:
    with closing(make(shard)) as one, closing(make(shard)) as same_seed, closing(make(shard, seed=1)) as other:
        batch = one.next_batch()
        assert same(batch, same_seed.next_batch())
        assert not same(batch, other.next_batch())


def test_rows_of_one_batch_come_from_all_over_the_corpus(shard: Shard) -> None:
    """Not one after the other from one long document."""
    with closing(make(shard, length=8, batch=16)) as loader:
        batch = loader.next_batch()
    last, first = batch.tokens_BT[:-1, -1], batch.tokens_BT[1:, 0]
    follows = (batch.targets_BT[:-1, -1] == first) & (last != first)
    assert int(follows.sum()) < 8


def test_a_corpus_shorter_than_a_row_is_padded_and_repeats(tmp_path_factory: pytest.TempPathFactory, tokenizer, documents) -> None:
    from byrote.data.shards import write_shard

    tiny = write_shard(tmp_path_factory.mktemp("tiny"), documents[:1], tokenizer, key="k", text_bytes=10)
    with closing(make(tiny, length=1000, batch=2)) as loader:
        batch = loader.next_batch()
        assert loader.epochs == (2.0,)
    assert torch.equal(batch.tokens_BT[0], batch.tokens_BT[1])
    assert int((batch.document_BT[0] != PADDING).sum()) == tiny.num_tokens


@pytest.mark.parametrize("change", ["seed", "sequence_length", "shards", "weights"])
def test_a_state_of_another_corpus_or_setting_is_refused(shard: Shard, second_shard: Shard, change: str) -> None:
    others = {
        "seed": make(shard, seed=1),
        "sequence_length": make(shard, length=17),
        "shards": make(second_shard),
        "weights": Loader([shard], [3.0], sequence_length=16, batch_sequences=3, pad_token=2, seed=0),
    }
    with closing(make(shard)) as loader:
        state = loader.state_dict()
    for other in others.values():
        with closing(other):
            if other is others[change]:
                with pytest.raises(DataError, match=rf"does not fit: {change} changed since"):
                    other.load_state_dict(state)


def test_an_error_of_the_thread_reaches_the_caller(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: object) -> None:
        raise OSError("the disk went away")

    monkeypatch.setattr(loader_module, "stack_rows", broken)
    with closing(make(shard)) as loader, pytest.raises(OSError, match="the disk went away"):
        loader.next_batch()
