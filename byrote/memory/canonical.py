"""Tokens that look alike share their memory: token strings → canonical ids (Engram, arXiv 2601.07372 §2.2; released normaliser).

A subword vocabulary holds " The", "the", "THE" and "thé" as four unrelated ids. For n-gram look-up they are one class, which
makes the canonical vocabulary about 23 % smaller (128k ids of the paper) and the n-grams less sparse.

    key(token)  = raw string of the vocabulary     if its decoded text holds U+FFFD, that is: it is part of a character
                  text as it is                    if nothing is left of it after normalising
                  normalised text                  otherwise
    class       = number of the key, in the order in which keys first appear when ids are walked upward

    normalise:  NFKC → NFD → combining marks off → lower case → runs of space, tab, CR, LF to one space → white space off
                both ends, unless the text is exactly one space (U+E000 stands for it meanwhile)

Worked example: texts [" The", "the", "\\n\\t", " ", "é", "E"] have the keys ["the", "the", " ", " ", "e", "e"] and the classes
[0, 0, 1, 1, 2, 2].

Marks are removed by the Unicode category M, lower case is taken character by character (no special final sigma), and white space
is Unicode's White_Space, as in the library that the released models use; Python's own `lower` and `strip` differ in these.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from byrote.errors import ConfigError

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no whole character
SENTINEL = "\ue000"  # private use: a lone space, hidden from the strip
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
_RUNS = re.compile(r"[ \t\r\n]+")


class CanonicalVocab(NamedTuple):
    """The class of every token id, and how many classes there are."""

    class_V: Tensor  # int64
    num_classes: int


def normalize(text: str) -> str:
    """`text` without accents, case, and differences of white space. May be empty."""
    decomposed = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    bare = "".join(character for character in decomposed if not unicodedata.category(character).startswith("M"))
    lowered = "".join(character.lower() for character in bare)
    spaced = _RUNS.sub(" ", lowered)
    return (SENTINEL if spaced == " " else spaced).strip(WHITE_SPACE).replace(SENTINEL, " ")


def canonical_key(text: str, raw: str) -> str:
    """What tokens of one class have in common. `text`: the id decoded alone, special tokens kept; `raw`: its vocabulary string."""
    return raw if REPLACEMENT in text else normalize(text) or text


def canonical_ids(texts: Sequence[str], raw: Sequence[str]) -> CanonicalVocab:
    """The class of every token, from decoded texts and vocabulary strings in order of id."""
    if len(texts) != len(raw):
        raise ConfigError(f"canonical_ids needs one text and one raw string per token; got {len(texts)} and {len(raw)}")
    number_of: dict[str, int] = {}
    classes = [number_of.setdefault(canonical_key(text, string), len(number_of)) for text, string in zip(texts, raw, strict=True)]
    return CanonicalVocab(torch.tensor(classes, dtype=torch.int64), len(number_of))
