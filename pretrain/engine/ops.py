"""DeepSpeed's C++ ops: compiled once a machine, announced, and never left locked."""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TextIO

from pretrain.console import say
from pretrain.engine.quiet import get_accelerator, get_default_build_root, quiet
from pretrain.errors import InputError
from pretrain.ranks.launcher import local_rank

_WORTH_A_WORD = 10.0  # seconds: the ranks of a host that find the ops compiled have had their turns by then
# The op that DeepSpeed's communication layer builds as it starts on a CPU host; none is needed elsewhere.
_BUILDER, _NAME = "ShareMemCommBuilder", "deepspeed_shm_comm"


def compile_ops() -> None:
    """Compile what DeepSpeed needs on this host, if that has not been done; the ranks of a host take turns.

    torch guards a build by a plain file, which a killed process leaves behind and every later run then waits for. The
    turns are kept by a lock that dies with its holder, so that a file found by the holder is stale and is removed.

    Raises:
        InputError: no C++ compiler or no ninja, and something must be compiled.
    """
    if get_accelerator().device_name() != "cpu":
        return
    # One ninja, this interpreter's own: another version rebuilds what the first has built, at every change of shell.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "vit_foundry.lock", "w") as turn:
        _take(turn)
        if not any(root.glob(f"**/{_NAME}/{_NAME}.so")):
            _need_tools()
            say("DeepSpeed compiles its CPU ops once for this machine; about a minute …", to=sys.stderr)
        for stale in root.glob(f"**/{_NAME}/lock"):
            stale.unlink()
        with quiet():
            get_accelerator().create_op_builder(_BUILDER).load()


def _take(turn: TextIO) -> None:
    """Wait for this rank's turn, and say so where it takes long: another host may have it."""
    told = time.monotonic() + _WORTH_A_WORD
    while True:
        try:
            fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:  # a file system without locks: ranks that build at once wait for one another's plain file
            return
        if time.monotonic() > told and local_rank(os.environ) == 0:
            say(f"waiting for another process to compile DeepSpeed's CPU ops ({turn.name} is locked) …", to=sys.stderr)
            told = math.inf


def _need_tools() -> None:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise InputError(
            f"DeepSpeed compiles C++ ops, and there is no {compiler!r}: install g++ (Debian: apt-get install g++)"
        )
    if shutil.which("ninja") is None:
        raise InputError("DeepSpeed compiles C++ ops, and there is no ninja on PATH: pip install ninja")
