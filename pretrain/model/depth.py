"""How deep in the network a parameter lies: what freezing and layer-wise learning rates go by.

From the input on: 0 the embedding (patches, class token, positions), i the i-th block, layers + 1 the final norm,
layers + 2 the head (representation and classification layer).
"""

from typing import Annotated, Literal

from pydantic import Field

from pretrain.errors import InputError

# What is not trained: all but the head, or the embedding and so many blocks.
Freeze = Literal["body"] | Annotated[int, Field(ge=0)]


def depth_of(name: str, layers: int) -> int:
    """The depth of the parameter `name` of a VisionTransformer of so many layers."""
    module, *rest = name.split(".")
    if module == "blocks":
        return int(rest[0]) + 1
    if module == "norm":
        return layers + 1
    return layers + 2 if module in ("representation", "head") else 0


def frozen_depth(freeze: Freeze | None, layers: int) -> int:
    """The depth from which on a network of so many layers is trained; 0: all of it is.

    Raises:
        InputError: it has fewer blocks than are to be frozen.
    """
    if freeze is None:
        return 0
    if freeze == "body":
        return layers + 2
    if freeze > layers:
        raise InputError(f"train.freeze: found {freeze}, but this model has {layers} blocks; at most {layers} would do")
    return freeze + 1
