"""What several rooms' tests need: small shards of real images, and commands run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, str]:
    """One thread a process: the ranks and threads under test share two cores."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = f"{Path(sys.executable).parent}:{kept['PATH']}"
    return {**kept, "OMP_NUM_THREADS": "1", "PATH": path, "DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="session")
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command from the repository's root: words in, status and both outputs out."""

    def run(*words: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(word) for word in words],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory, run: Callable[..., subprocess.CompletedProcess[str]]) -> Path:
    """Shards of scikit-learn's digits: `train` (8×8 grey, 10 classes) and `test`."""
    folder = tmp_path_factory.mktemp("digits")
    for split in ("train", "test"):
        done = run(sys.executable, "launch/shards.py", "build", "digits", folder / split, "--split", split)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def ranks() -> Callable[..., None]:
    """Run a Python script as `count` ranks of one process group; any rank that fails fails the test with its words."""

    def ranks(count: int, script: Path, *words: object, timeout: float = 300) -> None:
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        place = {
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": str(ROOT),
        }
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), *map(str, words)],
                cwd=ROOT,
                env={**environment(), **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(count)
        ]
        try:
            said: Sequence[str] = [process.communicate(timeout=timeout)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert all(process.returncode == 0 for process in processes), "\n".join(said)

    return ranks
