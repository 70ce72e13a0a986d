"""The tables of docs/planning.md: H/14 and L/16 on 8, 64 and 512 GPUs of two kinds.

python benchmarks/plans.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from pretrain.configfile import read_config
from pretrain.page.text import Table, bytes_text, number_text
from pretrain.plan.assumptions import Given, assume
from pretrain.plan.plan import Plan, make_plan
from pretrain.training.config import RunConfig

CONFIGS = ("h14.json", "l16.json")
MACHINES = (("h100", 80), ("a100", 40))
NODES = (1, 8, 64)  # of 8 GPUs
HEADER = (
    "config", "GPUs", "micro-batch (largest)", "GiB of a rank", "step", "images/s", "days", "GPU-hours",
    "communication, not hidden", "sent by a rank", "decoding cores of a node", "read", "requests/s", "stop",
)  # fmt: skip


def main() -> None:
    rows = [row(config, *machine, nodes) for config in CONFIGS for machine in MACHINES for nodes in NODES]
    print("\n".join(Table(HEADER, rows).markdown()))


def row(name: str, gpu: str, memory: int, nodes: int) -> tuple[str, ...]:
    """A line of the table."""
    config = read_config(RunConfig, name)
    job, cluster, assumed = assume(config, Given(nodes, 8, memory, gpu=gpu))
    return cells(name, gpu, memory, make_plan(job, cluster, assumed, config.train.micro_batch))


def cells(name: str, gpu: str, memory: int, plan: Plan) -> tuple[str, ...]:
    """What the table shows of a plan."""
    found, time, read, stop = plan.json(), plan.time, plan.reading, plan.stop
    assert time is not None
    assert read is not None
    assert stop is not None
    return (
        name,
        f"{plan.cluster.ranks} × {gpu.upper()} {memory} GB",
        f"{found['micro_batch']} ({found['largest_micro_batch']})",
        f"{found['per_rank_bytes']['total'] / 2**30:.1f}",
        f"{1e3 * time.total:,.0f} ms",
        number_text(read.images_per_second),
        number_text(found["run_hours"] / 24),
        number_text(found["gpu_hours"]),
        f"{100 * time.exposed / time.total:.0f} %",
        bytes_text(time.traffic.sent),
        number_text(read.cores / plan.cluster.nodes),
        f"{bytes_text(read.bytes_per_second)}/s",
        number_text(read.requests_per_second),
        f"{stop.grace:.1f} s",
    )


if __name__ == "__main__":
    main()
