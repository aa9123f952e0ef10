"""`tiny_cpu`: every part of the architecture, sized for four minutes on two CPU cores."""

from byrote.model.presets import load_preset
from byrote.train.run import DataConfig, OptimConfig, RunConfig, SourceConfig, TrainConfig


def tiny_cpu() -> RunConfig:
    """The quickstart's recipe. Choices and what they were measured against: LOG.md."""
    return RunConfig(
        name="tiny_cpu",
        model=load_preset("tiny"),
        data=DataConfig(sources=(SourceConfig(path="python-stdlib"),), vocab_size=4096, sequence_length=256, batch_sequences=8),
        optim=OptimConfig(lr=6e-3, adam_lr=3e-3),
        train=TrainConfig(seconds=225.0),
    )
