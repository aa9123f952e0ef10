"""`byrote plan RECIPE|PRESET`: what a model weighs and costs, from its configuration alone.

Numbers come from `byrote.model.plan`; this file loads, prints and writes JSON.
"""

import argparse
import json
from typing import Any

from byrote.config import apply_overrides, describe, nearest
from byrote.console import format_bytes, print_table
from byrote.data.config import DataConfig, SourceConfig
from byrote.errors import ConfigError
from byrote.model.ledger import DEFAULT_MFU, THIS_MACHINE, find_device
from byrote.recipes import RECIPES, load_recipe
from byrote.train.run import RunConfig

HELP = "parameters, FLOPs, bytes and cost of a recipe or preset, without building it"

PRESET_SEQUENCE = 4096  # tokens a preset is planned at unless --sequence says otherwise: what the published models trained on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = f"{HELP}. Any field of the run can be changed as --section.key value, such as --model.moe.top_k 4."
    parser.add_argument(
        "name",
        metavar="RECIPE|PRESET",
        help="tiny_cpu, engram-27b, v3, small:v4 (a size in another profile) …; a wrong name lists them all",
    )
    parser.add_argument(
        "--tokens", type=_amount, metavar="N", help="training tokens for the cost ledger, such as 14.8T (default: those of the run)"
    )
    parser.add_argument(
        "--device", metavar="NAME", help="H800 (default), H100, H200, A100, B200, RTX4090, or this-machine: peak measured now"
    )
    parser.add_argument("--price", type=float, metavar="DOLLARS", help="per device-hour (default: 2 for H800, as in the V3 and R1 papers)")
    parser.add_argument("--mfu", type=float, metavar="SHARE", help="assumed share of the bf16 peak, 0 … 1 (default 0.4)")
    parser.add_argument(
        "--sequence", type=int, metavar="N", help="tokens of a training sequence (default: the recipe's; 4096 for a preset)"
    )
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    for option in describe(RunConfig):
        if "." in option.name:
            parser.add_argument(f"--{option.name}", dest=option.name, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    plan = _plan(args)
    if args.json:
        print(json.dumps(plan, indent=2, ensure_ascii=False))
    else:
        print_plan(plan)
    return 0


def _amount(text: str) -> float:
    """A number with an optional K, M, B or T: "14.8T" → 14.8e12."""
    units = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    suffix = text[-1:].upper()
    try:
        amount = float(text[:-1]) * units[suffix] if suffix in units else float(text)
    except ValueError:
        amount = 0.0
    if not 0 < amount < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above zero; write 5e9, 300B or 14.8T")
    return amount


# --- gathering --------------------------------------------------------------------------------------------------------


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    from byrote.model.plan import is_published, model_plan, published_runs

    overrides = {key: value for key, value in vars(args).items() if "." in key}
    config = apply_overrides(_load(args.name), overrides)
    sequence = config.data.sequence_length if args.sequence is None else args.sequence
    if sequence < 1:
        raise ConfigError(f"--sequence is {sequence}; it must be at least 1 token")
    rules = {"matrix_rule": config.optim.matrix, "table_rule": config.optim.table_rule}
    plan = model_plan(args.name, config.model, sequence=sequence, table=config.table, **rules)
    plan["cost"] = _cost(args, config, sequence)
    plan["published_runs"] = published_runs() if args.name == "v3" and is_published("v3", config.model) else {}
    return plan


def _load(name: str) -> RunConfig:
    """The recipe of that name, or else the preset in a run of its own. ConfigError with the nearest name."""
    from byrote.model.presets import PRESETS, load_preset

    size = name.partition(":")[0]
    if size in RECIPES:
        return load_recipe(name)
    if size not in PRESETS:
        near, recipes, presets = nearest(size, (*RECIPES, *PRESETS)), ", ".join(RECIPES), ", ".join(PRESETS)
        raise ConfigError(f"{name!r} is no recipe and no preset; nearest: {near}. Recipes: {recipes}. Presets: {presets}")
    model = load_preset(name)
    data = DataConfig(sources=(SourceConfig(path="python-stdlib"),), sequence_length=min(PRESET_SEQUENCE, model.max_positions))
    return RunConfig(name=name.replace(":", "-"), model=model, data=data)


def _cost(args: argparse.Namespace, config: RunConfig, sequence: int) -> dict[str, Any] | None:
    from byrote.model.plan import cost_plan, published_tokens

    tokens = args.tokens or _run_tokens(config) or published_tokens(args.name, config.model)
    given = [option for option in ("device", "price", "mfu") if getattr(args, option) is not None]
    if tokens is None and given:
        raise ConfigError(f"--{given[0]} needs a number of training tokens; add --tokens, such as --tokens 100B")
    if tokens is None:
        return None
    device, peak, price = _device(args.device or "H800")
    mfu = DEFAULT_MFU if args.mfu is None else args.mfu
    price = price if args.price is None else args.price
    return cost_plan(config.model, sequence=sequence, tokens=tokens, device=device, peak=peak, mfu=mfu, price=price)


def _run_tokens(config: RunConfig) -> float | None:
    """Tokens a recipe trains on, if it fixes its steps."""
    data = config.data
    return None if config.train.steps is None else float(config.train.steps * data.accumulate * data.batch_sequences * data.sequence_length)


def _device(name: str) -> tuple[str, float, float | None]:
    """(name, FLOP/s, dollars an hour); `this-machine` is measured."""
    if name != THIS_MACHINE:
        known, device = find_device(name)
        return known, device.bf16, device.price
    from byrote.device import autocast_dtype, matmul_peak, pick_device

    here = pick_device("auto")
    return f"{THIS_MACHINE} ({here.type})", matmul_peak(here, autocast_dtype(here)), None


# --- printing ---------------------------------------------------------------------------------------------------------


def print_plan(plan: dict[str, Any]) -> None:
    """`plan` as tables; keys "cost" and "published_runs" may be missing."""
    print(f"{plan['name']}: " + " · ".join(f"{key} {value}" for key, value in plan["shape"].items()))
    _print_parameters(plan)
    _print_totals(plan["totals"])
    _print_published(plan["published"])
    _print_flops(plan["flops_per_token"])
    _print_bytes(plan["bytes"])
    if plan["table"]:
        _print_table_place(plan["table"])
    if plan.get("cost"):
        _print_cost(plan["cost"])
    for name, published in plan.get("published_runs", {}).items():
        _print_run(name, published)


def _title(text: str) -> None:
    print(f"\n{text}")


def _figure(number: float, giga: str = "B") -> str:
    """1.5729e12 → "1.573T": four digits, powers of 1000."""
    for scale, unit in ((1e12, "T"), (1e9, giga), (1e6, "M"), (1e3, "K")):
        if number >= scale:
            return f"{number / scale:.4g}{unit}"
    return f"{number:.4g}"


def _print_parameters(plan: dict[str, Any]) -> None:
    parts = plan["parameters"]
    largest = max(row["total"] for row in parts.values())
    unit, scale = ("B", 1e9) if largest >= 1e10 else ("M", 1e6)
    _title(f"Parameters ({unit}) and forward FLOPs per token (M, sequence {plan['flops_per_token']['sequence']})")
    columns = (("total", scale), ("active", scale), ("mtp", scale), ("forward_flops", 1e6))
    rows = [[name.replace("_", " "), *(_blank(row[key] / divisor) for key, divisor in columns)] for name, row in parts.items()]
    sums = [sum(row[key] for row in parts.values()) / divisor for key, divisor in columns]
    print_table([*rows, ["sum", *map(_blank, sums)]], header=("part", "main", "active", "MTP", "FLOPs"))


def _blank(number: float) -> str:
    return f"{number:.3f}" if number else ""


def _print_totals(totals: dict[str, Any]) -> None:
    _title("Totals, by how often the vocabulary matrix is counted")
    rows = [[words, _figure(row["total"]), _figure(row["active"])] for words, row in totals["by_vocabulary_counted"].items()]
    print_table(rows, header=("counted", "total with memory", "active per token"))
    if totals["memory"]:
        print(f"memory table: {totals['memory']:,} numbers in {' + '.join(f'{rows:,}' for rows in totals['memory_rows'])} rows")
    if totals["mtp"]:
        stored = _figure(totals["with_mtp_as_stored"])
        print(f"with MTP: {_figure(totals['with_mtp'])}; as stored, with its copies of embedding and head: {stored}")
    print(f"trained by gradients, MTP included, memory apart: {totals['trained']:,}; kept beside them: {totals['buffers']:,}")


def _print_published(published: list[dict[str, Any]]) -> None:
    if not published:
        return
    _title("Published figures, and ours counted the same way")
    rows = [
        [
            row["quantity"],
            _figure(row["published"]),
            _figure(row["ours"]),
            f"{row['deviation']:+.2%}",
            "yes" if row["rounds_to_it"] else "no",
            row["counted"],
            row["source"],
        ]
        for row in published
    ]
    print_table(rows, header=("quantity", "published", "ours", "deviation", "rounds to it", "counted", "source"))


def _print_flops(flops: dict[str, Any]) -> None:
    _title(f"FLOPs per token at sequence {flops['sequence']} (2 per multiply-add; training = 3 × forward with MTP)")
    names = {"forward": "forward", "mtp_forward": "MTP forward", "training": "training"}
    print_table([[words, _figure(flops[key], giga="G")] for key, words in names.items() if flops[key]])


def _print_bytes(sizes: dict[str, Any]) -> None:
    _title("Bytes")
    cache = sizes["cache"]
    weights = [[f"weights, {dtype}", format_bytes(size), ""] for dtype, size in sizes["weights"].items()]
    rows = [
        *weights,
        ["gradients", format_bytes(sizes["gradients_fp32"]), "fp32"],
        ["optimizer state", format_bytes(sizes["optimizer"]), f"fp32; matrices by {sizes['optimizer_rule']}, the rest by adamw"],
        ["cache per token", format_bytes(cache["bytes_per_token"]), f"{cache['numbers_per_token']:g} numbers; {cache['layout']}"],
    ]
    if cache["bytes_fixed"]:
        rows.append(["cache per sequence", format_bytes(cache["bytes_fixed"]), "windows, whatever the length"])
    if sizes["table"]:
        rows.append(["memory table", format_bytes(sizes["table"]), str(sizes["table_dtype"])])
        rows.append(
            ["memory optimizer state", format_bytes(sizes["table_optimizer"]), f"{sizes['table_rule']}, and a count of updates per row"]
        )
        rows.append(["memory read per token", format_bytes(sizes["table_read_per_token"]), "all memory layers"])
    print_table(rows)


def _print_table_place(table: dict[str, Any]) -> None:
    from byrote.device import disk_free, memory_bytes

    _title(f"Memory table with --table.store {table['store']}, when every row was trained")
    on_disk = table["store"] == "disk"
    rows = (
        ("beside the model", table["device_bytes"], ""),
        ("RAM", table["ram_bytes"], f"{'index and hot rows; ' * on_disk}{format_bytes(memory_bytes()[1])} free here"),
        ("disk", table["disk_bytes"], f"up to twice that with old records; {format_bytes(disk_free(table['folder'] or '.'))} free here"),
    )
    print_table([[place, format_bytes(size), notes] for place, size, notes in rows if size])


def _print_cost(cost: dict[str, Any]) -> None:
    _title(f"Cost of {_figure(cost['tokens'])} tokens at sequence {cost['sequence']}")
    rows = [
        ["FLOPs", f"{cost['flops']:.3e}", ""],
        [
            "device-hours",
            _hours(cost["device_hours"]),
            f"{cost['device']}: {cost['peak_flops'] / 1e12:.4g} TFLOP/s × assumed MFU {cost['mfu']:.0%}",
        ],
    ]
    if cost["dollars"] is None:
        rows.append(["dollars", "", f"no price known for {cost['device']}; add --price"])
    else:
        rows.append(["dollars", _dollars(cost["dollars"]), f"at ${cost['price_per_hour']:g} an hour"])
    print_table(rows)


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 1e4 else f"{hours:.4g}"


def _dollars(amount: float) -> str:
    return f"${amount:,.2f}" if amount < 1e4 else f"${amount:,.0f}"


def _print_run(name: str, published: dict[str, Any]) -> None:
    _title(f"Published cost of {name.upper()} ({published['source']}): {published['device']}-hours at ${published['price_per_hour']:g}")
    rows = [_stage_row(stage) for stage in published["stages"]]
    total = ["together", _hours(published["device_hours"]), _dollars(published["dollars"]), "", "", "", ""]
    print_table([*rows, total], header=("stage", "hours", "dollars", "tokens", "hours per T", "MFU implied, bf16 peak", "fp8 peak"))


def _stage_row(stage: dict[str, Any]) -> list[str]:
    row = [stage["stage"], _hours(stage["device_hours"]), _dollars(stage["dollars"])]
    if "tokens" not in stage:
        return [*row, "not published", "", "", ""]
    shares = (f"{stage[key]:.1%}" for key in ("implied_mfu_bf16", "implied_mfu_fp8"))
    return [*row, _figure(stage["tokens"]), _hours(stage["hours_per_trillion_tokens"]), *shares]
