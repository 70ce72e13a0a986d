"""What an index records of its shards' content: their sha256, their server's etag, both, or nothing."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping


def digest_text(sha256: str = "", etag: str = "") -> str:
    """What an index records of a shard's content: "sha256:…", "etag:…", both, or nothing."""
    return " ".join([*([f"sha256:{sha256}"] if sha256 else []), *([f"etag:{etag}"] if etag else [])])


def sha256_of(digest: str) -> str:
    """The sha256 (hex) in a shard's digest; empty where there is none."""
    return digest.partition(" ")[0].removeprefix("sha256:") if digest.startswith("sha256:") else ""


def etag_of(digest: str) -> str:
    """The etag in a shard's digest; empty where there is none."""
    rest = digest.partition(" ")[2] if digest.startswith("sha256:") else digest
    return rest.removeprefix("etag:") if rest.startswith("etag:") else ""


def count_kinds(digests: Iterable[str]) -> dict[str, int]:
    """How many shards are known by their sha256, by an etag alone, by nothing: {"sha256", "etag", "unknown"}."""
    counts = Counter("sha256" if sha256_of(one) else "etag" if etag_of(one) else "unknown" for one in digests)
    return {kind: counts[kind] for kind in ("sha256", "etag", "unknown")}


def unhashed_text(kinds: Mapping[str, int]) -> str:
    """What a hash does not know of shards of these kinds, in words; empty where it holds the sha256 of each."""
    listed = ", ".join(f"{kind} of {count:,}" for kind, count in kinds.items() if count)
    if not kinds["etag"] and not kinds["unknown"]:
        return ""
    return (
        f"{listed} shards; not all of it is in the hash, so other images under the same keys, labels and sizes may "
        "have the same one. To have it there, index the shards again, remote ones with --sha256"
    )


def content_hash(sequence: str, digests: Iterable[str]) -> str:
    """sha256 of the samples' sequence and, for every shard, of its bytes where their sha256 is recorded.

    Etags are left out: a copy of the shard elsewhere has another. Without any sha256 it is `sequence` itself.
    """
    known = [sha256_of(digest) for digest in digests]
    if not any(known):
        return sequence
    return hashlib.sha256(
        "\n".join([f"vit-foundry index 2: {sequence}", *known]).encode(errors="surrogateescape")
    ).hexdigest()
