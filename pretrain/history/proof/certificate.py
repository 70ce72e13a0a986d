"""What was promised of a run, proved from its own files: the certificate.

It reads the audit, the metrics, the events and the checkpoints of a run folder, and the index of its data where that
can be reached; it builds nothing and needs no process group.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain import files
from pretrain.checkpoint.step import Checkpoint
from pretrain.errors import InputError
from pretrain.history.history import RunHistory
from pretrain.history.proof import checkpoints, continuity, logged
from pretrain.history.proof.audit import AuditCheck, Expected
from pretrain.history.proof.finding import FAILS, HOLDS, UNKNOWN, Finding, counted
from pretrain.history.proof.span import loops, standing, told_completed
from pretrain.index.index import Index
from pretrain.record.folder import CONFIG, EVENTS, METRICS, RunFolder, git_commit, versions
from pretrain.stream.heldout import hold_out
from pretrain.stream.order import Order

CERTIFICATE = "certificate.json"
_NEEDED = ("seed", "data.train", "train.steps", "train.global_batch", "optimizer.lr", "schedule", "logging.every")
_SIGNS = {HOLDS: "✓", FAILS: "✗", UNKNOWN: "?"}


@dataclass(frozen=True)
class Certificate:
    """What holds of a run, what does not, and what cannot be known.

    Args:
        run: its folder.
        completed: steps, of which checkpoints, events, metrics or the audit tell.
        facts: what was left out or done twice: no claim is broken by it.
        read: sha256 of the files that were read, by their names in the folder; of a checkpoint, of its state, which
            holds the hashes of its files; of the index, its hash.
    """

    run: str
    name: str
    completed: int
    findings: tuple[Finding, ...]
    facts: tuple[str, ...]
    read: dict[str, str]

    def count(self, verdict: str) -> int:
        """How many claims have this verdict."""
        return sum(finding.verdict == verdict for finding in self.findings)

    @property
    def holds(self) -> bool:
        """Whether nothing was found that does not hold."""
        return not self.count(FAILS)

    def text(self) -> str:
        """For the console: a first line that counts, then a line for each claim, and what is at fault below it."""
        lines = [
            f"{self.run}: of {len(self.findings)} claims {self.count(HOLDS)} hold, {self.count(FAILS)} do not, "
            f"{self.count(UNKNOWN)} cannot be known; {self.completed:,} steps"
        ]
        for finding in self.findings:
            verdict = "" if finding.verdict == HOLDS else f"{finding.verdict.upper()}: "
            lines.append(f"  {_SIGNS[finding.verdict]} {verdict}{finding.claim}")
            lines += [f"      {finding.words}"] if finding.words else []
            lines += [f"      → {fault}" for fault in finding.faults]
        lines += [f"  · {fact}" for fact in self.facts]
        return "\n".join(lines)


def certify(path: Path) -> Certificate:
    """The certificate of the run in the folder `path`; the run may be going on.

    Raises:
        InputError: no run folder, or a file of it is no JSON; names it.
    """
    # The checkpoints and events first: what is written of a running run meanwhile lies beyond them.
    folder = RunFolder(path)
    found, damaged = checkpoints.read_states(folder)
    history = RunHistory.read(path)
    history.require(*_NEEDED)
    raw = folder.metrics.read_bytes() if files.exists(folder.metrics) else b""
    raw = raw[: raw.rfind(b"\n") + 1]  # without a torn line
    metrics = [json.loads(line) for line in raw.split(b"\n")[:-1]]
    index, unreachable = _index(history.config)
    completed = max([told_completed(history.events), *(saved.step for saved in found[:1])])
    expected = _expected(found, history.config, index, unreachable)
    spans = standing(list(loops(history)))
    audit = AuditCheck(folder, expected, spans, completed)
    lines = logged.Logged(history, metrics, expected.order, spans)
    findings = (
        *audit.findings(max([completed, *(line["step"] for line in metrics[-1:])])),
        lines.lines(completed),
        lines.values(),
        logged.chain(metrics, raw, found),
        continuity.continuity(history, _trained(found)),
        checkpoints.whole(found, damaged),
        checkpoints.pointers(folder, history),
        checkpoints.positions(found, expected.order, [index.hash, index.sequence] if index else [], unreachable),
        checkpoints.configs(found, history),
        checkpoints.starts(history, found),
    )
    read = {CONFIG: files.sha256(folder.path / CONFIG), METRICS: hashlib.sha256(raw).hexdigest(), **audit.hashes}
    if files.exists(folder.events):
        read[EVENTS] = files.sha256(folder.events)
    read |= {f"checkpoints/{one.path.name}": one.sha256 for one in found}
    read |= {"index": index.hash} if index else {}
    reached = max(completed, audit.judged, *(line["step"] for line in metrics[-1:]), 0)
    return Certificate(str(path), history.name, reached, findings, tuple(_facts(history, audit, completed)), read)


def write(certificates: Sequence[Certificate], folder: Path) -> Path:
    """Write certificates into `folder`, with the versions of what made them; the file's path."""
    files.make_folder(folder)
    record = {
        "versions": versions(),
        "git_commit": git_commit(),
        "runs": [{**asdict(one), "holds": one.holds} for one in certificates],
    }
    path = folder / CERTIFICATE
    files.write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return path


