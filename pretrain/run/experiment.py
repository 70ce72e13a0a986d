"""A run from its config to its last checkpoint: everything is checked, built, resumed, and handed to the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pretrain.engine import checkpoint, distributed
from pretrain.engine.distributed import World
from pretrain.engine.engine import Layout, batch_layout, build_engine, precision, zero_stage
from pretrain.engine.optimizer import build_optimizer
from pretrain.engine.restore import newest_whole, restore
from pretrain.engine.schedule import Averaging, Schedule
from pretrain.engine.stop import Stop
from pretrain.errors import InputError
from pretrain.model.initialization import initialize
from pretrain.model.vit import VisionTransformer, load_tensors
from pretrain.plan.flops import training_flops
from pretrain.plan.peak import peak_flops
from pretrain.run.audit import Audit
from pretrain.run.command import DONE, STOPPED
from pretrain.run.config import RunConfig
from pretrain.run.evaluation import Evaluator, Validation
from pretrain.run.folder import RunFolder
from pretrain.run.loss import choose_loss
from pretrain.run.meters import Meters
from pretrain.run.quarantine import Quarantine
from pretrain.run.resume import refuse_changes, trained_function
from pretrain.run.saver import Saver
from pretrain.run.trainer import train
from pretrain.stream.decode import HOST, DeviceDecoder
from pretrain.stream.images import TrainImages
from pretrain.stream.index import Index
from pretrain.stream.loader import TrainLoader
from pretrain.stream.mixup import check_pairs
from pretrain.stream.order import Order
from pretrain.stream.randaugment import RandAugment
from pretrain.weights.load import load_weights

_REMOTE_CHECKED = 64  # shards, spread over the index

Fill = Callable[[VisionTransformer], str]  # fills a new network's parameters; says where they come from


def run(
    config: RunConfig,
    out: Path,
    world: World,
    *,
    fill: Fill,
    evaluators: Sequence[Evaluator] = (),
    extend: bool = False,
) -> int:
    """Train as `config` says, in the run folder `out`: anew, or on from its newest whole checkpoint.

    Args:
        fill: gives a run that starts anew its parameters.
        evaluators: run beside validation.
        extend: allow a resumed run another length and schedule.

    Returns:
        the exit status: done, or stopped on request.

    Raises:
        InputError: config, data, layout and checkpoint do not go together.
    """
    folder = RunFolder(out)
    spec = config.model.spec()
    index = _open_index(config.data.train, "data.train", spec.num_classes, world)
    layout = batch_layout(config.train.global_batch, config.train.micro_batch, world.size)
    steps = run_steps(config, index.samples)
    schedule = Schedule(lr=config.optimizer.lr, steps=steps, **config.schedule.model_dump())
    order = Order(index.samples, layout.global_batch, config.seed, config.data.chunk, config.data.lanes)
    loss_of = choose_loss(config.train.loss, index.multilabel, config.train.label_smoothing)
    dtype = precision(config.deepspeed)
    data = config.data
    images = TrainImages(
        spec.image_size,
        spec.channels,
        config.seed,
        data.crop_area,
        data.crop_aspect,
        data.flip,
        RandAugment(*data.randaugment) if data.randaugment else None,
    )
    if data.mixup:
        check_pairs(layout.micro_batch)
    if data.decoder == "device":
        if world.device.type != "cuda":
            raise InputError(
                f'data.decoder: "device" decodes JPEGs on a CUDA device, this run is on {world.device.type}; set "host"'
            )
        distributed.together(DeviceDecoder(world.device).check)
    evaluators = [*validation(config, world, layout), *evaluators]
    function = trained_function(config, steps, dtype)

    saved, passed_over = newest_whole(folder.checkpoints, world)
    start = 0
    if saved is None and passed_over:
        raise InputError(
            f"{out}: holds checkpoints, but none that can be read: {'; '.join(passed_over.values())}. Mend or remove "
            "them, or give another --out to start anew"
        )
    if saved is not None:
        refuse_changes(saved, function, extend=extend)
        start = order.check(saved.state["stream"], index.hash)  # the same on every rank, as their indices are
    if start >= steps:
        _say(
            world, f"{out}: finished at step {start} of {steps}; nothing to do (set train.steps and --extend to go on)"
        )
        return DONE

    distributed.together(folder.create)

    with ExitStack() as stack:
        stop = Stop(out, world, config.train.time_limit_minutes)
        model = VisionTransformer(spec, config.train.activation_checkpointing, config.train.compile)
        origin = distributed.together(lambda: fill(model)) if saved is None else f"resumed from {saved.path}"
        optimizer = build_optimizer(
            model,
            lr=config.optimizer.lr,
            **config.optimizer.model_dump(exclude={"lr", "clip_norm", "averaging"}),
            averages=config.optimizer.averaging is not None,
        )
        engine = build_engine(model, optimizer, config.deepspeed, layout, config.optimizer.clip_norm)
        if saved is not None:
            restore(engine, saved)
        if world.main:
            folder.write_config(
                {
                    **config.model_dump(mode="json"),
                    "train": {**config.train.model_dump(), "steps": steps, "epochs": None},
                }
            )
            folder.rewind(start)
            checkpoint.set_aside(passed_over)
            checkpoint.clear_partial(folder.checkpoints)
        distributed.barrier()

        for fault in passed_over.values():
            _say(world, f"passed over: {fault}")
        _say(world, _headline(config, index, layout, world, steps, start, origin, dtype))
        loader = stack.enter_context(
            TrainLoader(
                index,
                order,
                images,
                micro_batch=layout.micro_batch,
                rank=world.rank,
                world=world.size,
                workers=data.workers,
                start_step=start,
                stop_step=steps,
                read_ahead=data.read_ahead_mib << 20,
                mixup=data.mixup,
                mask_chunks=True,  # the quarantine ends the run, on all ranks together
                give_up=data.unreadable_chunks == "stop",
                pin=world.device.type != "cpu",
                floats=world.device.type == "cpu",  # an accelerator is sent bytes, a quarter of them
                decoder=DeviceDecoder(world.device) if data.decoder == "device" else HOST,
            )
        )
        audit = Audit(folder, world.rank, data.audit)
        stack.callback(audit.close)
        peak = config.logging.peak_tflops
        quarantine = Quarantine(
            folder,
            index,
            world,
            global_batch=layout.global_batch,
            max_unreadable=data.max_unreadable,
            chunks=data.unreadable_chunks == "quarantine",
        )
        meters = Meters(
            folder,
            world,
            start=start,
            steps=steps,
            every=config.logging.every,
            global_batch=layout.global_batch,
            samples=index.samples,
            flops_per_image=training_flops(spec),
            peak_flops=peak * 1e12 if peak else peak_flops(world.device, dtype),
            tensorboard=config.logging.tensorboard,
            counters=loader.counters,
        )
        stack.callback(meters.close)
        saver = Saver(
            engine,
            folder,
            world,
            lambda done: {"stream": order.state(index.hash, done), "model": asdict(spec), "function": function},
            **config.checkpoint.model_dump(),
            flush=lambda: folder.sync(world.rank),
        )
        finished = train(
            engine,
            iter(loader),
            loss_of,
            schedule,
            Averaging(**config.optimizer.averaging.model_dump()) if config.optimizer.averaging else Averaging(),
            layout,
            start=start,
            seed=config.seed,
            world=world,
            dtype=dtype,
            meters=meters,
            audit=audit,
            quarantine=quarantine,
            evaluators=evaluators,
            saver=saver,
            stop=stop,
        )
        if not finished:
            _say(world, f"stopped: {stop.reason}; run the same command again to go on")
            stop.done()
        return DONE if finished else STOPPED


def run_steps(config: RunConfig, samples: int) -> int:
    """`train.steps`, or round(epochs · samples / global batch)."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    steps = round(config.train.epochs * samples / config.train.global_batch)
    if steps < 1:
        raise InputError(
            f"train.epochs: {config.train.epochs} of {samples} samples in batches of {config.train.global_batch} is no "
            "whole step; train longer, or set a smaller train.global_batch"
        )
    return steps


