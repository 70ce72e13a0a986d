"""DeepSpeed, imported and called without the messages that a user cannot act on.

Held back are accelerator detection, deprecated collectives inside DeepSpeed, a missing CUDA_HOME and the like.
VIT_FOUNDRY_VERBOSE=1 shows them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from pretrain.console import say

VERBOSE = os.environ.get("VIT_FOUNDRY_VERBOSE") == "1"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what libraries print, warn or log below ERROR inside the block; it is shown if the block fails."""
    if VERBOSE:
        yield
        return
    before, held = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(held), contextlib.redirect_stderr(held), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BaseException:
        say(held.getvalue(), to=sys.stderr, end="")
        raise
    finally:
        logging.disable(before)


with quiet():
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.config import DeepSpeedConfigError
    from deepspeed.runtime.utils import combine_grad_norm_groups
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup
    from torch.utils.cpp_extension import get_default_build_root  # warns of a missing CUDA when imported

    get_accelerator()

if not VERBOSE:
    # Raised step after step inside DeepSpeed's collectives and torch's checkpointing, never by this project.
    warnings.filterwarnings("ignore", module=r"(torch|deepspeed)(\..*)?$")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

__all__ = [
    "FWD_MODULE_STACK",
    "BF16_Optimizer",
    "DeepSpeedConfigError",
    "DeepSpeedZeroOptimizer",
    "GradPartitionBufferGroup",
    "PartitionedParameterCoordinator",
    "bf16_optimizer",
    "combine_grad_norm_groups",
    "deepspeed",
    "get_accelerator",
    "get_default_build_root",
    "quiet",
]
