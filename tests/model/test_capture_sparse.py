"""Captured steps of V3.2's and V4's attention: windows, groups and choices are those of the ordinary step, wherever borders fall."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from byrote.model.capture import capture
from byrote.model.config import DSAConfig, EngramConfig, RopeConfig
from byrote.model.transformer import Model
from tests.model.test_capture import alone, assert_same_states, decoding, threads  # noqa: F401  fixtures
from tests.model.test_csa import MOE, V4, v4_config
from tests.model.tiny_models import ATTENTION, ENGRAM, RESIDUALS, bare, build, text, whole
from tests.tolerances import assert_bitwise, assert_close_fp32

DSA = DSAConfig(mla=ATTENTION, index_num_heads=3, index_head_dim=8, index_top_k=11)
ODD = replace(V4, num_heads=5, head_dim=37, o_groups=1, index_head_dim=19, index_num_heads=35, rope_head_dim=10, sliding_window=3)
V4_MODEL = v4_config(mtp=None)
MODELS = {
    "v4": V4_MODEL,
    "v4 with memory": v4_config(mtp=None, engram=replace(ENGRAM, layers=(1, 2))),
    "v4 on a plain residual, dense": bare(num_layers=3, attention=replace(V4, compress_ratios=(4, 128, 0))),
    "v4, odd sizes": v4_config(mtp=None, attention=ODD),
    "v4, a window of one": v4_config(mtp=None, attention=replace(V4, sliding_window=1)),
    "v4, wide": v4_config(mtp=None, attention=replace(V4, head_dim=80, rope_head_dim=16, index_head_dim=32, sliding_window=130)),
    "v4, all entries read": v4_config(mtp=None, attention=replace(V4, index_stage="dense_warmup")),
    "dsa": whole(attention=DSA, mtp=None),
    "dsa, hadamard, full-rank queries": whole(attention=replace(DSA, index_hadamard=True, mla=replace(ATTENTION, q_lora_rank=None)), mtp=None),
    "dsa, half layout, dense": bare(attention=replace(DSA, mla=replace(ATTENTION, rope=RopeConfig(layout="half")))),
    "mla, dsa and v4": bare(num_layers=3, attention=(ATTENTION, DSA, replace(V4, compress_ratios=(4,)))),
}


def steps(model: Model, tokens_BT: Tensor, prompt: int, tokens: int, *, rollback: int = 16, **more) -> None:
    """After a prompt, every further piece gives the same, captured or not."""
    step, states = alone(capture(model)), [model.new_state(len(tokens_BT), max_rollback=rollback) for _ in range(2)]
    for state in states:
        model(tokens_BT[:, :prompt], state=state, **more)
    for start in range(prompt, tokens_BT.shape[1], tokens):
        piece = tokens_BT[:, start : start + tokens]
        assert_close_fp32(step(piece, state=states[0]).logits, model(piece, state=states[1]).logits)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 16), (2, 3), (5, 3)])
def test_a_captured_step_equals_the_ordinary_one(name, batch, tokens):
    steps(build(MODELS[name]), text(batch, 120 + 5 * max(tokens, 3)), 120, tokens)
