"""Memory, token by token: how far its gate opens, how well its rows are known, and what the text costs without it.

Colours go from none (gate 0) to full (gate 1) in eight steps; on a terminal as background colours, in HTML with gate and visits of
every token as a tooltip. Visits are the mean over the rows a token reads of how often training updated them; many tables in
checkpoints without training state carry none. Attached packs count like the memory a model was trained with.
"""

import codecs
import html
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from byrote.eval.bits import bits_per_byte
from byrote.eval.probes import memory_gates, memory_silenced

SHADES = (16, 17, 18, 19, 20, 26, 32, 38)  # of a 256-colour terminal, dark to bright
_CONTEXT, _STRIDE = 512, 256
STYLE = "body{font:16px/1.7 monospace;max-width:60em;margin:2em auto;white-space:pre-wrap}h2{font-size:1em}"


class Heard(NamedTuple):
    """One token."""

    text: str
    gate: float  # mean over memory layers and streams, 0 to 1
    visits: float  # mean over the rows it reads


class Knockout(NamedTuple):
    """One text as a task: bits per byte with memory, and with all rows zero."""

    name: str
    num_bytes: int
    with_memory: float
    without: float


def heard(model: Any, text: Any, content: str, visits_N: torch.Tensor | None = None) -> list[Heard]:
    """Every token of `content`; long texts in pieces of the model's context. `visits_N`: where the model's own table carries none."""
    found = []
    characters = codecs.getincrementaldecoder("utf-8")("replace")  # a character of several tokens is shown with its last one
    ids = text.encode(content)
    for start in range(0, len(ids), _CONTEXT):
        piece = [text.begin_id, *ids[start : start + _CONTEXT]]
        gates_T = memory_gates(model, piece)[1:].flatten(1).mean(1)
        visits_T = _visits(model, piece, visits_N)[1:]
        found += [
            Heard(characters.decode(text.token_bytes(token)), float(gate), float(visits))
            for token, gate, visits in zip(piece[1:], gates_T, visits_T, strict=True)
        ]
    return found


def _visits(model: Any, piece: list[int], visits_N: torch.Tensor | None) -> torch.Tensor:
    """float32 [T]: of the rows that each token reads, in the model's own memory and in its packs."""
    found = []
    for memory in (owner.memory for owner in (model, *model.packs.values()) if owner.memory is not None):
        rows_TN = memory.global_rows(torch.tensor([piece]))[0].flatten(1)
        rows_U, inverse_TN = torch.unique(rows_TN, return_inverse=True)
        known = visits_N is not None and memory is model.memory
        visits_U = visits_N[rows_U] if known and visits_N is not None else memory.store.gather(rows_U).visits_U
        found.append(visits_U[inverse_TN].float().cpu())
    return torch.cat(found, dim=1).mean(1)


def knock_out(model: Any, text: Any, texts: Sequence[tuple[str, str]]) -> list[Knockout]:
    """Each text with memory and without."""
    scored = bits_per_byte(model, text, texts, context=_CONTEXT, stride=_STRIDE).per_text
    with memory_silenced(model):
        silent = bits_per_byte(model, text, texts, context=_CONTEXT, stride=_STRIDE).per_text
    return [Knockout(a.name, a.num_bytes, a.bits / a.num_bytes, b.bits / b.num_bytes) for a, b in zip(scored, silent, strict=True)]


def shade(gate: float) -> int:
    return min(int(gate * len(SHADES)), len(SHADES) - 1)


def as_terminal(tokens: Sequence[Heard]) -> str:
    """Text with the gate as background colour."""
    return "".join(f"\x1b[38;5;231;48;5;{SHADES[shade(one.gate)]}m{_coloured_lines(one)}\x1b[0m" for one in tokens)


def _coloured_lines(one: Heard) -> str:
    """A colour must not run to the end of a line."""
    return one.text.replace("\n", f"\x1b[0m\n\x1b[38;5;231;48;5;{SHADES[shade(one.gate)]}m")


def as_html(pages: Sequence[tuple[str, Sequence[Heard]]], tasks: Sequence[Knockout]) -> str:
    """One page; `pages`: name and tokens of each text, `tasks`: what it costs."""
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>Where memory speaks</title><style>{STYLE}</style>"]
    parts.append("<p>Colour: how far memory's gate opens, from none (0) to full (1). Point at a token for its gate and visits.</p>")
    for (name, tokens), task in zip(pages, tasks, strict=True):
        cost = f"{task.with_memory:.4f} bits per byte, {task.without:.4f} with memory zeroed"
        parts.append(f"<h2>{html.escape(name)}: {cost}</h2>")
        parts += [
            f'<span title="gate {one.gate:.2f}, visits {one.visits:.1f}" style="background:rgba(30,110,220,{one.gate:.2f})">'
            f"{html.escape(one.text)}</span>"
            for one in tokens
        ]
    return "".join(parts) + "\n"
