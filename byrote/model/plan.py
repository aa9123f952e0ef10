"""Everything known about a model before it exists, as plain values: what `byrote plan` prints and `--json` writes.

`model_plan` gathers `byrote.model.count` and the published figures of `byrote.model.presets`; `cost_plan` and
`published_runs` gather `byrote.model.ledger`. Keys carry their unit where it is not a count.
"""

from typing import Any

from byrote.memory.config import TableConfig
from byrote.memory.place import table_room
from byrote.model import count
from byrote.model.config import DSAConfig, MLAConfig, ModelConfig, V4AttentionConfig
from byrote.model.ledger import DEVICES, PUBLISHED_RUNS, Device, PublishedRun, Stage, implied_mfu, run_cost
from byrote.model.presets import PRESETS, PUBLISHED, PUBLISHED_TOKENS, Published, v3


def model_plan(
    name: str,
    config: ModelConfig,
    *,
    sequence: int,
    matrix_rule: str = "muon",
    table_rule: str = "rowwise",
    table: TableConfig | None = None,
) -> dict[str, Any]:
    """The plan of one model; `sequence` is the training length, the rules are those of OptimConfig (`matrix`, `table_rule`), `table`
    says where the rows are kept."""
    counted = count.count_parameters(config)
    figures = PUBLISHED.get(name, ()) if is_published(name, config) else ()
    return {
        "name": name,
        "shape": _shape(config),
        "parameters": _parameters(config, counted, sequence),
        "totals": _totals(counted) | {"buffers": count.count_buffers(config)},
        "published": [_comparison(figure, counted) for figure in figures],
        "flops_per_token": _flops(config, sequence),
        "bytes": _bytes(config, counted, matrix_rule, table_rule),
        "table": _table(config, table or TableConfig(), table_rule),
    }


def is_published(name: str, config: ModelConfig) -> bool:
    """Whether `config` is still the preset `name`, unchanged."""
    return name in PRESETS and config == PRESETS[name]()


def published_tokens(name: str, config: ModelConfig) -> float | None:
    """Training tokens of the published run of this very model, if there was one."""
    return PUBLISHED_TOKENS.get(name) if is_published(name, config) else None


_ATTENTION = {MLAConfig: "MLA", DSAConfig: "DSA", V4AttentionConfig: "V4 (CSA, HCA)"}


def _attention(config: ModelConfig) -> str:
    """The kinds of the blocks, in order of first use."""
    return ", ".join(dict.fromkeys(_ATTENTION[type(config.attention_of(layer))] for layer in range(config.num_layers)))


def _shape(config: ModelConfig) -> dict[str, Any]:
    moe, engram = config.moe, config.engram
    return {
        "blocks": config.num_layers,
        "dim": config.dim,
        "vocabulary": config.vocab_size,
        "attention": _attention(config),
        "residual": config.residual.kind if config.residual.kind == "plain" else f"{config.residual.kind} × {config.residual.streams}",
        "experts": "none" if moe is None else f"{moe.num_experts}, top {moe.top_k}, {moe.num_shared} shared",
        "memory": "none" if engram is None else f"blocks {', '.join(map(str, engram.layers))}",
        "mtp": 0 if config.mtp is None else config.mtp.depth,
    }


def _parameters(config: ModelConfig, counted: count.ParameterCount, sequence: int) -> dict[str, dict[str, float]]:
    """By part: numbers of the main model, active ones, those of MTP modules, and forward FLOPs per token of the main model."""
    flops = count.forward_flops(config, sequence)
    names = dict.fromkeys((*counted.main, *counted.mtp, *flops))
    parts = {
        name: {"total": counted.main[name], "active": counted.active[name], "mtp": counted.mtp[name], "forward_flops": flops.get(name, 0.0)}
        for name in names
    }
    return {name: row for name, row in parts.items() if any(row.values())}


def _totals(counted: count.ParameterCount) -> dict[str, Any]:
    return {
        "by_vocabulary_counted": {
            words: {"total": counted.total(vocabulary=times), "active": counted.active_total(vocabulary=times)}
            for times, words in count.VOCABULARY_WORDS.items()
        },
        "memory": counted.table,
        "memory_rows": list(counted.table_rows),
        "mtp": counted.mtp.total(),
        "with_mtp": counted.total(mtp="own"),
        "with_mtp_as_stored": counted.total(mtp="stored"),
        "trained": counted.trained,
    }


