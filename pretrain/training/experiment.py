"""A run from its config to its last checkpoint: everything is checked, built, resumed, and handed to the loop."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pretrain.checkpoint import folder as checkpoints
from pretrain.checkpoint.step import Checkpoint
from pretrain.console import say
from pretrain.engine.engine import build_engine, release
from pretrain.engine.fragments import state_bytes, values_held
from pretrain.engine.guards import Guard, RollBack
from pretrain.engine.optimizer import build_optimizer
from pretrain.engine.restore import restore
from pretrain.engine.step import deterministic
from pretrain.errors import DivergedError, InputError, StorageError
from pretrain.model.initialization import initialize
from pretrain.model.vit import VisionTransformer
from pretrain.plan.flops import training_flops
from pretrain.plan.measured import Comparison, Meter
from pretrain.plan.peak import peak_flops
from pretrain.progress import Progress
from pretrain.ranks import collectives
from pretrain.ranks.collectives import World
from pretrain.ranks.command import DONE, STOPPED
from pretrain.ranks.stop import Stop
from pretrain.ranks.watchdog import Watchdog
from pretrain.record.best import Best
from pretrain.record.claim import claimed
from pretrain.record.events import Events, now, process_began
from pretrain.record.folder import RunFolder
from pretrain.record.inspection import Inspection
from pretrain.record.ledger import Audit, Ledger
from pretrain.record.metrics import Metrics, Workload
from pretrain.record.pulse import Pulse
from pretrain.record.quarantine import Quarantine
from pretrain.training.config import RunConfig, TrainingConfig
from pretrain.training.evaluation import Evaluator, due
from pretrain.training.keeper import Keeper
from pretrain.training.origin import Init, beginning, check_origin, describe, refuse_unreadable
from pretrain.training.resume import check_changes
from pretrain.training.saver import Saver
from pretrain.training.setup import Setup, headline, machines, open_loader, prepare
from pretrain.training.trainer import train
from pretrain.weights.fill import Fill, load_same
from pretrain.weights.load import Source


def run(
    config: TrainingConfig,
    out: Path,
    world: World,
    *,
    init: Init | None = None,
    fill: Fill = load_same,
    evaluators: Sequence[Callable[[RunConfig], Evaluator]] = (),
    extend: bool = False,
    check: bool = False,
    stop: Stop | None = None,
) -> int:
    """Train as `config` says, in the run folder `out`: anew, or on from its newest whole checkpoint.

    Args:
        init: the weights that a run which starts anew begins from; None: drawn from the seed. A run that is resumed
            must have begun from the same.
        fill: puts them into the network.
        evaluators: make those that run beside validation, given the run's config; called on all ranks together, once
            the data are opened.
        extend: allow a resumed run another length and schedule.
        check: only say what the run would be; nothing is built, nothing written.
        stop: hears requests to stop, where the run is one of several; None: the run listens itself.

    Returns:
        the exit status: done; or stopped with a checkpoint, on request or by storage that does not answer.

    Raises:
        InputError: config, data, layout and checkpoint do not go together.
        DivergedError: training went wrong.
    """
    folder = RunFolder(out)
    began = now() if stop else process_began()  # one of several begins when its turn has come
    try:
        chosen, network = beginning(folder, init, needed=config.needs_weights)
        setup = prepare(config, network, folder, world, evaluators)
        if check:
            start = find_start(setup, init, chosen, extend)
            for fault in start.passed_over.values():
                _say(world, f"passed over: {fault}")
            if not _finished(start):
                _say(world, headline(start.setup, start.step, start.said or f"from {describe(start.setup.origin)}"))
            return DONE
        collectives.together(folder.create)
        with claimed(out, world):
            start = find_start(setup, init, chosen, extend)
            if _finished(start):
                return DONE
            draw = partial(parameters, start.setup, init, chosen, fill)
            with Events(folder, world) as events:
                events.add("start", start.step, began=began, **machines(start.setup))
                return _train(start, None if start.saved else draw, events, stop)
    except StorageError as error:
        if not collectives.broadcast_object(world.main and _has_checkpoint(folder)):
            raise
        _say(world, f"stopped: {error}; once that has passed, run the same command again to resume")
        return STOPPED


@dataclass(frozen=True)
class Start:
    """Where a run starts: anew, or at its newest checkpoint."""

    setup: Setup  # with the run's origin
    step: int  # completed before
    saved: Checkpoint | None  # to be loaded; None: the run starts anew
    passed_over: dict[Path, str]  # newer checkpoints, and what is wrong with them
    said: str  # of a resume: from what, and what has changed


def find_start(setup: Setup, init: Init | None, chosen: Source | None, extend: bool) -> Start:
    """Find the checkpoint that the run resumes from, if there is one, and check that it may. Collective.

    Raises:
        InputError: the config, the data or `init` are not those of the run.
    """
    folder = setup.folder
    saved, passed_over = checkpoints.newest_verified(folder.checkpoints)
    if saved is None:
        refuse_unreadable(folder, passed_over)
        if chosen is None and (init or setup.as_read.needs_weights):  # there was a checkpoint a moment ago
            raise InputError(f"{folder.path}: its checkpoints were removed while this run started; start it again")
        origin = init.origin(chosen) if init and chosen else {"seed": setup.config.seed}
        return Start(replace(setup, origin=origin), 0, None, passed_over, "")
    check_origin(saved, init)
    setup = replace(setup, origin=saved.state.get("origin"))
    notes = check_changes(saved, setup.config, setup.resolved, extend=extend)
    stream, index = saved.state["stream"], setup.index
    step = setup.order.check(stream, index.hash, index.sequence)  # the same on every rank, as indices are
    if stream["index_hash"] != index.hash:
        notes += ["note: the run recorded no content of its shards; whether these are the same images is not known"]
    said = "\n".join([f"resumed from {saved.path}", f"began from {describe(setup.origin)}", *notes])
    return Start(setup, step, saved, passed_over, said)


def _finished(start: Start) -> bool:
    """Whether there is nothing left to do, which is said then. Collective."""
    setup, step, steps = start.setup, start.step, start.setup.recipe.steps
    if step < steps or (step == steps and missed(setup, step)):
        return False
    length = f"of {step}" if step == steps else f"already, beyond step {steps}"
    text = f"{setup.folder.path}: finished at step {step} {length}; nothing to do"
    _say(setup.world, f"{text} (--extend with more train.steps trains on)")
    return True


def _train(
    start: Start, fill: Callable[[VisionTransformer], str] | None, events: Events, of_several: Stop | None
) -> int:
    """Build the run and train it to its end; the exit status. Collective.

    Args:
        fill: sets the parameters of a run that starts anew.
        of_several: hears requests to stop this run and others; None: there are no others.
    """
    setup, config, world, out = start.setup, start.setup.config, start.setup.world, start.setup.folder.path
    hang, slow = 60 * config.train.hang_minutes, 60 * config.train.slow_minutes
    with Pulse(Watchdog(out, world, hang=hang, slow=slow), world.device) as pulse:
        stop = of_several or Stop(out, world, config.train.time_limit_minutes)
        stop.enter(out)
        guard, meter = Guard(config.train.guard), Meter(world.device)
        engine, filled = build(setup, fill)
        if start.saved is not None:
            load(engine, guard, start.saved, world)
        begin(setup, start.step, start.passed_over)
        memory = Comparison(setup.expected, meter, state_bytes(engine))
        meter.restart()
        _say(world, headline(setup, start.step, start.said or filled))
        step, finished = start.step, None
        while finished is None:
            try:
                finished = attempt(setup, engine, guard, stop, pulse, events, memory, step)
            except RollBack as back:
                events.add("rollback", back.first, reason=str(back))
                _say(world, str(back))
                pulse.beat(back.first, "start")
                step = roll_back(setup, engine, guard, back)
            except DivergedError:
                if of_several is not None:
                    release(engine)
                raise
    if finished:
        events.add("finished", setup.recipe.steps)
    else:
        events.add("stopped", events.step, reason=str(stop.reason))
        _say(world, f"stopped: {stop.reason}; run the same command again to resume")
    if of_several is None:
        stop.done()
    else:
        release(engine)
    return DONE if finished else STOPPED


def _has_checkpoint(folder: RunFolder) -> bool:
    """Whether there is a checkpoint to resume; true also where the folder does not answer, as there may be one."""
    try:
        return bool(checkpoints.list_checkpoints(folder.checkpoints))
    except OSError:
        return True


def missed(setup: Setup, step: int) -> bool:
    """Whether the run was stopped or killed between the save after `step` steps and its evaluation. Collective."""
    known = collectives.on_main(lambda: setup.folder.evaluated(step))
    return not known and bool(due(setup.evaluators, step, last=step == setup.recipe.steps))


def begin(setup: Setup, start: int, passed_over: dict[Path, str]) -> None:
    """Share what is trained, and take from the run folder what came after step `start`. Collective."""
    config, folder, world = setup.config, setup.folder, setup.world

    def write() -> None:
        if world.main:
            record = {**setup.as_read.model_dump(mode="json"), "train": setup.resolved["train"]}
            folder.write_config({**record, "network": asdict(config.model.spec()), "origin": setup.origin})
            checkpoints.set_aside(passed_over)
            checkpoints.update_latest(folder.checkpoints)
            checkpoints.remove_partial(folder.checkpoints)
        folder.rewind(start, world.rank, world.size)

    collectives.together(write)
    for fault in passed_over.values():
        _say(world, f"passed over: {fault}")


def build(setup: Setup, fill: Callable[[VisionTransformer], str] | None) -> tuple[Any, str]:
    """The network in its engine, and what `fill`, which sets its parameters, reports. Collective.

    fill: None where a checkpoint will set them.
    """
    config, train = setup.config, setup.config.train
    spec, frozen = config.model.spec(), setup.recipe.frozen
    model = VisionTransformer(spec, train.activation_checkpointing, train.compile, frozen)
    filled = collectives.together(lambda: fill(model)) if fill else ""
    optimizer = build_optimizer(model, config.optimizer)
    layout = setup.recipe.layout
    return build_engine(model, optimizer, config.deepspeed, layout, config.optimizer.clip_norm), filled


def parameters(setup: Setup, init: Init | None, chosen: Source | None, fill: Fill, model: VisionTransformer) -> str:
    """Set those of a run that begins now: the weights `chosen`, or drawn from the seed."""
    if init is None or chosen is None:
        initialize(model, setup.config.seed, head_bias=setup.config.model.head_bias)
        details = ""
    else:
        details = fill(model, chosen.read(init.averaged))
    return f"from {describe(setup.origin)}" + (f"\n{details}" if details else "")


def load(engine: Any, guard: Guard, saved: Checkpoint, world: World) -> None:
    """Make engine and guard what they were when `saved` was written. Collective."""
    with Progress("loading the checkpoint", "values", values_held(engine)) as progress:
        restore(engine, saved, progress.advance if world.main else lambda values: None)
    guard.restore(saved.state["guard"])


def roll_back(setup: Setup, engine: Any, guard: Guard, back: RollBack) -> int:
    """Load a checkpoint from before the steps that `back` avoids; the number of its steps. Collective.

    Raises:
        DivergedError: there is none.
    """
    folder, world = setup.folder, setup.world
    found = checkpoints.list_on_main(folder.checkpoints)
    early = [path for path in found if path <= checkpoints.step_path(folder.checkpoints, back.first)]
    saved, _ = checkpoints.newest_verified(folder.checkpoints, [*early, *found[-1:]][0]) if found else (None, {})
    if saved is None:
        raise DivergedError(f"{back}, but there is no checkpoint to go back to")
    load(engine, guard, saved, world)
    late = f", the oldest there is: it has been trained on steps from {back.first + 1} on" if not early else ""
    _say(world, f"went back to {saved.path}{late}")
    if world.main:
        checkpoints.remove_after(folder.checkpoints, saved.step)
    collectives.together(lambda: folder.rewind(saved.step, world.rank, world.size))
    return saved.step


def attempt(
    setup: Setup,
    engine: Any,
    guard: Guard,
    stop: Stop,
    pulse: Pulse,
    events: Events,
    memory: Comparison,
    start: int,
) -> bool:
    """Train from step `start` to the end; False if the run was asked to stop before. Raises as `train`."""
    world, folder, steps = setup.world, setup.folder, setup.recipe.steps

    def state(done: int) -> dict[str, Any]:
        return {
            "stream": setup.order.state(setup.index.hash, done),
            "model": asdict(setup.config.model.spec()),
            "guard": guard.state(),
            "config": setup.resolved,
            "origin": setup.origin,
            "metrics": metrics.check,
        }

    with ExitStack() as stack:
        stack.enter_context(deterministic(setup.config.train.deterministic))
        loader = stack.enter_context(open_loader(setup, start))
        metrics = Metrics(
            folder,
            world,
            setup.config.logging,
            _workload(setup),
            loader.counters,
            memory=memory,
            start=start,
            skipped=guard.skipped,
        )
        saver = Saver(engine, folder, world, state, setup.config.checkpoint, events, start=start)
        ledger = _ledger(setup, metrics, saver, events)
        stack.callback(ledger.close)
        metric = setup.config.checkpoint.best
        keeper = Keeper(
            engine,
            saver,
            setup.evaluators,
            stop,
            pulse=pulse,
            metrics=metrics,
            start=start,
            steps=steps,
            best=Best(folder, metric) if metric else None,
        )
        # After the keeper, which may have a save to finish. The device is not waited for: it may have failed.
        stack.callback(lambda: events.add("left", keeper.done, **pulse.window(wait=False).times()))
        stack.enter_context(keeper)
        # What is there by now stays. A full collection would walk all that torch and DeepSpeed are made of: 0.2 s in
        # which no thread of this process decodes or trains.
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        pulse.window()  # the first one begins here
        events.add("train", start)
        if start > 0 and missed(setup, start) and not keeper.evaluate(start):
            return False
        return train(
            engine,
            iter(loader),
            setup.recipe,
            start=start,
            world=world,
            pulse=pulse,
            ledger=ledger,
            guard=guard,
            keeper=keeper,
        )


def _workload(setup: Setup) -> Workload:
    peak = setup.config.logging.peak_tflops
    return Workload(
        steps=setup.recipe.steps,
        global_batch=setup.recipe.layout.global_batch,
        samples=setup.order.samples,
        flops_per_image=training_flops(setup.config.model.spec(), setup.recipe.frozen),
        peak_flops=peak * 1e12 if peak else peak_flops(setup.world.device, setup.recipe.dtype),
    )


def _ledger(setup: Setup, metrics: Metrics, saver: Saver, events: Events) -> Ledger:
    folder, world, data = setup.folder, setup.world, setup.config.data
    audit = collectives.together(lambda: Audit(folder, world.rank, data.audit))
    quarantine = Quarantine(folder, setup.index, world, data, setup.recipe.layout.global_batch)
    return Ledger(audit, quarantine, metrics, Inspection(folder, world, saver.save), events)


def _say(world: World, text: str) -> None:
    if world.main:
        say(text)
