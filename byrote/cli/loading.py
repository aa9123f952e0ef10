"""What every verb that runs a model does first: model and tokenizer, or an error that says which is missing."""

import argparse
from typing import TYPE_CHECKING

from byrote.errors import CheckpointError

if TYPE_CHECKING:
    from byrote.model.transformer import Model
    from byrote.tokenizer.bpe import Tokenizer


def add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        default="saved",
        choices=("saved", "int8"),
        help="int8: a quarter of the memory and faster on a CPU (default: %(default)s)",
    )


def load_for_text(path: str, device: str, weights: str = "saved") -> tuple["Model", "Tokenizer"]:
    """The newest checkpoint of a run, or one checkpoint. Raises CheckpointError if it has no tokenizer: text is no use to it."""
    import byrote

    model, tokenizer = byrote.load(path, device=device, weights=weights)
    if tokenizer is None:
        raise CheckpointError(
            f"{path} holds a model without a tokenizer, and text needs one. Save it again with "
            "byrote.save(model, path, tokenizer=Tokenizer.load(FOLDER)), FOLDER with the tokenizer.json the model was trained with"
        )
    return model, tokenizer