def _comparison(figure: Published, counted: count.ParameterCount) -> dict[str, Any]:
    ours = figure.ours(counted)
    return {
        "quantity": figure.quantity,
        "published": figure.figure,
        "ours": ours,
        "deviation": ours / figure.figure - 1,
        "rounds_to_it": abs(ours - figure.figure) <= figure.half_unit,
        "counted": figure.convention,
        "source": figure.source,
    }


def _flops(config: ModelConfig, sequence: int) -> dict[str, float]:
    return {
        "sequence": sequence,
        "forward": sum(count.forward_flops(config, sequence).values()),
        "mtp_forward": count.mtp_flops(config, sequence),
        "training": count.training_flops(config, sequence),
    }


def _bytes(config: ModelConfig, counted: count.ParameterCount, matrix_rule: str, table_rule: str) -> dict[str, Any]:
    return {
        "weights": count.weight_bytes(counted),
        "gradients_fp32": 4 * counted.trained,
        "optimizer": count.optimizer_bytes(counted, matrix_rule),
        "optimizer_rule": matrix_rule,
        "table": count.table_bytes(config),
        "table_dtype": None if config.engram is None else config.engram.table_dtype,
        "table_optimizer": count.table_optimizer_bytes(config, table_rule),
        "table_rule": table_rule,
        "table_read_per_token": count.table_read_bytes(config),
        "cache": count.cache_size(config)._asdict(),
    }


def _table(config: ModelConfig, table: TableConfig, rule: str) -> dict[str, Any] | None:
    """Where the rows are kept, and what that takes of device, RAM and disk once every row was trained."""
    engram = config.engram
    if engram is None:
        return None
    state_dim = 1 if rule == "rowwise" else 2 * engram.head_dim
    room = table_room(table, sum(count.table_rows(config)), engram.head_dim, dtype=engram.table_dtype, state_dim=state_dim)
    return {"store": table.store, "folder": table.folder} | {f"{place}_bytes": size for place, size in room._asdict().items()}


def cost_plan(
    config: ModelConfig, *, sequence: int, tokens: float, device: str, peak: float, mfu: float, price: float | None
) -> dict[str, Any]:
    """Cost of training on `tokens`; `peak` is the FLOP/s of one `device`, `price` in dollars an hour."""
    cost = run_cost(tokens * count.training_flops(config, sequence), peak=peak, mfu=mfu, price=price)
    assumed = {"tokens": tokens, "sequence": sequence, "device": device, "peak_flops": peak, "mfu": mfu, "price_per_hour": price}
    return assumed | cost._asdict()


def published_runs() -> dict[str, Any]:
    """V3 and R1: published hours and dollars, and the MFU that the hours imply where tokens were published too."""
    return {name: _published_run(run) for name, run in PUBLISHED_RUNS.items()}


def _published_run(run: PublishedRun) -> dict[str, Any]:
    device = DEVICES[run.device]
    return {
        "device": run.device,
        "price_per_hour": run.price,
        "stages": [_published_stage(stage, run.price, device) for stage in run.stages],
        "device_hours": run.device_hours,
        "dollars": run.dollars,
        "source": run.source,
    }


def _published_stage(stage: Stage, price: float, device: Device) -> dict[str, Any]:
    row: dict[str, Any] = {"stage": stage.name, "device_hours": stage.device_hours, "dollars": stage.device_hours * price}
    if stage.tokens:
        flops = sum(tokens * count.training_flops(v3(), sequence) for tokens, sequence in stage.tokens)
        tokens = sum(tokens for tokens, _ in stage.tokens)
        row |= {"tokens": tokens, "flops": flops, "hours_per_trillion_tokens": stage.device_hours / tokens * 1e12}
        row["implied_mfu_bf16"] = implied_mfu(flops, stage.device_hours, device.bf16)
        row["implied_mfu_fp8"] = implied_mfu(flops, stage.device_hours, device.fp8) if device.fp8 else None
    return row
