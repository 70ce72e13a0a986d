"""A run from its config to its last checkpoint: everything is checked, built, resumed, and handed to the loop."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from math import ceil, log2
from pathlib import Path
from typing import Any

from pretrain.checkpoint import folder as checkpoints
from pretrain.checkpoint.step import Checkpoint
from pretrain.console import say
from pretrain.engine.engine import build_engine
from pretrain.engine.fragments import values_held
from pretrain.engine.guards import DivergedError, Guard, RollBack
from pretrain.engine.optimizer import build_optimizer
from pretrain.engine.restore import restore
from pretrain.engine.schedule import Averaging
from pretrain.errors import InputError, StorageError
from pretrain.images.decode import HOST, DeviceDecoder
from pretrain.model.initialization import initialize
from pretrain.model.vit import VisionTransformer
from pretrain.plan.flops import training_flops
from pretrain.plan.peak import peak_flops, unlisted
from pretrain.progress import Progress
from pretrain.ranks import collectives
from pretrain.ranks.collectives import World
from pretrain.ranks.stop import Stop
from pretrain.ranks.watchdog import Watchdog
from pretrain.record.audit import Audit
from pretrain.record.claim import claimed
from pretrain.record.folder import RunFolder
from pretrain.record.inspection import Inspection
from pretrain.record.meters import Meters
from pretrain.record.quarantine import Quarantine
from pretrain.run.command import DONE, STOPPED
from pretrain.run.config import TrainingConfig
from pretrain.run.evaluation import Evaluator, due
from pretrain.run.origin import Init, beginning, check_origin, describe, refuse_unreadable
from pretrain.run.resume import check_changes
from pretrain.run.saver import Saver
from pretrain.run.setup import Setup, prepare
from pretrain.run.trainer import train
from pretrain.stream.loader import LoaderOptions, TrainLoader
from pretrain.weights.fill import Fill, load_same
from pretrain.weights.load import read_weights


def run(
    recipe: TrainingConfig,
    out: Path,
    world: World,
    *,
    init: Init | None = None,
    fill: Fill = load_same,
    evaluators: Sequence[Callable[[], Evaluator]] = (),
    extend: bool = False,
) -> int:
    """Train as `recipe` says, in the run folder `out`: anew, or on from its newest whole checkpoint.

    Args:
        init: the weights that a run which starts anew begins from; None: drawn from the seed. A run that is resumed
            must have begun from the same.
        fill: puts them into the network.
        evaluators: make those that run beside validation; called on all ranks together, once the data are opened.
        extend: allow a resumed run another length and schedule.

    Returns:
        the exit status: done; or stopped with a checkpoint, on request or by storage that does not answer.

    Raises:
        InputError: config, data, layout and checkpoint do not go together.
        DivergedError: training went wrong.
    """
    folder = RunFolder(out)
    try:
        chosen, network = beginning(folder, init, needed=recipe.needs_weights)
        setup = prepare(recipe, network, folder, world, evaluators)
        collectives.together(folder.create)
        with claimed(out, world):
            return _go(setup, init, chosen, fill, extend)
    except StorageError as error:
        if not collectives.broadcast_object(world.main and _begun(folder)):
            raise
        _say(world, f"stopped: {error}; once the storage answers, run the same command again to go on")
        return STOPPED


def _go(setup: Setup, init: Init | None, chosen: Checkpoint | None, fill: Fill, extend: bool) -> int:
    config, world, folder, out = setup.config, setup.world, setup.folder, setup.folder.path
    saved, passed_over = checkpoints.newest_verified(folder.checkpoints)
    start, steps = 0, setup.schedule.steps
    resumed: list[str] = []  # what is to be said of a run that is
    if saved is None:
        refuse_unreadable(folder, passed_over)
        if chosen is None and (init or setup.recipe.needs_weights):  # there was a checkpoint a moment ago
            raise InputError(f"{out}: its checkpoints were removed while this run started; give the command again")
        setup = replace(setup, origin=init.origin(chosen) if init and chosen else {"seed": config.seed})
    else:
        check_origin(saved, init)
        setup = replace(setup, origin=saved.state.get("origin"))
        notes = check_changes(saved, config, setup.resolved, extend=extend)
        stream, index = saved.state["stream"], setup.index
        start = setup.order.check(stream, index.hash, index.sequence)  # the same on every rank, as indices are
        if stream["index_hash"] != index.hash:
            notes += ["note: the run recorded no content of its shards; whether these are the same images is not known"]
        resumed = [f"resumed from {saved.path}", f"began from {describe(setup.origin)}", *notes]
    if start > steps or (start == steps and not missed(setup, start)):
        length = f"of {steps}" if start == steps else f"already, beyond step {steps}"
        _say(
            world, f"{out}: finished at step {start} {length}; nothing to do (--extend with more train.steps trains on)"
        )
        return DONE
    minutes = config.train.hang_minutes, config.train.slow_minutes
    with Watchdog(out, world, hang=60 * minutes[0], slow=60 * minutes[1]) as watchdog:
        stop = Stop(out, world, config.train.time_limit_minutes)
        guard = Guard(config.train.guard)
        engine, said = build(setup, None if saved else partial(parameters, setup, init, chosen, fill))
        if saved is not None:
            go_on(engine, guard, saved, world)
        begin(setup, start, passed_over)
        _say(world, _headline(setup, start, "\n".join(resumed) or said))
        while True:
            try:
                finished = attempt(setup, engine, guard, stop, watchdog, start)
                break
            except RollBack as back:
                _say(world, str(back))
                watchdog.beat(back.first, "start")
                start = roll_back(setup, engine, guard, back)
    if not finished:
        _say(world, f"stopped: {stop.reason}; run the same command again to go on")
    stop.done()
    return DONE if finished else STOPPED


def _begun(folder: RunFolder) -> bool:
    """Whether there is a checkpoint to go on from. There may be, where the folder does not answer either."""
    try:
        return bool(checkpoints.list_checkpoints(folder.checkpoints))
    except OSError:
        return True


def missed(setup: Setup, step: int) -> bool:
    """Whether an evaluation is due after `step` steps of which `metrics.jsonl` does not tell. Collective."""
    told = collectives.on_main(lambda: setup.folder.evaluated(step))
    return not told and bool(due(setup.evaluators, step, last=step == setup.schedule.steps))


def begin(setup: Setup, start: int, passed_over: dict[Path, str]) -> None:
    """Have the run folder say what is to be trained, and hold nothing of what came after step `start`. Collective."""
    config, folder, world = setup.config, setup.folder, setup.world

    def record() -> None:
        if world.main:
            said = {**setup.recipe.model_dump(mode="json"), "train": setup.resolved["train"]}
            folder.write_config({**said, "network": asdict(config.model.spec()), "origin": setup.origin})
            checkpoints.set_aside(passed_over)
            checkpoints.update_latest(folder.checkpoints)
            checkpoints.remove_partial(folder.checkpoints)
        folder.rewind(start, world.rank, world.size)

    collectives.together(record)
    for fault in passed_over.values():
        _say(world, f"passed over: {fault}")


def build(setup: Setup, fill: Callable[[VisionTransformer], str] | None) -> tuple[Any, str]:
    """The network in its engine, and what `fill` says of its parameters, which it sets. Collective.

    fill: None where a checkpoint will.
    """
    config = setup.config
    model = VisionTransformer(config.model.spec(), config.train.activation_checkpointing, config.train.compile)
    said = collectives.together(lambda: fill(model)) if fill else ""
    optimizer = build_optimizer(model, config.optimizer)
    return build_engine(model, optimizer, config.deepspeed, setup.layout, config.optimizer.clip_norm), said


def parameters(setup: Setup, init: Init | None, chosen: Checkpoint | None, fill: Fill, model: VisionTransformer) -> str:
    """Set those of a run that begins now: the weights of the checkpoint `chosen`, or drawn from the seed."""
    if init is None or chosen is None:
        initialize(model, setup.config.seed, head_bias=setup.config.model.head_bias)
        details = ""
    else:
        details = fill(model, read_weights(chosen, averaged=init.averaged))
    return f"from {describe(setup.origin)}" + (f"\n{details}" if details else "")


def go_on(engine: Any, guard: Guard, saved: Checkpoint, world: World) -> None:
    """Make engine and guard what they were when `saved` was. Collective."""
    with Progress("loading the checkpoint", "values", values_held(engine)) as progress:
        restore(engine, saved, progress.advance if world.main else lambda values: None)
    guard.restore(saved.state["guard"])


def roll_back(setup: Setup, engine: Any, guard: Guard, back: RollBack) -> int:
    """Go back to a checkpoint before the steps that `back` avoids; the number of its steps. Collective.

    Raises:
        DivergedError: there is none.
    """
    folder, world = setup.folder, setup.world
    found = checkpoints.list_on_main(folder.checkpoints)
    early = [path for path in found if path <= checkpoints.step_path(folder.checkpoints, back.first)]
    saved, _ = checkpoints.newest_verified(folder.checkpoints, [*early, *found[-1:]][0]) if found else (None, {})
    if saved is None:
        raise DivergedError(f"{back}, but there is no checkpoint to go back to")
    go_on(engine, guard, saved, world)
    late = f", the oldest there is: it has been trained on steps from {back.first + 1} on" if not early else ""
    _say(world, f"went back to {saved.path}{late}")
    if world.main:
        checkpoints.remove_after(folder.checkpoints, saved.step)
    collectives.together(lambda: folder.rewind(saved.step, world.rank, world.size))
    return saved.step


def attempt(setup: Setup, engine: Any, guard: Guard, stop: Stop, watchdog: Watchdog, start: int) -> bool:
    """Train from step `start` on: what `train` returns and raises."""
    config, world, folder, data = setup.config, setup.world, setup.folder, setup.config.data
    with ExitStack() as stack:
        loader = stack.enter_context(
            TrainLoader(
                setup.index,
                setup.order,
                setup.images,
                LoaderOptions(
                    world.rank,
                    world.size,
                    data.workers,
                    data.read_ahead_mib << 20,
                    # Masked in either case: the quarantine ends the run, on all ranks together.
                    unreadable_chunks="stop" if data.unreadable_chunks == "stop" else "mask",
                    pin=world.device.type != "cpu",
                    floats=world.device.type == "cpu",  # an accelerator is sent bytes, a quarter of them
                    decoder=DeviceDecoder(world.device) if data.decoder == "device" else HOST,
                    timeouts=data.timeouts(),
                ),
                micro_batch=setup.layout.micro_batch,
                start_step=start,
                stop_step=setup.schedule.steps,
                mixup=data.mixup,
            )
        )
        audit = collectives.together(lambda: Audit(folder, world.rank, data.audit))
        stack.callback(audit.close)
        quarantine = Quarantine(
            folder,
            setup.index,
            world,
            global_batch=setup.layout.global_batch,
            max_unreadable=data.max_unreadable,
            chunks=data.unreadable_chunks == "quarantine",
        )
        peak = config.logging.peak_tflops
        meters = Meters(
            folder,
            world,
            start=start,
            steps=setup.schedule.steps,
            every=config.logging.every,
            global_batch=setup.layout.global_batch,
            samples=setup.index.samples,
            flops_per_image=training_flops(config.model.spec()),
            peak_flops=peak * 1e12 if peak else peak_flops(world.device, setup.dtype),
            tensorboard=config.logging.tensorboard,
            counters=loader.counters,
            skipped=guard.skipped,
        )
        stack.callback(meters.close)
        saver = Saver(
            engine,
            folder,
            world,
            lambda done: {
                "stream": setup.order.state(setup.index.hash, done),
                "model": asdict(config.model.spec()),
                "guard": guard.state(),
                "config": setup.resolved,
                "origin": setup.origin,
            },
            start=start,
            **config.checkpoint.model_dump(),
            flush=lambda: folder.sync(world.rank),
        )
        stack.enter_context(saver.settled())
        # What is there by now stays. A full collection would walk all that torch and DeepSpeed are made of: 0.2 s in
        # which no thread of this process decodes or trains.
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        return train(
            engine,
            iter(loader),
            setup.loss_of,
            setup.schedule,
            Averaging(config.optimizer.averaging),
            setup.layout,
            start=start,
            missed=start > 0 and missed(setup, start),
            seed=config.seed,
            world=world,
            dtype=setup.dtype,
            meters=meters,
            audit=audit,
            quarantine=quarantine,
            guard=guard,
            inspection=Inspection(folder, world, saver.save),
            evaluators=setup.evaluators,
            saver=saver,
            stop=stop,
            watchdog=watchdog,
        )


def _headline(setup: Setup, start: int, origin: str) -> str:
    config, index, layout, steps = setup.config, setup.index, setup.layout, setup.schedule.steps
    spec = config.model.spec()
    return "\n".join(
        [
            f"{config.name}: {'; '.join(filter(None, (spec.near(), spec.describe(), origin)))}",
            f"data: {index.samples:,} samples in {len(index.shards):,} shards; "
            f"steps {start:,} to {steps:,}, {steps * layout.global_batch / index.samples:.4g} epochs",
            f"batch {layout.global_batch} = {layout.ranks} ranks × {layout.accumulation} accumulation × micro-batch "
            f"{layout.micro_batch}; {str(setup.dtype).removeprefix('torch.')}, ZeRO {config.deepspeed.stage}, "
            f"{setup.world.device.type}",
            *([f"note: content of the shards: {unhashed}"] if (unhashed := index.unhashed()) else []),
            *(f"note: {note}" for note in setup.notes),
            *_short_read_ahead(setup),
            *(unlisted(setup.world.device, setup.dtype) if config.logging.peak_tflops is None else []),
        ]
    )


def _short_read_ahead(setup: Setup) -> list[str]:
    """A word where the lanes of a rank, which change chunk at about the same time, need more than may be read ahead."""
    order, data = setup.order, setup.config.data
    samples = order.lane_count * order.chunk / setup.world.size
    needed = samples * setup.index.bytes / setup.index.samples / 2**20
    if needed <= data.read_ahead_mib:
        return []
    return [
        f"note: {order.lane_count:,} lanes of {order.chunk} samples are {needed:,.0f} MiB a rank; with "
        f"data.read_ahead_mib={data.read_ahead_mib} training may wait each time they change chunk; "
        f"{2 ** ceil(log2(needed))} would do, or fewer data.lanes in a new run"
    ]


def _say(world: World, text: str) -> None:
    if world.main:
        say(text)
