"""What is held back for validation, and that nothing of it is trained on."""

import hashlib
import random

import pytest

from byrote.data.sources import Document
from byrote.data.split import Place, split_documents, training_documents
from byrote.errors import DataError


def corpus(count: int = 300, seed: int = 0) -> list[Document]:
    sizes = random.Random(seed)
    return [Document(f"folder/ä{i}.py", "é" * sizes.randrange(1, 400)) for i in range(count)]


def num_bytes(document: Document) -> int:
    return len(document.text.encode("utf-8"))


def by_hash(documents: list[Document]) -> list[Document]:
    return sorted(documents, key=lambda document: hashlib.sha256(document.name.encode("utf-8")).digest())


@pytest.mark.parametrize("limit", [500, 4_000, 7_777])
def test_documents_are_taken_in_hash_order_until_the_first_that_passes_the_limit(limit: int) -> None:
    documents = corpus()
    taken = list(split_documents([documents], limit).validation)
    expected = by_hash(documents)
    assert taken == expected[: len(taken)]
    assert sum(map(num_bytes, taken)) <= limit
    assert sum(map(num_bytes, expected[: len(taken) + 1])) > limit


def test_the_order_in_which_documents_are_read_does_not_matter() -> None:
    documents = corpus()
    assert split_documents([documents[::-1]], 4_000).validation == split_documents([documents], 4_000).validation


def test_training_and_validation_are_the_corpus_and_share_nothing() -> None:
    first, second = corpus(200), [Document(f"other{i}", "x" * 50) for i in range(99)]
    split = split_documents([first, second], 6_000)
    trained = [list(training_documents(source, number, split)) for number, source in enumerate((first, second))]
    assert split.validation
    assert not set(split.validation) & set(trained[0] + trained[1])
    assert set(split.validation) | set(trained[0] + trained[1]) == set(first + second)
    assert split.training_bytes == tuple(sum(map(num_bytes, source)) for source in trained)


def test_two_documents_of_one_name_are_two_documents() -> None:
    documents = [Document("same", "x" * (100 + i)) for i in range(30)]
    split = split_documents([documents], 250)
    assert split.held == {Place(0, 0), Place(0, 1)}
    assert list(training_documents(documents, 0, split)) == documents[2:]


def test_validation_is_never_more_than_a_tenth_of_a_small_corpus() -> None:
    documents = [Document(f"{i}", "x" * 10) for i in range(50)]
    split = split_documents([documents], 1 << 19)
    assert [document.name for document in split.validation] == [document.name for document in by_hash(documents)[:5]]


def test_a_first_document_above_the_limit_is_taken_alone() -> None:
    documents = [Document(f"{i}", "x" * 100) for i in range(5)]
    assert list(split_documents([documents], 1 << 19).validation) == by_hash(documents)[:1]


def test_of_one_big_file_the_end_is_held_back_from_a_line_start_on() -> None:
    text = "".join(f"line {i} é\n" for i in range(1000))
    big = Document("big.txt", text)
    split = split_documents([[big]], 1000)
    ((name, tail),) = split.validation
    ((_, head),) = training_documents([big], 0, split)
    assert name == "big.txt#end"
    assert head + tail == text
    assert head.endswith("\n")
    assert 900 < num_bytes(split.validation[0]) <= 1000
    assert split.training_bytes == (len(head.encode("utf-8")),)


def test_one_big_file_of_a_single_line_is_cut_between_characters() -> None:
    big = Document("big.txt", "é" * 5001)
    split = split_documents([[big]], 1001)
    assert split.validation[0].text == "é" * 500
    assert next(training_documents([big], 0, split)).text == "é" * 4501


def test_a_document_that_is_most_of_its_source_is_trained_on() -> None:
    small = [Document(f"{i}", "x" * 10) for i in range(9)]
    for number in range(20):
        documents = [*small, Document(f"big{number}", "y" * 500)]
        split = split_documents([documents], 1 << 19)
        assert {document.text[0] for document in split.validation} == {"x"}


def test_no_validation_bytes_mean_no_validation() -> None:
    documents = corpus()
    split = split_documents([documents], 0)
    assert split.validation == ()
    assert list(training_documents(documents, 0, split)) == documents


def test_a_source_with_nothing_left_to_train_on_is_named() -> None:
    many = [Document(f"{i}", "x" * 100) for i in range(200)]
    for number in range(100_000):  # a small source whose both documents come first in hash order
        few = [Document(f"few{number}", "y" * 10), Document(f"few{number}b", "z" * 10)]
        if set(by_hash(many + few)[:6]) >= set(few):
            break
    with pytest.raises(DataError, match=r"all of source 1 .* lower data\.validation_bytes"):
        split_documents([many, few], 1 << 19)
