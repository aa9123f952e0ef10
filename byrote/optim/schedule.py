"""Schedules as pure functions of the step: learning rate, the weight of multi-token prediction, the length of rows.

    wsd      warm up, stay at 1, fall in a straight line to `final_scale` over the last `decay_fraction` of the run
    cosine   warm up, then half a cosine down to `final_scale`
    step     warm up, stay at 1, at each of `step_points` (shares of the run) jump to the scale beside it   [mHC Table 5]

Step numbers start at 0. The scale of a step is that of the moment it begins, so the first warm-up step would be 0: warm-up counts
steps from 1 instead, and `final_scale` belongs to the step after the last. Where warm-up and decay overlap the smaller one holds.

**Row length.** Short rows first, then longer ones, as V4 grows its context (papers: 4K → 16K → …): attention costs less while it has
little to say. Over the first `length_warmup_fraction` of the steps it doubles from `length_start` to the full one, in stages of
equal length; every step feeds the same number of tokens, in more rows while they are short:

    start 128, full 512, 100 steps, fraction 0.3       steps 0–14 128      15–29 256      30–99 512

`optim` is anything with the fields of `OptimConfig`, `data` anything with those of `DataConfig`.
"""

import math
from typing import Any

_COSINE_STEADY = 2 / 3  # V3 lowers λ after 10T of 14.8T tokens; a cosine has no corner of its own to follow


def lr_scale(step: int, total_steps: int, optim: Any) -> float:
    """Factor on every peak learning rate at `step` of `total_steps`."""
    warmup_steps = round(optim.warmup_fraction * total_steps)
    warmup = (step + 1) / warmup_steps if step < warmup_steps else 1.0
    return min(warmup, _SHAPES[optim.schedule](step, total_steps, optim))


def mtp_weight(step: int, total_steps: int, start: float, final: float, optim: Any) -> float:
    """Weight λ of the multi-token prediction loss: `start`, then `final` once the rate decays (V3 §4.2, V4 §4)."""
    return start if step < _decay_start(total_steps, optim) else final


def row_length(step: int, total_steps: int, data: Any) -> int:
    """Tokens of a row at `step`."""
    full, start = data.sequence_length, data.length_start or data.sequence_length
    doublings, warmup_steps = (full // start).bit_length() - 1, round(data.length_warmup_fraction * total_steps)
    return start << (step * doublings // warmup_steps) if step < warmup_steps else full


def _wsd(step: int, total_steps: int, optim: Any) -> float:
    return 1 - (1 - optim.final_scale) * _progress(step, _decay_start(total_steps, optim), total_steps)


def _cosine(step: int, total_steps: int, optim: Any) -> float:
    progress = _progress(step, round(optim.warmup_fraction * total_steps), total_steps)
    return optim.final_scale + (1 - optim.final_scale) * (1 + math.cos(math.pi * progress)) / 2


def _step(step: int, total_steps: int, optim: Any) -> float:
    passed = [scale for point, scale in zip(optim.step_points, optim.step_scales, strict=True) if step >= round(point * total_steps)]
    return passed[-1] if passed else 1.0


_SHAPES = {"wsd": _wsd, "cosine": _cosine, "step": _step}


def _progress(step: int, start: int, end: int) -> float:
    """Share of the way from `start` to `end`, in [0, 1]."""
    return min(1.0, max(0.0, (step - start) / (end - start))) if end > start else float(step >= end)


def _decay_start(total_steps: int, optim: Any) -> int:
    """First step at which the rate is lowered for good."""
    if optim.schedule == "wsd":
        return total_steps - round(optim.decay_fraction * total_steps)
    if optim.schedule == "step":
        return round(min(optim.step_points, default=1.0) * total_steps)
    return round(_COSINE_STEADY * total_steps)
