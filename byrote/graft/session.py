"""A graft from text to pack: before, training, controls, after, card. Stopped at any moment, the same call goes on.

    WORK/                      beside the pack until that is written, and deleted then
      config.json              what is being made; another configuration is refused
      data/                    the text as token shards
      graft-0/ one-row-0/ …    one training each (kind and seed): its newest state
      results.json             what was measured so far

A finished training is not done again; a half one goes on bitwise from its newest state.
"""

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from byrote.checkpoint.atomic import make_folder, replace_file
from byrote.checkpoint.packs import open_pack, save_pack
from byrote.config import to_dict
from byrote.errors import ByroteError, CheckpointError, ConfigError
from byrote.eval.bits import bits_per_byte
from byrote.graft.attach import attach, detach
from byrote.graft.card import card
from byrote.graft.controls import CONTROLS, FIXED_TABLE, LORA, PACK_CONTROLS, lora, require_peft
from byrote.graft.facts import recall
from byrote.graft.grafted import Grafted
from byrote.graft.host import HostText, find_host
from byrote.graft.prepare import (
    GraftConfig,
    Prepared,
    Progress,
    check_fits_machine,
    engram_config,
    make_pack,
    prepare_data,
    training_steps,
    window,
)
from byrote.graft.training import Training
from byrote.memory.heavy import TopNgram
from byrote.model.config import EngramConfig

GRAFT = "graft"
_TOP = 200  # most visited n-grams a pack lists


class Measured(NamedTuple):
    """What a model came to on text it was not trained on, and on the facts."""

    inside: float | None  # bits per byte in the domain; None where only facts were learnt
    outside: float
    recalled: tuple[float, ...] = ()  # shares of the facts: as written, then by each paraphrase

    @classmethod
    def read(cls, values: list[Any]) -> "Measured":
        return cls(values[0], values[1], tuple(values[2]))


class Result(NamedTuple):
    """One training: `kind` is "graft" or a control."""

    kind: str
    seed: int
    measured: Measured
    weights: int  # numbers that training could change
    touched: int  # numbers of table rows that it did change
    seconds: float


class Report(NamedTuple):
    before: Measured
    results: tuple[Result, ...]
    steps: int
    epochs: float
    tokens: int  # of the text
    held_bytes: tuple[int, int]  # inside, outside
    pack: Path | None  # None: stopped before the end


class Session:
    """All trainings of one graft."""

    def __init__(self, config: GraftConfig, model: Any, text: HostText, work: Path, progress: Progress) -> None:
        self.config, self.model, self.text, self.work, self.progress = config, model.eval().requires_grad_(False), text, work, progress
        self.context = window(config, model)
        self.data: Prepared = prepare_data(config, text, work / "data", progress)
        self.engram: EngramConfig = engram_config(config, find_host(model), text, self.data.tokens)
        check_fits_machine(self.engram, model, work)
        if config.like is not None:
            open_pack(config.like)  # a wrong name is told before anything is measured
        self._path = work / "results.json"
        self._known: dict[str, Any] = json.loads(self._path.read_bytes()) if self._path.exists() else {}

    def before(self) -> Measured:
        if "before" not in self._known:
            self._note("before", self._measure(Grafted(self.model, None), "the host alone"))
        return Measured.read(self._known["before"])

    def result(self, kind: str, seed: int, stop: threading.Event) -> Result | None:
        """Train and measure; None if stopped first."""
        name = f"{kind}-{seed}"
        if name not in self._known:
            with self._training(kind, seed) as training:
                training.run(lambda line: self.progress(f"{name}: {line}"), stop)
                if not training.is_done:
                    return None
                found = (self._measure(training.model, name), *_weights(training), training.seconds)
                self._note(name, found)
        measured, *numbers = self._known[name]
        return Result(kind, seed, Measured.read(measured), *numbers)

    def write_pack(self, out: Path, card_text: str, with_text: bool) -> Path:
        """The pack of the first seed."""
        with self._training(GRAFT, self.config.seeds[0]) as training:
            graft, top = training.model.graft, list[TopNgram]()
            assert graft is not None and training.is_done, "the graft is trained first"
            training.loader.close()
            if with_text and training.ngrams is not None:
                top = training.ngrams.named(_TOP, graft.pack.memory.canonical_V, self.text.decode)
            return save_pack(graft.pack, out, card=card_text, top=top)

    @contextmanager
    def _training(self, kind: str, seed: int) -> Iterator[Training]:
        """Inside, the host carries what is trained; afterwards nothing."""
        folder = self.work / f"{kind}-{seed}"
        if kind == LORA:
            with lora(self.model, self._like_lora(), seed) as (adapters, _):
                yield Training(self.config, self.data, Grafted(self.model, None, adapters), self.text, folder, seed=seed)
            return
        pack = make_pack(self.config, self.engram, self.model, self.text, seed)
        if kind != GRAFT:
            PACK_CONTROLS[kind](pack, seed)
        graft = attach(self.model, pack)
        try:
            rows = kind not in FIXED_TABLE
            yield Training(self.config, self.data, Grafted(self.model, graft), self.text, folder, seed=seed, learns_rows=rows)
        finally:
            detach(self.model, graft)

    def _like_lora(self) -> int:
        """Numbers that the graft changed: LoRA is given about as many."""
        _, weights, touched, _ = self._known[f"{GRAFT}-{self.config.seeds[0]}"]
        return weights + touched

    def _measure(self, model: Grafted, name: str) -> Measured:
        model.eval()
        device = self.model.get_input_embeddings().weight.device
        bits = {}
        for part in ("inside", "outside"):
            texts = [tuple(document) for document in getattr(self.data, part)]
            self.progress(f"{name}: reading text held back, {part} the domain")
            bits[part] = (
                bits_per_byte(
                    model, self.text, texts, context=self.context, stride=self.context // 2, batch_windows=4, device=device,
                    precision=self.config.precision,
                ).bits_per_byte
                if texts
                else None
            )  # fmt: skip
        shares = recall(model, self.text, self.data.facts) if self.data.facts else None
        assert bits["outside"] is not None, "there is always text from outside"
        return Measured(bits["inside"], bits["outside"], () if shares is None else (shares.as_written, *shares.paraphrased))

    def _note(self, name: str, value: Any) -> None:
        self._known[name] = value
        replace_file(self._path, json.dumps(self._known, indent=1).encode())
        self._known = json.loads(self._path.read_bytes())


