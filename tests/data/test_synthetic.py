"""Recall documents can be answered, only from their own text; rows follow from a number alone; validation is never trained on."""

import numpy as np
import pytest

from byrote.data.config import DataConfig, RecallConfig, SourceConfig
from byrote.data.packing import IGNORE
from byrote.data.prepare import prepare
from byrote.data.synthetic import Alphabet, RecallRows, alphabet, is_held_out, lengths, num_pairs, recall_documents, validation_documents
from byrote.errors import ConfigError
from byrote.tokenizer.bpe import train_bpe

CONFIG = RecallConfig(shortest=16, pair_every=8, max_pairs=12, num_keys=16, num_values=9, num_hay=31)
IDS = np.arange(3, 59)
LETTERS = Alphabet(0, IDS[:16], IDS[16:25], IDS[25:])


def pairs_of(tokens: np.ndarray) -> list[tuple[int, int]]:
    """(key, value) wherever a key stands."""
    at = np.flatnonzero(np.isin(tokens, LETTERS.keys))
    return list(zip(tokens[at].tolist(), tokens[at + 1].tolist(), strict=True))


@pytest.mark.parametrize("length", [16, 17, 64, 257])
def test_every_pair_is_told_once_and_only_answers_to_what_was_told_are_targets(length):
    made = recall_documents(CONFIG, LETTERS, length, 20, (1, 2))
    pairs = num_pairs(CONFIG, length)
    assert made.tokens_NL.shape == (20, length)
    for tokens, targets in zip(*made, strict=True):
        told, asked = (pairs_of(part) for part in np.split(tokens, [length - 2 * pairs]))
        assert set(asked) <= set(told) and len(told) == len(dict(told)) == len(asked) == pairs
        assert all(value in LETTERS.values for value in dict(told).values())
        scored = np.flatnonzero(targets != IGNORE)
        assert targets[scored].tolist() == tokens[scored + 1].tolist() == [value for _, value in asked]
        hay = np.delete(tokens, np.flatnonzero(np.isin(tokens, [*LETTERS.keys, *LETTERS.values])))
        assert hay[0] == 0 and np.isin(hay[1:], LETTERS.hay).all()


def test_places_keys_values_and_questions_are_spread_evenly():
    """Chi-square at 1 ‰, over 4,000 documents."""
    made = recall_documents(CONFIG, LETTERS, 64, 4000, (0,), pairs=2)
    body = made.tokens_NL[:, 1:60]
    first = np.argmax(np.isin(body, LETTERS.keys), axis=1)
    for values, outcomes in ((made.tokens_NL[:, 60], LETTERS.keys), (made.tokens_NL[:, 61], LETTERS.values)):
        counts = np.array([(values == outcome).sum() for outcome in outcomes])
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 40
    assert abs(first.mean() - 57 / 3) < 1, "the first of two places among 57 lies at a third of the way"


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_the_first_question_asks_for_the_pair_at_the_depth(depth):
    made = recall_documents(CONFIG, LETTERS, 257, 50, (3,), pairs=8, questions=2, depth=depth)
    for tokens in made.tokens_NL:
        body = tokens[1:253]
        place = int(np.flatnonzero(body == tokens[253])[0])
        assert abs(place - depth * 250) <= 8, "each pair before it takes one token more"
        assert tokens[253] != tokens[255]


def test_training_and_validation_share_no_set_of_associations():
    def sets(tokens_NL):
        return {frozenset(pairs_of(tokens)) for tokens in tokens_NL}

    training = set.union(*(sets(recall_documents(CONFIG, LETTERS, 16, 300, (seed,), pairs=1).tokens_NL) for seed in range(10)))
    held = sets(validation_documents(CONFIG, LETTERS, 16, 300, seed=5, pairs=1).tokens_NL)
    assert len(training) + len(held) <= 16 * 9 and not training & held
    assert len(training) > 100 and len(held) > 5, "of 144 pairs an eighth is held back"


