"""The card of a pack: what its manifest says, for people, and what the pack gives away about the text it was made from."""

import json
from collections.abc import Sequence

from byrote.memory.heavy import TopNgram
from byrote.memory.pack import Manifest

_MARK = "<!-- from here on: the maker of the pack -->"
_NOT_MEASURED = "## Measured\n\nNothing: whoever made this pack recorded no evaluation with it."
_WITHOUT_TOP = "This pack holds no list of n-grams (it was made with --no-text, or without counting)."


def card_text(manifest: Manifest, top: Sequence[TopNgram], more: str = "") -> str:
    """Markdown; `more` are sections of whoever made the pack, such as measurements."""
    return "\n".join([*_front(manifest), "", *_reveals(manifest, top), "", _MARK, more.strip() or _NOT_MEASURED, ""])


def added_sections(card: str) -> str:
    """What `more` was, from the text of a card."""
    more = card.partition(_MARK)[2].strip()
    return "" if more == _NOT_MEASURED else more


def _front(manifest: Manifest) -> list[str]:
    table, hash_ = manifest.table, manifest.hash
    rows = {
        "provenance": manifest.provenance or "not stated",
        "licence": manifest.licence,
        "speaks before blocks": ", ".join(map(str, manifest.layers)),
        "table": f"{table.rows:,} rows of {table.dim} numbers, {table.dtype}, {table.rows * table.format.bytes:,} bytes",
        "n-grams": f"orders 2 to {hash_.max_order}, {hash_.num_heads} heads each, {hash_.canonical_vocab:,} classes of tokens",
        "tokenizer": manifest.tokenizer,
        "base model": manifest.base,
        "written by": f"byrote {manifest.byrote}",
    }
    lines = [f"| {name} | {_one_line(value)} |" for name, value in rows.items()]
    return [f"# Memory pack: {_one_line(manifest.name)}", "", "| | |", "|---|---|", *lines]


def _reveals(manifest: Manifest, top: Sequence[TopNgram]) -> list[str]:
    """What can be learnt from the pack by somebody who never saw the corpus."""
    counts = "Each row carries how often it was visited" if manifest.table.counted else "Visits were left out"
    lines = [
        "## What this pack reveals",
        "",
        "A pack is made of its corpus; treat it as you would treat the text. It holds no text as such, but:",
        "",
        f"- {counts}. Whoever has the tokenizer can hash an n-gram of {manifest.hash.max_order} tokens or fewer and see whether its rows",
        "  were trained, and so test whether a phrase was in the corpus; hash collisions make single answers uncertain, not many.",
        "- Attached to its base model it makes text of its corpus likelier, which can bring passages out verbatim.",
    ]
    if not top:
        return [*lines, f"- {_WITHOUT_TOP}"]
    listed = [f"| {json.dumps(_one_line(entry.text), ensure_ascii=False)} | {entry.order} | {entry.times:,} |" for entry in top[:20]]
    said = f"- `top.json` lists the {len(top)} most visited n-grams as text; the first of them:"
    return [*lines, said, "", "| n-gram | order | visits |", "|---|---|---|", *listed]


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
