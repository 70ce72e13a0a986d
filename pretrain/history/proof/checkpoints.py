"""The checkpoints of a run, and its starts, which take up from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pretrain import files
from pretrain.checkpoint import folder as place
from pretrain.checkpoint.step import Checkpoint
from pretrain.configfile import differences
from pretrain.errors import InputError
from pretrain.history.history import RunHistory
from pretrain.history.proof.finding import UNKNOWN, Faults, Finding, counted
from pretrain.progress import Progress
from pretrain.record.folder import EVENTS, RunFolder
from pretrain.stream.order import Order
from pretrain.training.config import RunConfig
from pretrain.training.resume import completed, rule_of

WHOLE = "every checkpoint is whole: its files are those that were written"
POINTERS = "latest names the newest checkpoint, and best one that is there"
POSITION = "the checkpoints' position in the data is that of their step, in one and the same order"
CONFIG = "config.json is that of the checkpoints and of the last start"
STARTS = "each start began where a checkpoint could be"


def read_states(folder: RunFolder) -> tuple[list[Checkpoint], dict[str, str]]:
    """The checkpoints whose state can be read, newest first, and what is wrong with the others."""
    found, damaged = [], {}
    for path in place.list_checkpoints(folder.checkpoints):
        try:
            found.append(Checkpoint.read(path))
        except InputError as error:
            if files.is_folder(path):  # a running run removes the older ones
                damaged[path.name] = str(error)
    return found, damaged


def whole(found: Sequence[Checkpoint], damaged: Mapping[str, str]) -> Finding:
    """Whether all files of all checkpoints have their hashes; reads all of them.

    A checkpoint that a running run has removed meanwhile is none.
    """
    faults = Faults()
    for name, fault in damaged.items():
        faults.add(f"checkpoints/{name}: {fault}")
    size = 0
    with Progress("checking checkpoints", "bytes", max(sum(saved.bytes for saved in found), 1)) as progress:
        for saved in found:
            try:
                for name in saved.state["files"]:
                    try:
                        saved.verify([name], progress.advance)
                    except InputError as error:
                        if not files.is_folder(saved.path):
                            break
                        faults.add(f"checkpoints/{saved.path.name}/{name}: {error}")
            finally:
                size += saved.bytes
    if not found and not damaged:
        return Finding(WHOLE, UNKNOWN, "there is no checkpoint")
    return faults.finding(WHOLE, f"{counted(len(found), 'checkpoint')}, {size:,} bytes")


def pointers(folder: RunFolder, history: RunHistory) -> Finding:
    """What the files `latest` and `best` name. A kill may come between a save and `latest`: no event tells of it."""
    faults, said = Faults(), []
    newest = place.list_checkpoints(folder.checkpoints)[:1]
    told = {event["step"] for event in history.events if event["event"] == "saved"}
    for name in (place.LATEST, place.BEST):
        pointer = folder.checkpoints / name
        if not files.exists(pointer):
            if name == place.LATEST and newest:
                faults.add(f"checkpoints/{name}: no such file; {newest[0].name} would be right")
            continue
        try:
            named = place.named_by(pointer)
        except InputError as error:
            faults.add(f"checkpoints/{name}: {error}")
            continue
        said.append(f"{name} {named.name}")
        if name == place.LATEST and named.name < newest[0].name and int(newest[0].name.removeprefix("step_")) in told:
            faults.add(f"checkpoints/{name}: names {named.name}; {newest[0].name}, the newest, would be right")
    if not newest and not said and not faults.count:
        return Finding(POINTERS, UNKNOWN, "there is no checkpoint")
    return faults.finding(POINTERS, ", ".join(said))


def positions(found: Sequence[Checkpoint], order: Order | None, hashes: Sequence[str], unknown: str) -> Finding:
    """Whether each checkpoint's state of the stream fits its step, the order, and the index.

    Args:
        hashes: of the index as it is now, any of which a state may hold; empty where it cannot be reached.
        unknown: why not.
    """
    if not found or order is None:
        return Finding(POSITION, UNKNOWN, "there is no checkpoint")
    faults = Faults()
    for saved in found:
        stream = saved.state["stream"]
        try:
            step = order.check(stream, stream["index_hash"])
        except InputError as error:
            faults.add(f"checkpoints/{saved.path.name}: {error}")
            continue
        if step != saved.step:
            right = saved.step * order.global_batch
            faults.add(f"checkpoints/{saved.path.name}: position {stream['position']}; {right} would be right")
        if hashes and stream["index_hash"] not in hashes:
            faults.add(
                f"checkpoints/{saved.path.name}: of index {stream['index_hash'][:12]}…, data.train holds "
                f"{hashes[0][:12]}…; the index that the run was trained on would be right"
            )
    return faults.finding(POSITION, counted(len(found), "checkpoint"), [unknown] if not hashes else [])


def configs(found: Sequence[Checkpoint], history: RunHistory) -> Finding:
    """Whether what no resume may change is the same in each checkpoint and in config.json, the network included; and
    what a resume may extend is that of the last start.
    """
    if not found:
        return Finding(CONFIG, UNKNOWN, "there is no checkpoint")
    faults, config = Faults(), history.config
    now = {
        "global_batch": config["train"]["global_batch"],
        "lr": config["optimizer"]["lr"],
        "schedule": config["schedule"],
    }
    for attempt in history.attempts[-1:]:
        if any(event["event"] == "train" for event in attempt.events):  # config.json is written before
            told = {name: value for name, value in attempt.start.items() if name in now}
            for key, was, will in differences(told, {name: now[name] for name in told}):
                faults.add(f"{EVENTS}: the last start had {key} {was!r}, config.json has {will!r}")
    for saved in found:
        held = saved.state.get("config") or saved.state["function"]
        before = completed(held, RunConfig, dict(config))
        here = completed(dict(config), RunConfig, before)
        # A fine-tuning config leaves the network to the weights that it began from.
        common = [name for name in before if name in here and name != "model"]
        found_other = [
            (key, was, will)
            for key, was, will in differences({n: before[n] for n in common}, {n: here[n] for n in common})
            if rule_of(key, RunConfig) == "fixed"
        ]
        network = config.get("network")  # earlier versions recorded none
        found_other += differences(saved.state["model"], network) if network else []
        for key, was, will in found_other:
            faults.add(f"checkpoints/{saved.path.name}: {key} is {was!r}, in config.json {will!r}")
    return faults.finding(CONFIG, f"{counted(len(found), 'checkpoint')} and config.json")


def starts(history: RunHistory, found: Sequence[Checkpoint]) -> Finding:
    """Whether each start began at step 0, or at one that the starts before it had saved, or had come to.

    A kill may come between a save and the event that tells of it.
    """
    if not history.events:
        gone = Faults()
        if any(saved.state.get("metrics") for saved in found):
            gone.add(f"{EVENTS}: no such file, or an empty one, but the run that saved {found[0].path.name} kept one")
        return gone.finding(STARTS, "", ["the run is from before events.jsonl: its starts are not recorded"])
    faults, layouts, saved, reached = Faults(), [], {0}, 0
    first, unknown = history.attempts[0].start["step"] if history.attempts else 0, []
    if first and not any("at" in line for line in history.lines if line["step"] <= first):
        saved.add(first)
        unknown.append(f"the starts up to step {first} are from before events.jsonl")
    for number, attempt in enumerate(history.attempts, start=1):
        start, step = attempt.start, attempt.start["step"]
        layouts.append(f"{start['ranks']}×ZeRO {start['zero_stage']} from {step}")
        if step not in saved and step > reached:
            faults.add(
                f"{EVENTS}: start {number} began at step {step}, but those before it came to step {reached}; a step "
                "that they saved would be right"
            )
        train = next((event["step"] for event in attempt.events if event["event"] == "train"), step)
        if train != step:
            faults.add(f"{EVENTS}: start {number} at step {step} trains from step {train}; {step} would be right")
        saved |= {event["step"] for event in attempt.events if event["event"] == "saved"}
        # Up to the next line that would have been logged.
        unlogged = start.get("logging_every", history.config["logging"]["every"]) - 1
        logged = [line["step"] for line in attempt.lines if "loss" in line]
        reached = max(reached, max([train, *logged]) + unlogged)
    shown = layouts if len(layouts) <= 6 else [*layouts[:3], "…", *layouts[-2:]]
    return faults.finding(STARTS, f"{counted(len(layouts), 'start')}: {', '.join(shown)}", unknown)
