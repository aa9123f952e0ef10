"""Context extension by YaRN: a trained run, its rotary frequencies stretched, trained a little more on longer rows (V3 §4.3).

YaRN (arXiv 2309.00071) leaves the fast pairs of a rotary embedding alone, divides the slow ones by the factor, and sharpens attention a
little (`model/rope.py`). V3 went from 4K to 32K and to 128K in a thousand steps each, at the rate its pre-training ended with; here
a tenth of the peak rate, falling to nothing. Rows are packed without cutting documents that fit, as a cut costs the very
context they are long for. V4 has two rotary tables: only that of compressed entries is stretched, without sharpening, and the
window keeps its own (v4_spec §5: "two RoPE tables").

How much of a gain is YaRN's, and how much the further training's? The control trains the same steps with the frequencies as they were.
"""

from dataclasses import replace

from byrote.errors import ConfigError
from byrote.model.config import AttentionConfig, DSAConfig, MLAConfig, RopeConfig, YarnConfig
from byrote.train.run import RunConfig

RATE = 0.1  # of the peak learning rates


def extended(config: RunConfig, start: str, factor: int, steps: int, *, yarn: bool = True) -> RunConfig:
    """The run that goes on from the run in folder `start`, whose configuration is `config`, on rows `factor` times as long.

    `yarn=False` leaves the rotary frequencies alone: the control.
    """
    if factor < 2 or factor & (factor - 1):
        raise ConfigError(f"the factor is {factor}; give a power of two, such as 4")
    trained, model, data, optim = config.data.sequence_length, config.model, config.data, config.optim
    kinds = model.attention if isinstance(model.attention, tuple) else (model.attention,)
    stretched = tuple(_stretched(kind, factor, trained) for kind in kinds) if yarn else kinds
    return replace(
        config,
        name=f"{config.name}-x{factor}{'' if yarn else '-control'}",
        model=replace(
            model,
            attention=stretched if isinstance(model.attention, tuple) else stretched[0],
            max_positions=max(model.max_positions, trained * factor),
        ),
        data=replace(
            data,
            sequence_length=trained * factor,
            batch_sequences=max(1, data.batch_sequences // factor),
            packing="whole",
            length_start=None,
            tokenizer=f"{start}/data/tokenizer",
        ),
        optim=replace(optim, lr=optim.lr * RATE, adam_lr=optim.adam_lr * RATE, schedule="cosine", warmup_fraction=0.1),
        train=replace(config.train, steps=steps, seconds=None, start_from=start, index_warmup=None),
    )


def _stretched(attention: AttentionConfig, factor: int, trained: int) -> AttentionConfig:
    if isinstance(attention, MLAConfig):
        return replace(attention, rope=_with_yarn(attention.rope, factor, trained, 1.0))
    if isinstance(attention, DSAConfig):
        return replace(attention, mla=replace(attention.mla, rope=_with_yarn(attention.mla.rope, factor, trained, 1.0)))
    return replace(attention, compress_rope=_with_yarn(attention.compress_rope, factor, trained, 0.0))


def _with_yarn(rope: RopeConfig, factor: int, trained: int, mscale: float) -> RopeConfig:
    """A run that was stretched before is stretched further, from the length it first had."""
    if rope.yarn is not None:
        return replace(rope, yarn=replace(rope.yarn, factor=rope.yarn.factor * factor))
    return replace(rope, yarn=YarnConfig(factor=factor, original_positions=trained, mscale=mscale, mscale_all_dim=mscale))
