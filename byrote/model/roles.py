"""What each parameter is for, in words the optimizer understands; it never inspects layer classes.

embedding · head · norm (also sinks, gate biases) · mix (mHC, HC) · conv · router          by name
matrix                a hidden matrix, orthogonalised whole
matrix_rows:H         H heads (V4: output groups) stacked along the outputs, each orthogonalised by itself
matrix_cols:H         the same along the inputs
matrix_pair           two matrices fused along the outputs (SwiGLU)
experts, experts_pair one matrix (pair) per expert, stacked in front
"""

from typing import TYPE_CHECKING

from byrote.model.block import Block
from byrote.model.csa import V4Attention

if TYPE_CHECKING:
    from byrote.model.transformer import Model


def param_roles(model: "Model") -> dict[str, str]:
    """Name → role, for every parameter."""
    streams = model.config.residual.streams
    roles: dict[str, str] = {}
    for prefix, block in model.named_modules():
        if isinstance(block, Block):
            heads = block.attn.num_heads
            roles |= {f"{prefix}.{name}": _role(f"{prefix}.{name}", heads, streams) for name, _ in block.named_parameters()}
            if isinstance(block.attn, V4Attention):
                roles[f"{prefix}.attn.o_a.weight"] = f"matrix_rows:{block.attn.o_a.groups}"
    return {name: roles.get(name) or _role(name, 1, streams) for name, _ in model.named_parameters()}


def _role(name: str, heads: int, streams: int) -> str:
    *path, last = name.split(".")
    owner = path[-1] if path else ""
    if owner in ("embed", "head"):
        return {"embed": "embedding", "head": "head"}[owner]
    if last == "router":
        return "router"
    if owner == "conv":
        return "conv" if last == "weight" else "norm"
    if owner.endswith("norm") or last.endswith("gain") or last in ("bias", "sink"):
        return "norm"
    if owner.endswith("_site") or owner == "read_out":
        return "mix"
    return _matrix_role(path, owner, heads, streams)


def _matrix_role(path: list[str], owner: str, heads: int, streams: int) -> str:
    if "experts" in path:
        return "experts_pair" if owner == "gate_up" else "experts"
    if owner == "gate_up":
        return "matrix_pair"
    if path[-2:-1] == ["engram"]:
        return f"matrix_rows:{streams}" if owner == "key" else "matrix"
    if path[-2:-1] == ["indexer"]:  # its heads are another number than attention's, and small
        return "matrix"
    if owner in ("q", "q_b", "kv_b"):
        return f"matrix_rows:{heads}"
    return f"matrix_cols:{heads}" if owner == "o" else "matrix"
