"""Each rule of the released normaliser, and the whole of it against the library that the released models use."""

import sys
import unicodedata

import pytest
import torch
from tokenizers import Regex, normalizers

from byrote.errors import ConfigError
from byrote.memory.canonical import canonical_ids, canonical_key, normalize


@pytest.fixture(scope="module")
def twin() -> normalizers.Normalizer:
    steps = [normalizers.NFKC(), normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    steps += [normalizers.Replace(Regex(r"[ \t\r\n]+"), " "), normalizers.Replace(Regex(r"^ $"), "\ue000")]
    return normalizers.Sequence([*steps, normalizers.Strip(), normalizers.Replace("\ue000", " ")])


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("ﬁ", "fi"),  # NFKC takes ligatures apart
        ("Ⅷ", "viii"),
        ("①", "1"),
        ("ＡＢ", "ab"),
        ("é", "e"),  # NFD, then marks off
        ("e\u0301", "e"),
        ("Ǟ", "a"),
        ("कि", "क"),  # spacing marks are marks too
        ("ð", "ð"),  # not an accented letter
        ("İ", "i"),
        ("ΟΔΟΣ", "οδοσ"),  # lower case character by character: no final ς
        ("ẞ", "ß"),
        (" The", "the"),
        ("a \t\r\n b", "a b"),
        (" ", " "),  # one space is itself
        ("\n\t  ", " "),
        ("\u2003", " "),  # NFKC makes an em space a space
        ("\ue000", " "),  # the sentinel, should a text hold it
        (" \ue000", " "),
        ("\v", ""),  # white space, but no run that is collapsed
        ("\v\v", ""),
        ("\x85a\u2028", "a"),
        ("\x1ca", "\x1ca"),  # Python's strip takes it, Unicode's White_Space does not
        ("\u200ba", "\u200ba"),
        ("\u0301", ""),
        ("", ""),
    ],
)
def test_the_normaliser_follows_each_rule(text: str, normal: str, twin: normalizers.Normalizer) -> None:
    assert normalize(text) == normal == twin.normalize_str(text)


def test_the_normaliser_is_the_released_one_on_every_letter_and_mark(twin: normalizers.Normalizer) -> None:
    """Characters old enough (Unicode 3.2) that no two libraries disagree about their properties; each in a context."""
    old = unicodedata.ucd_3_2_0
    for point in range(0, sys.maxunicode, 3):
        character = chr(point)
        if old.category(character) not in ("Cn", "Cs", "Co", "Lo"):
            text = f" {character}Ab{character}"
            assert normalize(text) == twin.normalize_str(text), hex(point)


def test_parts_of_characters_are_known_by_their_raw_string() -> None:
    assert canonical_key("\ufffd", "Ã") == "Ã"
    assert canonical_key("The\ufffd", "TheÃ") == "TheÃ"
    assert canonical_ids(["\ufffd", "\ufffd", "Ã"], ["â", "Ĥ", "ÃĤ"]).num_classes == 3


def test_a_text_that_normalises_to_nothing_stays_itself() -> None:
    assert canonical_key("\u0301", "ÌģĠ") == "\u0301"
    assert canonical_key("\v", "ċ") == "\v"
    assert canonical_ids(["\v", "\f", ""], ["ċ", "Č", "x"]).class_V.tolist() == [0, 1, 2]


def test_classes_are_numbered_in_order_of_first_appearance() -> None:
    texts = [" The", "the", "\n\t", " ", "é", "E", "THE", "<|end|>"]
    found = canonical_ids(texts, texts)
    assert found.class_V.tolist() == [0, 0, 1, 1, 2, 2, 0, 3]
    assert found.num_classes == 4
    assert found.class_V.dtype == torch.int64
    class_V, num_classes = found
    assert sorted(set(class_V.tolist())) == list(range(num_classes))


def test_a_raw_string_and_a_text_that_are_equal_share_a_class() -> None:
    assert canonical_ids(["a", "\ufffd"], ["Ġa", "a"]).class_V.tolist() == [0, 0]


def test_texts_and_strings_must_pair_up() -> None:
    with pytest.raises(ConfigError, match="got 2 and 1"):
        canonical_ids(["a", "b"], ["a"])
    assert canonical_ids([], []).num_classes == 0
