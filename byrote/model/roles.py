"""What each parameter is for, in words the optimizer understands; it never inspects layer classes.

embedding · head · norm · mix (mHC, HC) · conv · router          by name
matrix                a hidden matrix, orthogonalised whole
matrix_rows:H         H heads stacked along the outputs, each orthogonalised by itself
matrix_cols:H         the same along the inputs
matrix_pair           two matrices fused along the outputs (SwiGLU)
experts, experts_pair one matrix (pair) per expert, stacked in front
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from byrote.model.transformer import Model


def param_roles(model: "Model") -> dict[str, str]:
    """Name → role, for every parameter."""
    heads, streams = model.config.attention.num_heads, model.config.residual.streams
    return {name: _role(name, heads, streams) for name, _ in model.named_parameters()}


def _role(name: str, heads: int, streams: int) -> str:
    *path, last = name.split(".")
    owner = path[-1] if path else ""
    if owner in ("embed", "head"):
        return {"embed": "embedding", "head": "head"}[owner]
    if last == "router":
        return "router"
    if owner == "conv":
        return "conv" if last == "weight" else "norm"
    if owner.endswith("norm") or last.endswith("gain"):
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
    if owner in ("q", "q_b", "kv_b"):
        return f"matrix_rows:{heads}"
    return f"matrix_cols:{heads}" if owner == "o" else "matrix"
