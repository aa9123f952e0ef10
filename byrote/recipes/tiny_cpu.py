"""`tiny_cpu`: every part of the architecture, sized for four minutes on two CPU cores."""

from byrote.model.config import EngramConfig, MLAConfig, ModelConfig, MoEConfig, MTPConfig, ResidualConfig
from byrote.train.run import DataConfig, OptimConfig, RunConfig, SourceConfig, TrainConfig


def tiny_cpu() -> RunConfig:
    """The quickstart's recipe. Choices and what they were measured against: LOG.md."""
    model = ModelConfig(
        vocab_size=4096,
        dim=256,
        num_layers=4,
        ffn_hidden=688,
        attention=MLAConfig(num_heads=4, q_lora_rank=128, kv_lora_rank=64, qk_nope_head_dim=48, qk_rope_head_dim=16, v_head_dim=64),
        moe=MoEConfig(num_experts=8, top_k=2, expert_hidden=192, num_shared=1, num_dense_layers=1),
        residual=ResidualConfig(kind="mhc", num_streams=4),
        engram=EngramConfig(layers=(1,), rows_per_order=65536, head_dim=40, num_heads=4, max_order=3),
        mtp=MTPConfig(depth=1, loss_weight=0.3),
    )
    return RunConfig(
        name="tiny_cpu",
        model=model,
        data=DataConfig(sources=(SourceConfig(path="python-stdlib"),), vocab_size=4096, sequence_length=256, batch_sequences=8),
        optim=OptimConfig(),
        train=TrainConfig(seconds=225.0),
    )
