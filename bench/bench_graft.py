"""What writing facts into a run's memory brings, and what it damages; and a graft beside its controls.

    python -m bench.bench_graft facts RUN TABLE [--columns capital] [--facts 100]
    python -m bench.bench_graft host FOLDER [--text python-stdlib] [--steps 600]
    python -m bench.bench_graft graft MODEL TEXT [--outside TEXT] [--seeds 0,1,2]

`facts` writes every fact of a table (.csv or .jsonl; of countries: their capitals) one after the other into one table, without touching
the run on the disk, and reports: the share written within the bound; the share recalled right after its writing, and at the end with
all others in place; by two paraphrases; facts never written, as neighbours; and bits per byte of the run's held-out text before and after.
`host` trains a GPT-2-shaped model, tokenizer too, for `graft` to stand on; text that `graft` holds back is not read.
`graft` is `byrote graft … --controls` with its rows recorded. Nothing is timed: neither figure depends on the machine.
"""

import argparse
import itertools
import json
import random
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from bench.measure import report
from byrote.checkpoint.huggingface import require_transformers
from byrote.cli.memory_edit import held_texts
from byrote.data.config import SourceConfig
from byrote.data.sources import read_documents
from byrote.data.split import split_documents, training_documents
from byrote.device import pick_device
from byrote.graft.controls import CONTROLS
from byrote.graft.edit import EditConfig, Entry, HeldOut, write_fact
from byrote.graft.facts import Recall, read_facts, recall
from byrote.graft.host import load_host
from byrote.graft.journal import EditableRun
from byrote.graft.prepare import GraftConfig
from byrote.graft.session import run_graft
from byrote.tokenizer.bpe import train_bpe

HOST_TEXT = 4 << 20  # characters that the host learns from, drawn by document


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """One row: recall and damage."""
    run = EditableRun(args.run)
    known = read_facts(args.table, columns=tuple(args.columns.split(",")))
    writing, neighbours = known[: args.facts], known[args.facts : 2 * args.facts]
    held = HeldOut(run.model, run.tokenizer, held_texts(args.run, None))
    config = EditConfig(max_bits=args.max_bits)
    bits, before = held.bits(), [recall(run.model, run.tokenizer, some) for some in (writing, neighbours)]
    nats, at_once, entries = [], [], list[Entry]()
    for number, fact in enumerate(writing):
        attempt = write_fact(run.model, run.tokenizer, fact, held, config, entries)
        nats.append((attempt.nats_before, attempt.nats_after, attempt.reads))
        if attempt.entry is not None:
            entries.append(attempt.entry)
            at_once.append(recall(run.model, run.tokenizer, [fact]).as_written)
        print(f"{number + 1}/{len(writing)} {'written' if attempt.entry else 'NOT written'}: {fact.prompt}{fact.answer}", flush=True)
    after = [recall(run.model, run.tokenizer, some) for some in (writing, neighbours)]
    return {
        "what": "facts",
        "run": Path(args.run).name,
        "facts": len(writing),
        "max_bits_per_byte": config.max_bits,
        "written": len(entries) / len(writing),
        "written_without_touching_rows_of_held_out_text": sum(reads == 0 for *_, reads in nats) / len(writing),
        "recalled_at_once": sum(at_once) / len(writing),
        "recalled_with_all_in_place": _shares(after[0]),
        "recalled_before": _shares(before[0]),
        "neighbours_recalled": {"facts": len(neighbours), "before": before[1].as_written, "after": after[1].as_written},
        "held_bytes": held.num_bytes,
        "held_bits_per_byte": {"before": bits / held.num_bytes, "after": held.bits() / held.num_bytes},
    }


def _shares(found: Recall) -> dict[str, Any]:
    return {"as_written": found.as_written, "paraphrases": list(found.paraphrased)}


def host(args: argparse.Namespace) -> None:
    """A folder that transformers loads."""
    transformers = require_transformers()
    source, draw = SourceConfig(path=args.text), random.Random(0)
    texts = [one.text for one in training_documents(read_documents(source), 0, split_documents([read_documents(source)], 128 * 1024))]
    draw.shuffle(texts)
    texts = texts[: next((n for n, size in enumerate(itertools.accumulate(map(len, texts))) if size > HOST_TEXT), len(texts))]
    tokenizer = train_bpe(texts, 2048)
    ends = {"bos_token_id": tokenizer.begin_id, "eos_token_id": tokenizer.end_id}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=2048, n_embd=96, n_layer=4, n_head=4, n_positions=256, **ends))
    line = torch.tensor([token for ids in tokenizer.encode_batch(texts) for token in (tokenizer.begin_id, *ids, tokenizer.end_id)])
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, args.steps)
    for step in range(args.steps):
        ids_BT = torch.stack([line[start : start + 256] for start in torch.randint(len(line) - 256, (8,))])
        loss = model(ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        if step % 50 == 49:
            print(f"step {step + 1}/{args.steps}  loss {loss.item():.3f}", flush=True)
    model.save_pretrained(args.folder)
    tokenizer.save(Path(args.folder))


def graft(args: argparse.Namespace) -> dict[str, Any]:
    """One row: host, graft and controls."""
    seeds = tuple(int(seed) for seed in args.seeds.split(","))
    model, text = load_host(args.model, device=pick_device("auto"))
    config = GraftConfig(text=(args.text,), outside=args.outside, seeds=seeds, controls=CONTROLS, epochs=args.epochs)
    with tempfile.TemporaryDirectory() as folder:
        found = run_graft(config, args.model, model, text, Path(folder) / "pack", progress=_note, stop=threading.Event())
    results = [result._asdict() | {"measured": result.measured._asdict()} for result in found.results]
    names = {"host": Path(args.model).name, "text": Path(args.text).name, "outside": Path(args.outside).name}
    return {
        "what": "graft",
        **names,
        "before": found.before._asdict(),
        "results": results,
        "steps": found.steps,
        "held_bytes": found.held_bytes,
    }


def _note(line: str) -> None:
    if "step" not in line or "00/" in line:
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers()
    one = kinds.add_parser("facts")
    one.add_argument("run")
    one.add_argument("table")
    one.add_argument("--columns", default="capital")
    one.add_argument("--facts", type=int, default=100)
    one.add_argument("--max-bits", type=float, default=1e-3)
    one.set_defaults(work=facts)
    base = kinds.add_parser("host")
    base.add_argument("folder")
    base.add_argument("--text", default="python-stdlib")
    base.add_argument("--steps", type=int, default=600)
    base.set_defaults(work=host)
    two = kinds.add_parser("graft")
    two.add_argument("model")
    two.add_argument("text")
    two.add_argument("--outside", default="python-stdlib")
    two.add_argument("--seeds", default="0,1,2")
    two.add_argument("--epochs", type=float)
    two.set_defaults(work=graft)
    args = parser.parse_args()
    if not hasattr(args, "work"):
        print("bench_graft needs a run and a table of facts, or a model and text; see --help. Nothing was measured")
        return
    row = args.work(args)
    if row is None:
        return
    print(json.dumps(row, indent=1))
    report("graft", row)


if __name__ == "__main__":
    main()