def _index(config: Mapping[str, Any]) -> tuple[Index | None, str]:
    """The index that the config names; None where it cannot be reached, and why."""
    paths = config["data"]["train"]
    if not paths:
        return None, "config.json names no index in data.train"
    try:
        return Index.open(tuple(paths) if isinstance(paths, list) else paths), ""
    except InputError as error:
        return None, f"the index cannot be reached: {error}"


def _expected(
    found: Sequence[Checkpoint], config: Mapping[str, Any], index: Index | None, unreachable: str
) -> Expected:
    """The order that the run's samples must have come in: as its checkpoints hold it, else of its config and index."""
    data, batch, seed = config["data"], config["train"]["global_batch"], config["seed"]
    share = data.get("held_out", 0.0)
    if share and index is None:
        return Expected(None, unknown=f"which samples are held out is not known: {unreachable}")
    if not found and index is None:
        return Expected(None, unknown=f"there is no checkpoint, and {unreachable}")
    trained = hold_out(index, share)[0] if index is not None and share else None
    if found:
        stream = found[0].state["stream"]
        of_run = {name: stream[name] for name in ("samples", "global_batch", "seed", "chunk", "lanes")}
        samples = index.samples if index is not None and share else stream["samples"]
        if trained is not None and len(trained) != stream["samples"]:
            why = f"the run held out all but {stream['samples']:,} samples; of this index {len(trained):,} are left"
            return Expected(None, unknown=why)
        return Expected(Order(**of_run), trained, samples)
    assert index is not None
    number = index.samples if trained is None else len(trained)
    return Expected(Order(number, batch, seed, data.get("chunk", 8), data.get("lanes")), trained, index.samples)


def _trained(found: Sequence[Checkpoint]) -> dict[str, Any] | None:
    """The config that the newest checkpoint holds."""
    return dict(found[0].state.get("config") or found[0].state["function"]) if found else None


def _facts(history: RunHistory, audit: AuditCheck, completed: int) -> list[str]:
    """What was left out or done twice, and what of the run was not judged."""
    facts = []
    skipped = sum(event["event"] == "skipped" for event in history.events)
    if skipped:
        facts.append(
            f"{counted(skipped, 'update')} skipped, over all starts: their samples were fed, and count as seen"
        )
    if history.quarantine:
        facts.append(
            f"{len(history.quarantine):,} samples could not be read: fed as grey, masked images, count as seen"
        )
    backs = sum(event["event"] == "rollback" for event in history.events)
    if backs:
        facts.append(f"{counted(backs, 'return')} to an earlier checkpoint")
    twice = len({line["step"] for line in history.discarded if "loss" in line})
    if twice:
        facts.append(f"{twice:,} logged steps were trained more than once; the files tell of the last time")
    if audit.hashes and audit.judged > completed:
        facts.append(f"steps {completed:,} to {audit.judged - 1:,} are in no checkpoint yet")
    if completed < history.config["train"]["steps"]:
        facts.append(
            f"not finished: beyond step {max(completed, audit.judged):,}, lines that not all ranks have are not judged"
        )
    return facts
