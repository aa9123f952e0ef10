"""How good do indexers become? The needle recipe with DSA, trained in stages and sparse from its first step; recall per block.

    python -m bench.index_recall [--steps 900] [--warmup 0.6,0.7] [--only staged,sparse] [--out runs/index-recall]

Measured on held-out documents of 256 tokens: `recall`, the attention that the chosen 64 keys get over what the best 64 would get
(`eval.probes.index_recall`), and `accuracy`, the share of questions answered right under dense and under sparse attention. For
the staged run at the end of the dense stage (indexers as they were drawn), of the warm-up, and of the run.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import report
from byrote.data.config import RecallConfig
from byrote.data.packing import IGNORE
from byrote.data.synthetic import alphabet, validation_documents
from byrote.eval.probes import index_recall
from byrote.model.transformer import Model
from byrote.recipes.needle import needle_dsa
from byrote.train.session import Run, train
from byrote.train.stages import indexed

LENGTH, DOCUMENTS = 256, 100


def held_out(run: Run, config: RecallConfig) -> tuple[Tensor, Tensor]:
    """Tokens and targets [N, L] that no training sees."""
    documents = validation_documents(config, alphabet(config, run.tokenizer), LENGTH, DOCUMENTS, seed=1)
    return torch.from_numpy(documents.tokens_NL), torch.from_numpy(documents.targets_NL)


@torch.no_grad()
def accuracy(model: Model, tokens_NL: Tensor, targets_NL: Tensor, stage: str) -> float:
    """Share of scored tokens that come first, while every block attends as `stage` says."""
    before = [(attention, attention.stage) for attention in indexed(model)]
    for attention, _ in before:
        attention.stage = stage
    scored_NL = targets_NL != IGNORE
    right = (model.eval()(tokens_NL).logits.argmax(-1) == targets_NL)[scored_NL]
    for attention, old in before:
        attention.stage = old
    return right.float().mean().item()


def look(run: Run, config: RecallConfig) -> dict[str, Any]:
    tokens_NL, targets_NL = held_out(run, config)
    recall = index_recall(run.model, tokens_NL.tolist())
    answers = {stage: accuracy(run.model, tokens_NL, targets_NL, stage) for stage in ("dense", "sparse")}
    losses = {name: loss.item() for name, loss in run.last.losses.items()}
    return {"step": run.done, "recall": recall, "accuracy": answers, "losses": losses}


def train_one(name: str, steps: int, warmup: tuple[float, float] | None, out: Path) -> dict[str, Any]:
    recipe = needle_dsa()
    config = replace(recipe, train=replace(recipe.train, steps=steps, index_warmup=warmup))
    source = config.data.sources[0].recall
    assert source is not None, "the needle recipe's source is synthetic"
    looks: list[dict[str, Any]] = []
    moments = {steps, *(round(share * steps) for share in warmup or ())}

    def hook(done: int, run: Run) -> None:
        if done in moments:
            looks.append(look(run, source))
            print(name, looks[-1], flush=True)

    _, summary = train(config, out / name, hooks=[hook])
    return {"looks": looks, "seconds": summary.seconds, "steps": steps, "index_warmup": warmup}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=needle_dsa().train.steps)
    parser.add_argument("--warmup", default="0.6,0.7", help="where the warm-up of the staged run begins and ends")
    parser.add_argument("--only", default="staged,sparse")
    parser.add_argument("--out", type=Path, default=Path("runs/index-recall"))
    args = parser.parse_args()
    begin, end = map(float, args.warmup.split(","))
    schedules = {"staged": (begin, end), "sparse": None}
    runs = {name: train_one(name, args.steps, schedules[name], args.out) for name in args.only.split(",")}
    report("index_recall", {"runs": runs, "sizes": {"documents": DOCUMENTS, "length": LENGTH, "seeds": 1}})


if __name__ == "__main__":
    main()
