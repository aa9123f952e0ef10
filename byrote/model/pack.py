"""Packs on a live model: put a memory on, take it off, exchange it; nothing of the base is reloaded and nothing of the pack stays behind.

    attach(model, pack)          model.packs[name] = pack: the model asks its packs, it does not own them
    detach(model, name)          gone: parameters, state_dict and outputs are those of the base, bitwise
    swap(model, old, pack)       both in one step, or neither

Packs stand beside the memory a model was trained with, and stack: before block ℓ each pack that has a layer there adds what it has to
say, in the order of attaching, each gate seeing what was added before it. One batch can mix them: `model(tokens, packs=[("law",),
("law", "medicine"), ()])` names the packs of each sequence, and a sequence without any is computed as the base would.

What a pack must remember of a text lies in the text's `DecodeState`, made by `new_state` for the packs that are attached then.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from byrote.errors import MemoryPackError
from byrote.memory.conditional import Memory
from byrote.memory.pack import HashSpec, Manifest, ModuleSpec, PackFiles, TableSpec, fingerprint
from byrote.memory.table import TableStore
from byrote.model.config import EngramConfig
from byrote.model.engram import Engram
from byrote.model.init import initialise
from byrote.model.quantize import refuse_quantized

if TYPE_CHECKING:
    from byrote.model.transformer import Model


@dataclass(frozen=True, kw_only=True, slots=True)
class PackFacts:
    """What a pack says about itself."""

    name: str
    tokenizer: str  # fingerprint of the tokenizer whose ids it reads
    base: str  # fingerprint of the model it was trained on
    provenance: str = ""  # which text, how trained
    licence: str = "not stated"


class Pack:
    """Hash, canonical map, table and the weights of the memory layers: all of a memory, and nothing of a model."""

    files: PackFiles | None = None  # where it was opened from

    def __init__(self, config: EngramConfig, memory: Memory, layers: nn.ModuleDict, facts: PackFacts, *, vocab_size: int) -> None:
        self.config, self.memory, self.layers, self.facts, self.vocab_size = config, memory, layers, facts, vocab_size
        first = next(iter(layers.values()))
        assert isinstance(first, Engram), "a pack is made of Engram layers"
        self.streams, self.dim = first.stream_gain.shape
        self.eps = first.eps

    def engram(self, block: int) -> Engram | None:
        """The memory layer that speaks before block `block`."""
        if block not in self.config.layers:
            return None
        engram = self.layers[str(block)]
        assert isinstance(engram, Engram)
        return engram

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.layers.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.layers.named_parameters()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Pack":
        """Move table and weights; `dtype` is for the matrices, as in `byrote.load`. Returns self."""
        if device is not None:
            self.memory.to(device)
            self.layers.to(device)
        for engram in self.layers.values() if dtype is not None else ():
            assert isinstance(engram, Engram)
            engram.value.to(dtype)
            engram.key.to(dtype)
        return self


def new_pack(
    config: EngramConfig,
    *,
    dim: int,
    streams: int = 1,
    vocab_size: int,
    eps: float = 1e-6,
    init_std: float = 0.02,
    seed: int = 0,
    table_state_dim: int = 1,
    facts: PackFacts,
    **table: Any,
) -> Pack:
    """A pack to train. With `table_std` 0 in `config` its rows are zero, and so is what it adds. With `canonical_vocab` the map must
    follow: `pack.memory.set_canonical(class_V)`. `table` goes to `build_memory`: where the rows live."""
    from byrote.model.transformer import build_memory

    memory = build_memory(config, vocab_size, seed, table_state_dim, **table)
    layers = nn.ModuleDict({str(block): Engram(dim, streams, config, eps, slot) for slot, block in enumerate(config.layers)})
    initialise(layers, init_std, seed)
    return Pack(config, memory, layers, facts, vocab_size=vocab_size)


# --- a pack and its manifest ------------------------------------------------------------------------------------------


def manifest_of(pack: Pack, version: str) -> Manifest:
    """What a manifest says of this pack, without checksums and files."""
    hash_, config = pack.memory.hash, pack.config
    return Manifest(
        byrote=version,
        name=pack.facts.name,
        layers=config.layers,
        vocab_size=pack.vocab_size,
        pad_token=config.pad_token,
        hash=HashSpec(
            canonical_vocab=hash_.canonical_vocab,
            rows_per_order=config.rows_per_order,
            max_order=config.max_order,
            num_heads=config.num_heads,
            layers=config.hash_ids,
            pad=hash_.pad,
            seed=config.hash_seed,
        ),
        module=ModuleSpec(
            dim=pack.dim,
            streams=pack.streams,
            conv_kernel=config.conv_kernel,
            conv_dilation=config.dilation,
            gate=config.gate,
            eps=pack.eps,
        ),
        table=TableSpec(rows=pack.memory.store.num_rows, dim=config.head_dim, dtype=config.table_dtype, counted=True, blocks=()),
        tokenizer=pack.facts.tokenizer,
        base=pack.facts.base,
        provenance=pack.facts.provenance,
        licence=pack.facts.licence,
        files=(),
    )


def pack_from(files: PackFiles, store: TableStore) -> Pack:
    """The pack of opened files, its rows in `store`. MemoryPackError if the weights are not those of its manifest."""
    manifest = files.manifest
    config = _config(manifest)
    with torch.device("meta"):
        module = manifest.module
        layers = nn.ModuleDict(
            {str(block): Engram(module.dim, module.streams, config, module.eps, slot) for slot, block in enumerate(manifest.layers)}
        )
    _check_weights(files, layers)
    layers.load_state_dict(files.weights, assign=True)
    mapped = files.canonical_V is not None
    memory = Memory(files.hash, store, vocab_size=manifest.vocab_size, needs_canonical=mapped, pad_token=manifest.pad_token)
    if files.canonical_V is not None:
        memory.set_canonical(files.canonical_V)
    facts = PackFacts(**{name: getattr(manifest, name) for name in PackFacts.__dataclass_fields__})
    pack = Pack(config, memory, layers.eval(), facts, vocab_size=manifest.vocab_size).to(store.device)
    pack.files = files
    return pack


def _config(manifest: Manifest) -> EngramConfig:
    hash_, module, table = manifest.hash, manifest.module, manifest.table
    mapped = any(file.name == "canonical.safetensors" for file in manifest.files)
    return EngramConfig(
        layers=manifest.layers,
        rows_per_order=hash_.rows_per_order,
        head_dim=table.dim,
        num_heads=hash_.num_heads,
        max_order=hash_.max_order,
        hash_layer_ids=hash_.layers,
        tokenizer_compression=mapped,
        canonical_vocab=hash_.canonical_vocab if mapped else None,
        pad_token=manifest.pad_token,
        hash_seed=hash_.seed,
        conv_kernel=module.conv_kernel,
        conv_dilation=module.conv_dilation,
        gate=module.gate,
        table_dtype="bfloat16" if table.dtype == "bfloat16" else "float32",
        table_std=0.0,
    )


def _check_weights(files: PackFiles, layers: nn.ModuleDict) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in layers.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in files.weights.items()}
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            raise MemoryPackError(
                f"{files.folder}: layers.safetensors holds {name} as {found.get(name)}; layers and module of the manifest make it "
                f"{wanted.get(name)}. Get the pack again"
            )
        if not files.weights[name].is_floating_point():
            raise MemoryPackError(
                f"{files.folder}: layers.safetensors holds {name} as {files.weights[name].dtype}; weights are floating-point"
            )


# --- on and off a model -----------------------------------------------------------------------------------------------


def attach(model: "Model", pack: Pack, name: str | None = None, *, tokenizer: str | None = None, any_base: bool = False) -> str:
    """Put a pack on; returns the name it goes by. MemoryPackError, and nothing changed, if it does not fit.

    The pack moves to the model's device, its matrices to the dtype of the model's. `tokenizer` is the fingerprint of yours, if you
    want it compared; `any_base` takes a pack that was trained on another base of the same shape.
    """
    name = _free_name(model, pack, name)
    _check(model, pack, tokenizer, any_base)
    model.packs[name] = _moved(model, pack)
    return name


def detach(model: "Model", name: str) -> Pack:
    """Take a pack off and return it."""
    if name not in model.packs:
        raise MemoryPackError(f"no pack named {name!r} is attached; attached are: {', '.join(model.packs) or 'none'}")
    return model.packs.pop(name)


def swap(
    model: "Model", old: str, pack: Pack, name: str | None = None, *, tokenizer: str | None = None, any_base: bool = False
) -> tuple[Pack, str]:
    """Exchange the pack named `old`, in its place in the order; returns it, and the name of the new one."""
    if old not in model.packs:
        detach(model, old)
    name = _free_name(model, pack, name, leaving=old)
    _check(model, pack, tokenizer, any_base)
    gone, pack = model.packs[old], _moved(model, pack)
    model.packs = {name if key == old else key: pack if key == old else other for key, other in model.packs.items()}
    return gone, name


def own_memory(model: "Model", facts: PackFacts, *, take_off: bool = False) -> Pack:
    """The memory a model was trained with as a pack that shares its weights and rows.

    With `take_off` the model loses it, and `attach` puts it back, bitwise.
    """
    refuse_quantized(model, "taken apart")
    memory, engram = model.memory, model.config.engram
    if memory is None or engram is None:
        raise MemoryPackError("this model has no memory of its own: it was trained with model.engram none. Attach a pack instead")
    blocks = {block: model.get_submodule(f"blocks.{block}") for block in engram.layers}
    layers = nn.ModuleDict({str(block): module.get_submodule("engram") for block, module in blocks.items()})
    pack = Pack(engram, memory, layers, facts, vocab_size=model.config.vocab_size)
    if take_off:
        for module in blocks.values():
            setattr(module, "engram", None)  # noqa: B010 (typed as a module, and None is one that is not there)
        model.memory, model.config = None, replace(model.config, engram=None)
    return pack


def base_fingerprint(model: "Model") -> str:
    """Of all weights but those of memory."""
    return fingerprint((name, parameter) for name, parameter in model.named_parameters() if ".engram." not in name)


def check_fits(
    pack: Pack, *, dim: int, streams: int, num_layers: int, vocab_size: int, tokenizer: str | None = None, base: str | None = None
) -> None:
    """Raise MemoryPackError, naming the field, if the pack is for another model; None is not compared."""
    for field, got, need in (("module.dim", pack.dim, dim), ("module.streams", pack.streams, streams)):
        if got != need:
            raise MemoryPackError(f"the pack {pack.facts.name!r} has {field} {got}, the model {need}: it is for another model")
    outside = [block for block in pack.config.layers if block >= num_layers]
    if outside:
        raise MemoryPackError(f"the pack {pack.facts.name!r} has layers {outside}; the model has blocks 0..{num_layers - 1}")
    if pack.vocab_size < vocab_size:
        raise MemoryPackError(
            f"the pack {pack.facts.name!r} has vocab_size {pack.vocab_size:,}, the model {vocab_size:,}: another tokenizer"
        )
    for field, made_for, this, hint in (
        ("tokenizer", pack.facts.tokenizer, tokenizer, "its rows mean other tokens"),
        ("base", pack.facts.base, base, "its gates know another model; --any-base (any_base=True) attaches it all the same"),
    ):
        if this is not None and made_for != this:
            raise MemoryPackError(f"the pack {pack.facts.name!r} was made for {field} {made_for[:12]}…, this is {this[:12]}…: {hint}")


def _check(model: "Model", pack: Pack, tokenizer: str | None, any_base: bool) -> None:
    c = model.config
    if not any_base:
        refuse_quantized(model, "compared with the base of a pack")
    base = None if any_base else base_fingerprint(model)
    shape = {"dim": c.dim, "streams": c.residual.streams, "num_layers": c.num_layers, "vocab_size": c.vocab_size}
    check_fits(pack, **shape, tokenizer=tokenizer, base=base)


def _free_name(model: "Model", pack: Pack, name: str | None, leaving: str | None = None) -> str:
    name = pack.facts.name if name is None else name
    if name in model.packs and name != leaving:
        raise MemoryPackError(f"a pack named {name!r} is attached already; give this one another name, or swap them")
    return name


def _moved(model: "Model", pack: Pack) -> Pack:
    weight = model.embed.weight
    return pack.to(weight.device, weight.dtype)