def _weights(training: Training) -> tuple[int, int]:
    """(numbers outside the table that could change, numbers of rows that did)."""
    weights = sum(parameter.numel() for parameter in training.model.parameters() if parameter.requires_grad)
    store: Any = None if training.model.memory is None else training.model.memory.store
    return weights, 0 if store is None else int((store.visits_N > 0).sum()) * store.dim


def run_graft(
    config: GraftConfig,
    name: str,
    model: Any,
    text: HostText,
    out: Path,
    *,
    progress: Progress,
    stop: threading.Event,
    with_text: bool = True,
) -> Report:
    """Train `config` on the host called `name` and write the pack to `out`; or go on where that was stopped.

    Raises ConfigError if `out` or what was begun beside it is something else.
    """
    if LORA in config.controls:
        require_peft()
    work = work_folder(out)
    is_new = not work.exists()
    _claim(work, out, {"model": name, "text": with_text} | to_dict(config))
    try:
        session = Session(config, model, text, work, progress)
    except ByroteError:  # nothing was begun: the corrected command is another one, and must not meet this one's claim
        if is_new:
            shutil.rmtree(work)
        raise
    before, results = session.before(), list[Result]()
    for kind in (GRAFT, *(control for control in CONTROLS if control in config.controls)):
        for seed in config.seeds:
            result = session.result(kind, seed, stop)
            if result is None:
                return _report(session, before, results, None)
            results.append(result)
    report = _report(session, before, results, out)
    progress("writing the pack")
    session.write_pack(out, card(config, name, report), with_text)
    shutil.rmtree(work)
    return report


def _report(session: Session, before: Measured, results: list[Result], pack: Path | None) -> Report:
    data = session.data
    held = tuple(sum(len(document.text.encode()) for document in part) for part in (data.inside, data.outside))
    steps, epochs = training_steps(session.config, data.tokens)
    return Report(before, tuple(results), steps, epochs, data.tokens, (held[0], held[1]), pack)


def work_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.work")


def _claim(work: Path, out: Path, config: dict[str, Any]) -> None:
    """Begin in `work`, or go on there if it was begun for the same."""
    if out.exists():
        raise ConfigError(f"{out} exists; a pack is never overwritten by a new one. Choose another --out, or move it away")
    path = work / "config.json"
    wanted = json.dumps(config, indent=1, sort_keys=True)
    if not path.exists():
        make_folder(work)
        replace_file(path, wanted.encode())
        return
    try:
        was = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete {work} to begin again") from error
    now = json.loads(wanted)
    changed = [f"{key} was {was.get(key)!r}, now {now.get(key)!r}" for key in {**was, **now} if was.get(key) != now.get(key)]
    if changed:
        raise ConfigError(
            f"{work} holds a graft that was begun otherwise: {changed[0]}. Go on with its options, or delete it to begin again"
        )