def fresh(config: RunConfig) -> Fill:
    """Parameters drawn from the config's seed."""

    def fill(model: VisionTransformer) -> str:
        initialize(model, config.seed, head_bias=config.model.head_bias)
        return f"initialised with seed {config.seed}"

    return fill


def given(path: str | Path) -> Fill:
    """The parameters of given weights, which must be of the same network; read when they are needed."""

    def fill(model: VisionTransformer) -> str:
        weights = load_weights(path)
        load_tensors(model, weights.tensors, where=str(weights.source))
        return f"weights of {weights.source}"

    return fill


def validation(config: RunConfig, world: World, layout: Layout) -> list[Evaluator]:
    """Validation on `data.eval`, if it is set."""
    if config.data.eval is None:
        return []
    index = _open_index(config.data.eval, "data.eval", config.model.num_classes, world)
    return [
        Validation(
            index,
            choose_loss(config.train.loss, index.multilabel),
            world,
            image_size=config.model.image_size,
            channels=config.model.channels,
            batch=layout.micro_batch,
            workers=config.data.workers,
            dtype=precision(config.deepspeed),
            every=config.train.eval_every,
        )
    ]


def _open_index(paths: str | tuple[str, ...] | None, key: str, num_classes: int, world: World) -> Index:
    """The index that a config key names, its shards in place and its labels within the network's classes. Collective.

    Every node has a file of its own, and a stale copy on one would train on other samples: all must hold the same.
    """
    if paths is None:
        raise InputError(
            f"{key}: not set; give a folder of shards with its index, as made by "
            f"`python launch/shards.py build SOURCE DIR`, e.g. {key}=DIR"
        )

    def open_here() -> Index:
        index = Index.open(paths)
        # One rank a node asks for every local shard, one rank of all for some of the remote ones: a thousand ranks that
        # ask for 10⁵ each are an attack on the storage. What has changed since is found when it is read.
        index.check_files(local=None if world.local_rank == 0 else 0, remote=_REMOTE_CHECKED if world.main else 0)
        if index.num_classes > num_classes:
            raise InputError(
                f"{key}: {paths} has labels up to {index.num_classes - 1}, model.num_classes {num_classes} allows up "
                f"to {num_classes - 1}; set model.num_classes={index.num_classes}"
            )
        return index

    index = distributed.together(open_here)
    distributed.refuse_unlike(index.hash, f"{key}: the index")
    return index


def _headline(
    config: RunConfig, index: Index, layout: Layout, world: World, steps: int, start: int, origin: str, dtype: Any
) -> str:
    spec = config.model.spec()
    return "\n".join(
        [
            f"{config.name}: {spec.describe()}; {origin}",
            f"data: {index.samples:,} samples in {len(index.shards):,} shards; "
            f"steps {start:,} to {steps:,}, {steps * layout.global_batch / index.samples:.4g} epochs",
            f"batch {layout.global_batch} = {layout.ranks} ranks × {layout.accumulation} accumulation × micro-batch "
            f"{layout.micro_batch}; {str(dtype).removeprefix('torch.')}, ZeRO {zero_stage(config.deepspeed)}, "
            f"{world.device.type}",
        ]
    )


def _say(world: World, text: str) -> None:
    if world.main:
        print(text, flush=True)
