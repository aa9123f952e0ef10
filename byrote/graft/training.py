"""One training of a graft, or of a control: `train.loop.Trainer` on `Grafted`, stopped and resumed bitwise.

The host is frozen; table, projections, gate and convolution learn (for the control `lora`, adapters). The state is one folder, replaced
whole: weights, optimizer, table with its optimizer state and visits, sketch of n-grams, place in the data.
"""

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from torch import Tensor

from byrote.checkpoint.atomic import replacing_folder, standing, write_new
from byrote.checkpoint.manifest import MANIFEST, check_files, read_manifest, write_manifest
from byrote.checkpoint.tensors import expect, read_tensors, tensor_file
from byrote.data.loader import Loader, ShardRows
from byrote.graft.grafted import Grafted
from byrote.graft.host import HostText
from byrote.graft.prepare import TABLE_RULE, GraftConfig, Prepared, Progress, training_steps
from byrote.memory.heavy import HeavyHitters
from byrote.optim.groups import OptimizerState
from byrote.train.loop import Trainer
from byrote.train.run import OptimConfig, TrainConfig

_TENSORS = ("weights.safetensors", "optimizer.safetensors", "table.safetensors", "ngrams.safetensors")
_STATE = "trainer.json"


class Training:
    """Goes on from what lies in `folder`, if anything. `learns_rows` False leaves the table as it is."""

    def __init__(
        self, config: GraftConfig, data: Prepared, model: Grafted, text: HostText, folder: Path, *, seed: int, learns_rows: bool = True
    ) -> None:
        self.config, self.model, self.folder = config, model, folder
        self.steps, _ = training_steps(config, data.tokens)
        self.done, self.seconds = 0, 0.0
        self.loader = Loader(
            [ShardRows(shard, config.sequence_length, (seed, source)) for source, shard in enumerate(data.shards)],
            [shard.num_tokens for shard in data.shards],
            sequence_length=config.sequence_length,
            batch_sequences=config.batch_sequences,
            pad_token=text.pad_id,
            seed=seed,
        )
        self.trainer = Trainer(cast(Any, model), cast(Any, _settings(config, seed)), self.steps)
        if not learns_rows:
            self.trainer.rows = None
        memory = model.memory
        self.ngrams = None if memory is None else HeavyHitters(memory.hash.canonical_vocab, memory.hash.max_order)
        if (standing(folder) / MANIFEST).is_file():
            self._restore(standing(folder))

    @property
    def is_done(self) -> bool:
        return self.done == self.steps

    def run(self, progress: Progress, stop: threading.Event) -> None:
        """Train to the end, or to the step during which `stop` was set; the state is kept."""
        kept, before = time.monotonic(), self.done
        try:
            while not self.is_done and not stop.is_set():
                began = time.monotonic()
                loss = self._step()
                self.seconds += time.monotonic() - began
                left_s = (self.steps - self.done) * self.seconds / self.done
                progress(f"step {self.done}/{self.steps}  loss {loss:.3f}  {left_s:.0f} s left")
                if time.monotonic() - kept > self.config.save_every_s:
                    self.save()
                    kept = time.monotonic()
        finally:
            self.loader.close()
        if self.done > before:
            self.save()

    def _step(self) -> float:
        batch = self.loader.next_batch()
        result = self.trainer.step(self.done, [batch])
        self.done += 1
        if self.ngrams is not None and self.model.memory is not None:
            memory = self.model.memory
            self.ngrams.update(memory.canonical(batch.tokens_BT.to(memory.store.device)), batch.document_BT)
        return result.losses["next_token"].item()

    # --- state --------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """The state, whole or not at all."""
        optimizer = self.trainer.optimizers.state_dict()
        groups = (self.model.state_dict(), optimizer.tensors, self._table(), {} if self.ngrams is None else self.ngrams.state_dict())
        about = {"step": self.done, "seconds": self.seconds, "loader": self.loader.state_dict(), "optimizer": optimizer.meta}
        with replacing_folder(self.folder) as folder:
            for name, tensors in zip(_TENSORS, groups, strict=True):
                write_new(folder / name, tensor_file(tensors))
            write_new(folder / _STATE, [json.dumps(about).encode()])
            write_manifest(folder, step=self.done, table_generations=())

    def _restore(self, folder: Path) -> None:
        check_files(folder, read_manifest(folder))
        weights, optimizer, table, ngrams = (read_tensors(folder / name) for name in _TENSORS)
        expect(weights, dict(self.model.state_dict()), str(folder / _TENSORS[0]))
        expect(table, self._table(), str(folder / _TENSORS[2]))
        about = json.loads((folder / _STATE).read_bytes())
        self.model.load_state_dict(weights)
        self.trainer.optimizers.load_state_dict(OptimizerState(optimizer, about["optimizer"]))
        for name, part in self._table().items():
            part.copy_(table[name])
        if self.ngrams is not None:
            self.ngrams.load_state_dict(ngrams)
        self.loader.load_state_dict(about["loader"])
        self.done, self.seconds = about["step"], about["seconds"]

    def _table(self) -> dict[str, Tensor]:
        store: Any = None if self.model.memory is None else self.model.memory.store
        return {} if store is None else {name: getattr(store, name) for name in ("vectors_NE", "state_NS", "visits_N")}


def _settings(config: GraftConfig, seed: int) -> SimpleNamespace:
    """What the trainer reads of a run's configuration."""
    optim = OptimConfig(
        matrix="adamw",
        lr=config.lr,
        adam_lr=config.lr,
        table_lr_scale=config.row_lr / config.lr,
        table_rule=TABLE_RULE,
        weight_decay=0.0,
        schedule="cosine",
    )
    return SimpleNamespace(optim=optim, train=TrainConfig(precision=config.precision, seed=seed))
