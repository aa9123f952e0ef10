"""Weights of a model that attends densely, for one that has an indexer beside each MLA: how V3 became V3.2.

blocks.3.attn.q_a.weight      →  blocks.3.attn.mla.q_a.weight
blocks.3.attn.indexer.*          as the new model drew them
"""

from collections.abc import Mapping

from torch import Tensor


def with_indexers(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` under the names of `own`, the new model's state; what fits already stays as it is."""
    grown = {}
    for name, tensor in weights.items():
        block, _, rest = name.partition(".attn.")
        inside = f"{block}.attn.mla.{rest}"
        grown[inside if name not in own and inside in own else name] = tensor
    if grown.keys() == weights.keys():
        return grown
    return {name: tensor for name, tensor in own.items() if ".attn.indexer." in name} | grown
