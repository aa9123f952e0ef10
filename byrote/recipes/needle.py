"""`needle`, `needle_dsa`, `needle_v4`: synthetic recall on three kinds of attention, two to four minutes each on a CPU core.

Two blocks are the least that can do it: one attends to the token before, the other to the token behind the key that is asked for.
Documents of 16 to 256 tokens with a pair in every eight; the short ones make the mechanism appear, the long ones stretch it. Sparse
kinds attend densely until recall is learnt, then the indexer warms up, then they choose. How the settings were found, in few runs
that changed several things at once, stands in LOG.md. The models differ in attention alone; `--model.engram none` takes memory out.
"""

from byrote.data.config import RECALL, RecallConfig
from byrote.model.config import AttentionConfig, DSAConfig, EngramConfig, MLAConfig, ModelConfig, ResidualConfig, V4AttentionConfig
from byrote.train.run import DataConfig, OptimConfig, RunConfig, SourceConfig, TrainConfig

_MLA = MLAConfig(num_heads=4, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)


def needle() -> RunConfig:
    """Every query attends to every token before it."""
    return _run("needle", _MLA)


def needle_dsa() -> RunConfig:
    """Every query attends to the 64 tokens that its indexer picks."""
    return _run("needle_dsa", DSAConfig(mla=_MLA, index_num_heads=4, index_head_dim=32, index_top_k=64))


def needle_v4() -> RunConfig:
    """A window of 32 tokens in both blocks; in the second also the 16 of its compressed entries that the indexer picks."""
    attention = V4AttentionConfig(
        num_heads=4,
        head_dim=32,
        rope_head_dim=16,
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=32,
        sliding_window=32,
        compress_ratios=(0, 4),
        index_num_heads=4,
        index_head_dim=32,
        index_top_k=16,
    )
    return _run("needle_v4", attention)


def _run(name: str, attention: AttentionConfig) -> RunConfig:
    return RunConfig(
        name=name,
        model=ModelConfig(
            vocab_size=259,
            dim=64,
            num_layers=2,
            attention=attention,
            ffn_hidden=128,
            residual=ResidualConfig(kind="plain"),
            engram=EngramConfig(layers=(1,), rows_per_order=5000, head_dim=16, num_heads=4, max_order=2, tokenizer_compression=False),
        ),
        data=DataConfig(
            sources=(SourceConfig(path=RECALL, recall=RecallConfig(shortest=16, pair_every=8, num_keys=32, num_values=32, num_hay=32)),),
            vocab_size=259,  # bytes and special tokens: there is no text to learn merges from
            sequence_length=256,
            batch_sequences=16,
            validation_bytes=0,
        ),
        optim=OptimConfig(lr=4e-3, adam_lr=1e-2),
        train=TrainConfig(steps=900, precision="fp32", index_warmup=None if isinstance(attention, MLAConfig) else (0.6, 0.7)),
    )
