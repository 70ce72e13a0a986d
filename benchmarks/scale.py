"""A large run on paper: what 8 to 1,024 ranks ask of data, network, storage and files, and which of it breaks first.

    python benchmarks/scale.py [--ranks 8 64 512 1024] [--samples 300000000] [--config h14.json] [--gpu h100]

Simulated with the run's own code (benchmarks/simulated.py): an index of so many samples is written whole (12 bytes
each) and checked as a start does; the reader of every rank is driven through a window of steps over it; a checkpoint's
files are written; the store at which ranks meet is asked. Step times and communication are the planner's
(pretrain/plan), for nodes of eight devices. What is demanded is divided by what there is (the options below): 1 is the
limit. docs/scale.md explains the table. Figures: runs/bench/scale.json.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import tempfile
from dataclasses import asdict, dataclass, replace

import torch

from benchmarks.simulated import (
    Reads,
    audit_line_bytes,
    checkpoint_files,
    order_seconds,
    reads,
    resume_seconds,
    seconds,
    start_checks,
    store_requests_per_second,
)
from benchmarks.stream import in_a_fresh_process
from benchmarks.table import print_table, save
from benchmarks.vast import write_whole_index
from pretrain.configfile import read_config
from pretrain.engine.layout import batch_layout
from pretrain.index.index import Index
from pretrain.plan.fit import with_stage
from pretrain.plan.hardware import hardware
from pretrain.plan.job import Cluster, Job
from pretrain.plan.memory.host import host_memory
from pretrain.plan.memory.rank import rank_memory
from pretrain.plan.memory.states import optimized
from pretrain.plan.peak import listed
from pretrain.plan.reading import DECODE_MS, checkpoint_bytes
from pretrain.plan.seconds import Pace, StepTime, assumed_mfu, step_time
from pretrain.stream.order import Order
from pretrain.training.config import RunConfig

DEVICES = 8  # of a node
GIB = 1 << 30
DAY = 86_400
_START = 60.0  # seconds that the checks of a start may take
METRICS_LINE = 1_100  # bytes of a line of metrics.jsonl

# What would help, where a demand is above its limit.
REMEDIES = {
    "communication": "a larger train.global_batch (with its own learning rate), or fewer ranks; "
    "deepspeed.communication_data_type=bf16, deepspeed.zero_optimization.overlap_comm=true; no stage 3 without need",
    "requests for data": "a larger data.chunk in a new run: requests fall with it; or several prefixes",
    "bytes of data": "smaller images in the shards, or a copy of them on the nodes",
    "decode threads": "images stored at the size that is trained on, or fewer devices a host",
    "read-ahead": "the data.read_ahead_mib that the start names, or fewer data.lanes in a new run",
    "device memory": "what launch/plan.py names",
    "host memory": "fewer data.lanes in a new run, checkpoint.background=false",
    "saving": "a longer checkpoint.every_minutes, or a faster file system",
    "files of a save": "a longer checkpoint.every_minutes: each rank writes two files",
    "start": "a faster file system for checkpoints; indices without what is not trained on, as each host hashes all",
    "audit": "data.audit=false, or a file system on the nodes: each rank appends a line a step",
}


@dataclass(frozen=True)
class Supply:
    """What there is."""

    requests: float  # a second, of the store of the data (S3: 5,500 GETs a second and prefix, by its documentation)
    storage: float  # bytes/s that a node takes from the store of the data
    cores: int  # of a node
    host_memory: float  # bytes of a node
    device_memory: float
    run_folder: float  # bytes/s of the run folder's file system, all ranks together
    operations: float  # a second of that file system: files made, lines appended


@dataclass(frozen=True)
class Size:
    """A run on so many ranks: simulated reads, planned step, and demand ÷ supply by what is asked for."""

    ranks: int
    micro_batch: int
    step: StepTime
    reads: Reads
    requests_per_second: float
    bytes_per_second: float
    records_per_day: dict[str, float]  # bytes
    files: dict[str, float]
    loads: dict[str, float]

    def worst(self) -> tuple[str, float]:
        """What is nearest to its limit, or furthest beyond."""
        return max(self.loads.items(), key=lambda load: load[1])


def main() -> None:
    args = arguments()
    config = read_config(RunConfig, args.config, args.overrides)
    supply = Supply(
        args.requests, args.node_gbs * 1e9, args.cores, args.host_gib * GIB, args.device_gib * GIB,
        args.run_folder_gbs * 1e9, args.operations,
    )  # fmt: skip
    batch = config.train.global_batch
    order = Order(args.samples, batch, seed=0, chunk=config.data.chunk, lanes=config.data.lanes)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "index.vfi"
        written = seconds(lambda: write_whole_index(path, args.samples))
        start = in_a_fresh_process(start_checks, path) | {"write": written, "bytes": path.stat().st_size}
        show_start(start, args.samples)
        index = Index.open(path)
        sizes = [simulate(config, order, index, ranks, args.gpu, supply, start) for ranks in args.ranks]
        wider = reads(replace(order, chunk=4 * order.chunk, lanes=None), index, args.ranks[-1], read_ahead(config))
    show_order(order, args.ranks)
    show_reads(sizes)
    communicated = {ranks: communication(config, ranks, args.gpu) for ranks in args.ranks}
    show_communication(communicated)
    show_records(sizes)
    store = store_requests_per_second()
    print(
        f"\nthe store at which ranks meet answers {store:,.0f} requests a second here; {args.ranks[-1]:,} ranks ask it"
    )
    print(f"{args.ranks[-1] // DEVICES * args.ranks[-1]:,} when one of each host looks for who is missing, after 10 s")
    show_loads(sizes)
    verdict = first_to_break(sizes)
    print("\n" + "\n".join(verdict))
    save(
        "scale",
        {
            "config": args.config,
            "start": start,
            "sizes": [asdict(size) for size in sizes],
            "four_times_the_chunk": asdict(wider),
            "communication": {
                str(ranks): {stage: asdict(time) for stage, time in found.items()}
                for ranks, found in communicated.items()
            },
            "store_requests_per_second": store,
            "supply": asdict(supply),
            "verdict": verdict,
        },
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512, 1024])
    parser.add_argument("--samples", type=int, default=300_000_000)
    parser.add_argument("--config", default="h14.json")
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--requests", type=float, default=5_500, help="a second, of the store of the data")
    parser.add_argument("--node-gbs", type=float, default=10, help="GB/s that a node takes from that store")
    parser.add_argument("--cores", type=int, default=96, help="of a node")
    parser.add_argument("--host-gib", type=float, default=1024, help="memory of a node")
    parser.add_argument("--device-gib", type=float, default=79, help="memory of a device")
    parser.add_argument("--run-folder-gbs", type=float, default=2, help="GB/s that the run folder takes")
    parser.add_argument("--operations", type=float, default=5_000, help="files or lines a second that it takes")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    return parser.parse_intermixed_args()


def read_ahead(config: RunConfig) -> int:
    return config.data.read_ahead_mib << 20


def job_on(config: RunConfig, ranks: int) -> Job:
    """The config's job on so many ranks; a micro-batch is not more than a rank's images."""
    train = config.train
    micro = min(train.micro_batch or train.global_batch, train.global_batch // ranks)
    layout = batch_layout(train.global_batch, micro, ranks)
    return config.job(layout, torch.bfloat16, device="cuda", steps=None)


def timed(job: Job, gpu: str) -> StepTime:
    """The planner's step on nodes of eight."""
    kind, ranks = hardware(gpu), job.layout.ranks
    peak = listed(kind.driver_name, torch.bfloat16)
    assert peak is not None
    cluster = Cluster(max(ranks // DEVICES, 1), min(ranks, DEVICES), 0, peak, kind.driver_name)
    pace = Pace(assumed_mfu(job) * peak, kind.memory_bandwidth, kind.host_link, kind.fabric)
    return step_time(job, cluster, optimized(job).values, pace)


def communication(config: RunConfig, ranks: int, gpu: str) -> dict[str, StepTime]:
    """A step under each stage."""
    job = job_on(config, ranks)
    found = {}
    for stage in range(4):
        staged = with_stage(job, stage) or with_stage(replace(job, dtype=torch.float32), stage)
        assert staged is not None
        # DeepSpeed has no stage 0 in half precision; its traffic is that of data parallelism, to compare with.
        found[f"ZeRO {stage}"] = timed(replace(staged, dtype=torch.bfloat16), gpu)
    return found


def simulate(
    config: RunConfig, order: Order, index: Index, ranks: int, gpu: str, supply: Supply, start: dict[str, float]
) -> Size:
    """One size of the run."""
    job = job_on(config, ranks)
    step, found = timed(job, gpu), reads(order, index, ranks, read_ahead(config))
    nodes, devices = max(ranks // DEVICES, 1), min(ranks, DEVICES)
    images = order.global_batch / step.total
    requests = images * found.requests_per_image
    data = images * found.amplification * index.bytes / index.samples
    files = checkpoint_files(ranks)
    saved = checkpoint_bytes(job, optimized(job).values)
    minutes = config.checkpoint.every_minutes or 30
    memory = host_memory(job, Cluster(nodes, devices, 0, None))
    held = 2 * devices * found.held_bytes  # its blocks are powers of two
    steps_a_day = DAY / step.total
    lanes = order.lane_count * order.chunk / ranks * index.bytes / index.samples
    checks = start["open"] + start["files"] + start["content"] + start["distinct"] + start["histogram"]
    return Size(
        ranks,
        job.layout.micro_batch,
        step,
        found,
        requests,
        data,
        {
            "audit": steps_a_day * ranks * audit_line_bytes(order, ranks),
            "metrics": steps_a_day / config.logging.every * METRICS_LINE,
        },
        files,
        {
            "communication": step.exposed / step.compute,
            "requests for data": requests / supply.requests,
            "bytes of data": data / nodes / supply.storage,
            "decode threads": images / nodes * DECODE_MS / 1e3 / supply.cores,
            "read-ahead": lanes / read_ahead(config),
            "device memory": rank_memory(job).total / supply.device_memory,
            "host memory": (memory.total - memory.read_ahead + held + start["bytes"]) / supply.host_memory,
            "saving": saved / supply.run_folder / (60 * minutes),
            "files of a save": files["files"] / supply.operations / (60 * minutes),
            "start": (checks + saved / supply.run_folder) / _START,
            "audit": ranks / step.total / supply.operations if config.data.audit else 0.0,
        },
    )


def first_to_break(sizes: list[Size]) -> list[str]:
    """At each size what is nearest to its limit; then what is beyond it first, and what would help."""
    lines = []
    broken: dict[str, int] = {}
    for size in sizes:
        name, load = size.worst()
        lines.append(f"{size.ranks:,} ranks: {name} is at {load:.2g} of its limit" + (": breaks" if load > 1 else ""))
        for what, found in size.loads.items():
            if found > 1:
                broken.setdefault(what, size.ranks)
    for what, ranks in sorted(broken.items(), key=lambda found: found[1]):
        lines.append(f"beyond its limit from {ranks:,} ranks on: {what}; change: {REMEDIES[what]}")
    if not broken:
        lines.append("nothing is beyond its limit")
    return lines


def show_start(found: dict[str, float], samples: int) -> None:
    print_table(
        f"The start of a run over {samples:,} samples: its index, and the checks of a start",
        ["", ""],
        [
            ["index, GB", f"{found['bytes'] / 1e9:.2f}"],
            ["to write it, s", f"{found['write']:.0f}"],
            ["to open it, ms", f"{1e3 * found['open']:.1f}"],
            ["to hash it, one rank a host, s", f"{found['content']:.1f}"],
            ["to look for samples that are there twice, s", f"{found['distinct']:.2f}"],
            ["to list its shards and choose those asked for, s", f"{found['files']:.2f}"],
            ["requests for shards, of all ranks together", f"{found['requests']:.0f}"],
            ["histogram of classes, rank 0, s", f"{found['histogram']:.1f}"],
            ["memory once opened, MiB", f"{found['memory_opened'] / 2**20:.1f}"],
            ["memory once checked (the file's pages, of a host), MiB", f"{found['memory_checked'] / 2**20:,.0f}"],
        ],
    )


def show_order(order: Order, ranks: list[int]) -> None:
    rows = [
        [
            f"{count:,}",
            f"{1e3 * order_seconds(order, count):.2f}",
            *(f"{1e3 * resume_seconds(order, count, part):.1f}" for part in (0.01, 0.5, 0.99)),
        ]
        for count in ranks
    ]
    print_table("Order", ["ranks", "a rank's ids of a step, ms", "resume at 1 %, ms", "50 %", "99 %"], rows)


def show_reads(sizes: list[Size]) -> None:
    rows = [
        [
            f"{size.ranks:,}",
            f"{size.reads.open_chunks:,}",
            f"{size.reads.held_bytes / 2**20:,.0f}",
            f"{size.reads.first_bytes / 2**20:,.0f}",
            f"{size.reads.requests_per_image:.4f}",
            f"{size.requests_per_second:,.0f}",
            f"{size.bytes_per_second / 1e9:.1f}",
            f"{size.reads.amplification:.4f}",
            f"{size.reads.ranks_uneven:.3f}",
            f"{size.reads.steps_uneven:.3f}",
            f"{size.reads.shards_at_once:,}",
        ]
        for size in sizes
    ]
    header = ["ranks", "open chunks", "held, MiB", "before step 1", "requests an image", "requests/s", "GB/s"]
    header += ["bytes ÷ samples'", "rank, most ÷ mean", "step, most ÷ mean", "shards at once"]
    print_table("Reading, a rank's and all ranks'", header, rows)


def show_communication(found: dict[int, dict[str, StepTime]]) -> None:
    rows = [
        [
            f"{ranks:,}", stage, f"{1e3 * time.compute:.1f}", f"{time.traffic.sent / 1e9:.2f}",
            f"{1e3 * time.traffic.seconds:.1f}", f"{1e3 * time.exposed:.1f}", f"{1e3 * time.total:.1f}",
        ]
        for ranks, stages in found.items()
        for stage, time in stages.items()
    ]  # fmt: skip
    header = ["ranks", "", "compute, ms", "sent by a rank, GB", "communication, ms", "of it not hidden", "step"]
    print_table("A step's communication, planned", header, rows, names=2)


def show_records(sizes: list[Size]) -> None:
    rows = [
        [
            f"{size.ranks:,}",
            f"{size.files['files']:,.0f}",
            f"{1e3 * size.files['rank']:.1f}",
            f"{1e3 * size.files['commit']:.0f}",
            f"{1e3 * size.files['read']:.0f}",
            f"{size.files['state_bytes'] / 2**20:.2f}",
            f"{size.records_per_day['metrics'] / 1e6:.1f}",
            f"{size.records_per_day['audit'] / 1e9:.1f}",
            f"{size.ranks / size.step.total:,.0f}",
        ]
        for size in sizes
    ]
    header = ["ranks", "files of a checkpoint", "a rank's, ms", "commit, ms", "sizes checked, ms", "state.json, MiB"]
    header += ["metrics, MB a day", "audit, GB a day", "audit lines/s"]
    print_table("Files", header, rows)


def show_loads(sizes: list[Size]) -> None:
    names = list(sizes[0].loads)
    rows = [[name, *(f"{size.loads[name]:.3f}" for size in sizes)] for name in names]
    print_table("Demand ÷ supply", ["", *(f"{size.ranks:,} ranks" for size in sizes)], rows)


if __name__ == "__main__":
    main()
