"""`small`: about 110M active parameters and a 100M memory, for one GPU."""

from byrote.model.presets import load_preset
from byrote.train.run import DataConfig, OptimConfig, RunConfig, SourceConfig, TrainConfig


def small() -> RunConfig:
    """Two billion tokens of your own text: give it with --data.sources; the default source only shows that it runs."""
    return RunConfig(
        name="small",
        model=load_preset("small"),
        data=DataConfig(
            sources=(SourceConfig(path="python-stdlib"),),
            vocab_size=32_768,
            sequence_length=1024,
            batch_sequences=32,
            accumulate=8,
        ),
        optim=OptimConfig(lr=2e-3, adam_lr=1e-3),
        train=TrainConfig(steps=8000, save_every=500, eval_every=500, eval_context=1024, eval_stride=512),
    )
