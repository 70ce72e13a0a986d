"""What a config says of the optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pretrain.engine.schedule import AveragingSection
from pretrain.section import Section, key

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSection(Section):
    """AdamW (pre-training, Table 3) or SGD with momentum (fine-tuning, Table 4)."""

    name: Literal["adamw", "sgd"] = key("adamw", about="AdamW, or SGD with momentum.")
    lr: float = key(about="The learning rate at the end of the warm-up.", gt=0)
    betas: tuple[Beta, Beta] = key((0.9, 0.999), about="AdamW's decay of its two moments.")
    eps: float = key(1e-8, about="AdamW's addend to the denominator.", gt=0)
    momentum: float = key(0.9, about="SGD's momentum.", ge=0, lt=1)
    weight_decay: float = key(0.0, about="Decoupled weight decay with AdamW, L2 regularisation with SGD.", ge=0)
    decay: Literal["matrices", "all"] = key(
        "matrices",
        about="What is decayed: the kernels (no bias, norm, class token or position embedding), or all parameters.",
    )
    clip_norm: float = key(1.0, about="Global norm that gradients are clipped to; 0: no clipping.", ge=0)
    averaging: AveragingSection | None = key(
        None,
        about="The Polyak average of the weights; null: none is kept.",
        resume="stated",
        examples=[{"decay": 0.9999}],
    )
