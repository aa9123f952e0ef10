"""`base`: about 500M active parameters and a 1B memory, for eight GPUs."""

from byrote.model.presets import load_preset
from byrote.train.run import DataConfig, OptimConfig, RunConfig, SourceConfig, TrainConfig


def base() -> RunConfig:
    """Ten billion tokens of your own text: give it with --data.sources; the default source only shows that it runs."""
    return RunConfig(
        name="base",
        model=load_preset("base"),
        data=DataConfig(
            sources=(SourceConfig(path="python-stdlib"),),
            vocab_size=65_536,
            sequence_length=2048,
            batch_sequences=16,
            accumulate=16,
        ),
        optim=OptimConfig(lr=1e-3, adam_lr=6e-4),
        train=TrainConfig(steps=20_000, save_every=500, eval_every=1000, eval_context=2048, eval_stride=1024),
    )
