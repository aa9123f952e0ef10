"""`tiny_cpu`: every part of the architecture, sized for four minutes on two CPU cores."""

from byrote.model.presets import load_preset
from byrote.train.run import DataConfig, OptimConfig, RunConfig, SourceConfig, TrainConfig


def tiny_cpu() -> RunConfig:
    """The quickstart's recipe. Choices and what they were measured against: LOG.md."""
    return RunConfig(
        name="tiny_cpu",
        model=load_preset("tiny"),
        data=DataConfig(sources=(SourceConfig(path="python-stdlib"),), vocab_size=4096, sequence_length=512, batch_sequences=4),
        optim=OptimConfig(lr=3e-3, adam_lr=6e-3, table_lr_scale=10.0, decay_fraction=0.4),
        train=TrainConfig(seconds=225.0, eval_context=512, eval_stride=256),
    )