def test_the_side_of_a_set_depends_on_what_is_in_it_and_not_on_the_order():
    made = recall_documents(CONFIG, LETTERS, 64, 200, (4,))
    keys, values = (np.array([[pair[side] for pair in pairs_of(tokens[:48])] for tokens in made.tokens_NL]) for side in (0, 1))
    assert not is_held_out(keys, values).any()
    assert not is_held_out(keys[:, ::-1], values[:, ::-1]).any()
    assert 0.05 < is_held_out(keys, np.roll(values, 1, axis=1)).mean() < 0.25


def test_a_row_follows_from_its_number_and_is_filled_with_documents_of_one_length():
    rows = RecallRows(CONFIG, LETTERS, 64, (0, 1))
    seen = set()
    for number in [*range(40), 10**9]:
        row = rows.row(number)
        again = RecallRows(CONFIG, LETTERS, 64, (0, 1)).row(number)
        assert all(np.array_equal(one, two) for one, two in zip(row, again, strict=True))
        assert len(row.tokens) == len(row.targets) == len(row.documents) == 64
        starts = np.flatnonzero(row.tokens == 0)
        assert np.array_equal(starts, np.flatnonzero(np.diff(row.documents, prepend=-1)))
        seen.add(64 // len(starts))
    assert seen == {16, 32, 64} == set(lengths(CONFIG, 64))
    assert not np.array_equal(rows.row(0).tokens, RecallRows(CONFIG, LETTERS, 64, (0, 2)).row(0).tokens)


def test_the_alphabet_takes_ordinary_ids_only():
    tokenizer = train_bpe([], 259)
    letters = alphabet(CONFIG, tokenizer)
    together = np.concatenate(letters[1:])
    assert len(set(together.tolist())) == 16 + 9 + 31
    assert not np.isin(together, [tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id]).any()
    with pytest.raises(ConfigError, match=r"needs 456 ordinary tokens .*, the vocabulary has 256"):
        alphabet(RecallConfig(num_hay=328), tokenizer)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="8 pairs and 8 questions do not fit a recall document of 20 tokens"):
        recall_documents(CONFIG, LETTERS, 20, 1, (0,), pairs=8)
    with pytest.raises(ConfigError, match=r"data\.sequence_length is 48; with recall\.shortest 16 it must be that times a power of two"):
        lengths(CONFIG, 48)
    with pytest.raises(ConfigError, match="only the source 'recall' takes them"):
        SourceConfig(path="notes", recall=CONFIG)
    with pytest.raises(ConfigError, match="there are only 16 keys"):
        RecallConfig(num_keys=16)
    with pytest.raises(ConfigError, match="would cut recall documents off their pairs"):
        DataConfig(sources=(SourceConfig(path="recall"),), length_start=64)


def test_recall_is_a_source_like_any_other_in_a_mixture(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(12):
        (tmp_path / "text" / f"{number}.txt").write_text("some text that repeats itself, some text " * 9)
    sources = (SourceConfig(path="recall", weight=1.0, recall=CONFIG), SourceConfig(path=str(tmp_path / "text")))
    config = DataConfig(sources=sources, vocab_size=262, sequence_length=64, batch_sequences=8, validation_bytes=300)
    prepared = prepare(config, tmp_path / "data")
    letters = alphabet(CONFIG, prepared.tokenizer)
    loader = prepared.train_loader()
    recalls = texts = 0
    for _ in range(10):
        batch = loader.next_batch()
        for tokens, targets in zip(batch.tokens_BT.numpy(), batch.targets_BT.numpy(), strict=True):
            scored = np.flatnonzero(targets != IGNORE)
            is_recall = np.isin(tokens[scored], letters.keys).all() and np.isin(targets[scored], letters.values).all()
            recalls, texts = recalls + is_recall, texts + (not is_recall)
    loader.close()
    assert recalls + texts == 80 and min(recalls, texts) > 20
    assert len(prepared.shards) == 1 and prepared.validation


def test_recall_alone_needs_no_text_and_gets_the_tokenizer_of_bytes(tmp_path):
    config = DataConfig(sources=(SourceConfig(path="recall"),), vocab_size=259, sequence_length=64)
    for _ in range(2):  # made, then found
        prepared = prepare(config, tmp_path)
        assert (prepared.shards, prepared.validation, prepared.tokenizer.vocab_size) == ((), [], 259)
        assert prepared.facts["tokenizer"]["bytes_per_token"] == 1.0
