"""Texts in and out of a `DecodeState`, and the pages that let one text use what another has read.

The running batch is one state, as the kernels want it: contiguous, texts of different lengths padded on the left (padding is document
−1, which the model leaves out everywhere). `assemble` builds such a state from texts of other states, and so is all there is to joining,
leaving, splitting a prompt's state among choices, and cutting padding that no text needs any more:

    texts      a (5 tokens), b (3)                 b leaves, c (7) joins
    state      a a a a a                           . . a a a a a
               . . b b b                           c c c c c c c

`Pages` keep prefixes: 128 tokens each (a multiple of every group that compressors close), found by a chain of hashes. A page holds its
tokens' part of all that grows with the text; what is only about the present (tails) is kept at the *borders* where reading happened to
pause, and a prefix can be taken up at a border. The chain starts at a root that names model, weights, pack and its generation, so what
another of these has read is never found. Pages are copies and nobody but the tree holds them: the least recently used leaf goes first.

Shapes: B texts, S tokens a state holds, P tokens of a page.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from byrote.errors import ConfigError
from byrote.model.state import DecodeState, Drawers, Entries, Tail, Track

PAGE = 128

NewState = Callable[[int], DecodeState]


class Text(NamedTuple):
    """The last `length` tokens of one row of a state: all of the text, without the padding in front of it."""

    state: DecodeState
    row: int
    length: int


def pages_of(tokens: int) -> int:
    return -(-tokens // PAGE)


def leaves(state: DecodeState) -> dict[Hashable, Any]:
    """Every buffer of a state by name: tracks, tails and entries. What numbers documents is apart."""
    found: dict[Hashable, Any] = {"place": state.places, "position": state.positions, "canonical": state.canonical}
    parts = [*(("block", *pair) for pair in enumerate(state.caches)), *(("draft", *pair) for pair in enumerate(state.drafts))]
    for *name, part in (*parts, *(("tail", *pair) for pair in state.tails.items())):
        found |= _leaves_of(tuple(name), part)
    return found


def _leaves_of(name: tuple[Hashable, ...], part: Any) -> dict[Hashable, Any]:
    if isinstance(part, Drawers):
        return {key: leaf for inner, one in part.parts.items() for key, leaf in _leaves_of((*name, inner), one).items()}
    if type(part) not in _FILL:
        raise ConfigError(f"the engine cannot move a cache of type {type(part).__name__} between batches; teach byrote/engine/cache.py to")
    return {name: part}


def assemble(new_state: NewState, texts: Sequence[Text]) -> DecodeState:
    """One state of these texts, padded on the left to the longest. `new_state(batch)` makes empty ones of the same model.

    What the new state remembers for a pack that a text began without stays empty: that text does not use it.
    """
    state, length = new_state(len(texts)), max(text.length for text in texts)
    given = [leaves(text.state) for text in texts]
    for name, leaf in leaves(state).items():
        _FILL[type(leaf)](leaf, [parts.get(name) for parts in given], texts, length)
    if any(text.length < length or text.state.documents is not None for text in texts):
        _number(state, texts, length)
    reach = min(text.state.length - text.state.floor for text in texts)
    state.restore(state.snapshot()._replace(floor=length - min(reach, length)))
    return state


def _fill_track(leaf: Track, parts: Sequence[Track | None], texts: Sequence[Text], length: int) -> None:
    """A track may lag behind the text (drafts do), by as much in every row."""
    lags = [0 if part is None else text.state.length - part.length for part, text in zip(parts, texts, strict=True)]
    end = max(length - max(lags), 0)
    leaf.append(leaf.values.new_zeros(()).expand(len(texts), end, *leaf.values.shape[2:]))
    for row, (part, text, lag) in enumerate(zip(parts, texts, lags, strict=True)):
        count = max(text.length - lag, 0)
        if part is not None:
            leaf.values[row, end - count : end] = part.values[text.row, part.length - count : part.length]


def _fill_tail(leaf: Tail, parts: Sequence[Tail | None], texts: Sequence[Text], length: int) -> None:
    empty = leaf.values[0]
    leaf.restore(torch.stack([empty if part is None else part.values[text.row] for part, text in zip(parts, texts, strict=True)]))


def _fill_entries(leaf: Entries, parts: Sequence[Entries], texts: Sequence[Text], length: int) -> None:
    held = [part.snapshot() for part in parts]
    counts_B = torch.stack([counts[text.row] for (counts, _), text in zip(held, texts, strict=True)])
    most = int(counts_B.max())
    leaf.values = leaf.values.new_zeros(len(texts), most, *leaf.values.shape[2:])
    for row, (part, text, count) in enumerate(zip(parts, texts, counts_B.tolist(), strict=True)):
        leaf.values[row, :count] = part.values[text.row, :count]
    leaf.restore((counts_B, torch.stack([closing[text.row] for (_, closing), text in zip(held, texts, strict=True)])))


_FILL: dict[type, Callable[..., None]] = {Track: _fill_track, Tail: _fill_tail, Entries: _fill_entries}


def _number(state: DecodeState, texts: Sequence[Text], length: int) -> None:
    """Say which tokens are padding: document −1."""
    starts_B1 = torch.tensor([[length - text.length] for text in texts], device=state.device)
    real_BS = torch.arange(length, device=state.device) >= starts_B1
    state.documents, state.runs = (Track(state.batch, (), torch.int64, state.device) for _ in range(2))
    state.documents.append(real_BS.long() - 1)
    state.runs.append(real_BS.long())


class Page:
    """128 tokens of one text. `pieces`: their part of every track and entries leaf; `border`: the tails behind the last, where kept."""

    __slots__ = ("border", "children", "key", "parent", "pieces", "reach", "tokens")

    def __init__(self, key: bytes, parent: bytes, tokens: tuple[int, ...], pieces: dict[Hashable, Tensor]) -> None:
        self.key, self.parent, self.tokens, self.pieces = key, parent, tokens, pieces
        self.border: dict[Hashable, Any] | None = None
        self.reach = 0  # how far the border can be rolled back
        self.children = 0


class Pages:
    """Prefixes that were read, the least recently used first. The owner keeps their number within bounds (`shrink`)."""

    def __init__(self) -> None:
        self._pages: OrderedDict[bytes, Page] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def clear(self) -> None:
        self._pages.clear()

    def shrink(self, most: int) -> None:
        """Forget until at most `most` pages are left."""
        while len(self._pages) > max(most, 0):
            key = next(key for key, page in self._pages.items() if not page.children)
            page = self._pages.pop(key)
            if page.parent in self._pages:
                self._pages[page.parent].children -= 1

    def match(self, root: bytes, tokens: Sequence[int]) -> list[Page]:
        """The pages that `tokens` begin with, as many as are known; they count as used now."""
        found: list[Page] = []
        for key, chunk in _chain(root, tokens):
            page = self._pages.get(key)
            if page is None or page.tokens != chunk:
                break
            found.append(page)
        for page in reversed(found):  # the first last: a parent outlives its children
            self._pages.move_to_end(page.key)
        return found

    def publish(self, root: bytes, tokens: Sequence[int], text: Text) -> int:
        """Keep what `text` has read of `tokens`; it ends at a border. Returns how many pages are new."""
        assert text.length % PAGE == 0 and text.length == len(tokens), f"{text.length} tokens read of {len(tokens)}: no border"
        page, parent, new = None, root, 0
        for number, (key, chunk) in enumerate(_chain(root, tokens)):
            page = self._pages.get(key)
            if page is None:
                page = self._pages[key] = Page(key, parent, chunk, _cut(text, number))
                new += 1
                if parent in self._pages:
                    self._pages[parent].children += 1
            parent = key
        if page is not None and page.border is None:
            page.border, page.reach = _border(text), text.state.length - text.state.floor
        self.match(root, tokens)
        return new

    def check(self) -> None:
        """Every page hangs on its parent or on a root, and knows how many hang on it."""
        children: dict[bytes, int] = {}
        for key, page in self._pages.items():
            assert key == page.key == _key(page.parent, page.tokens), "a page is kept under another text's key"
            children[page.parent] = children.get(page.parent, 0) + 1
        for key, page in self._pages.items():
            assert page.children == children.get(key, 0), f"a page counts {page.children} children and has {children.get(key, 0)}"


def usable(found: Sequence[Page], tokens: int) -> list[Page]:
    """Of matched pages those up to the last border that leaves at least one of `tokens` to read."""
    most = min(len(found), (tokens - 1) // PAGE)
    return list(found[: next((end for end in range(most, 0, -1) if found[end - 1].border is not None), 0)])


def take_up(new_state: NewState, pages: Sequence[Page]) -> DecodeState:
    """A state of one text that has read these pages, the last of which has a border."""
    state, border = new_state(1), pages[-1].border
    assert border is not None, "a prefix can only be taken up at a border"
    for name, leaf in leaves(state).items():
        pieces = [page.pieces[name] for page in pages if name in page.pieces]
        if isinstance(leaf, Track):
            leaf.append(torch.cat(pieces)[None] if pieces else leaf.values.new_zeros(()).expand(1, PAGE * len(pages)))
        elif isinstance(leaf, Entries):
            leaf.values = torch.cat(pieces)[None]
        if name in border:
            leaf.restore(border[name])
    state.restore(state.snapshot()._replace(floor=state.length - min(pages[-1].reach, state.length)))
    return state


def _cut(text: Text, number: int) -> dict[Hashable, Tensor]:
    """Copies of what page `number` of a text holds."""
    parts = leaves(text.state).items()
    return {name: _piece(leaf, text, number) for name, leaf in parts if not isinstance(leaf, Tail)}


def _piece(leaf: Track | Entries, text: Text, number: int) -> Tensor:
    if isinstance(leaf, Entries):
        each = int(leaf.snapshot()[0][text.row]) * PAGE // text.length  # borders close every group, so pages bring equally many
        return leaf.values[text.row, number * each : (number + 1) * each].clone()
    lag, padding = text.state.length - leaf.length, text.state.length - text.length
    start, end = (max(padding + place * PAGE - lag, padding) for place in (number, number + 1))
    return leaf.values[text.row, start:end].clone()


def _border(text: Text) -> dict[Hashable, Any]:
    """Copies of what is only about the present."""
    row = torch.tensor([text.row], device=text.state.device)
    border: dict[Hashable, Any] = {}
    for name, leaf in leaves(text.state).items():
        if not isinstance(leaf, Track):
            held = leaf.snapshot()
            border[name] = held.index_select(0, row) if isinstance(leaf, Tail) else tuple(part.index_select(0, row) for part in held)
    return border


def _chain(root: bytes, tokens: Sequence[int]) -> list[tuple[bytes, tuple[int, ...]]]:
    """(key, tokens) of every whole page."""
    chain, parent = [], root
    for start in range(0, len(tokens) - PAGE + 1, PAGE):
        chunk = tuple(tokens[start : start + PAGE])
        parent = _key(parent, chunk)
        chain.append((parent, chunk))
    return chain


def _key(parent: bytes, tokens: tuple[int, ...]) -> bytes:
    return hashlib.sha256(parent + np.asarray(tokens, dtype="<i8").tobytes()).digest()
