"""The index file: a JSON header and flat little-endian arrays, written once and mapped into memory by its readers.

bytes 0–7    b"VFINDEX\\n"
bytes 8–15   length of the header, uint64
then         the header: JSON, with a crc32 of itself; then the arrays that its table names, each from a multiple of
             64 bytes on:

first        int64  [S+1]  canonical id of every shard's first sample; the last entry is N
shard_bytes  int64  [S]    file size
data_end     int64  [S]    where the end-of-archive marker begins
url_ends     int64  [S+1]  with urls uint8: names
digest_ends  int64  [S+1]  with digests uint8: "sha256:…" of the whole shard, "etag:…", both, or ""
offsets      uint32 [N]    first header of the sample, in units of 512 bytes
key_hashes   uint32 [N]    crc32 of the key's bytes
labels       int32  [N]    or, with lists, [all labels] and label_starts uint32 or int64 [N+1]

The header's `sequence` is the hash of the samples' sequence (keys, labels, offsets); `hash` also covers the sha256 of
every shard that has one, and is `sequence` where none has. In files of version 1, which are still read, `hash` is
`sequence`, and the other is computed from their digests.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pretrain import files
from pretrain.errors import InputError
from pretrain.index.tar import BLOCK
from pretrain.storage.filekind import LOOKED_AT, TAR, file_kind
from pretrain.storage.location import home, likely_mistake, local_path
from pretrain.storage.store import is_remote

INDEX_NAME = "index.vfi"
MAGIC = b"VFINDEX\n"
VERSION = 2
_READ = (1, 2)
ALIGN = 64
LARGEST_SHARD = 512 << 32  # bytes that uint32 offsets reach
_HEADER_LIMIT = 1 << 28
_PIECE = 1 << 20  # array elements hashed at a time
_DTYPES = {
    **dict.fromkeys(("first", "shard_bytes", "data_end", "url_ends", "digest_ends"), ("<i8",)),
    **dict.fromkeys(("urls", "digests"), ("|u1",)),
    **dict.fromkeys(("offsets", "key_hashes"), ("<u4",)),
    "labels": ("<i4",),
    "label_starts": ("<u4", "<i8"),
}

Pieces = Iterable[np.ndarray]


def index_path(path: str | Path) -> Path:
    """The index file that an INDEX names: itself, or the one in a folder of shards. Raises InputError for neither."""
    index = local_path(path)
    if not files.is_folder(index):
        if not files.is_file(index):  # a pipe would be waited for
            what = "not a file" if files.exists(index) else "no such index"
            pattern = index.suffix == ".tar" or not {"*", "{"}.isdisjoint(str(index))
            hint = f" (made of shards by: python launch/shards.py index '{index}' --out FILE)" if pattern else ""
            raise InputError(f"{index}: {what}; an INDEX is an index file, or a folder of shards that holds one{hint}")
        return index
    if not files.exists(index / INDEX_NAME):
        hint = likely_mistake(index) or f"; make it with: python launch/shards.py index {index}"
        raise InputError(f"{index}: no {INDEX_NAME} in this folder{hint}")
    return index / INDEX_NAME


def key_bytes(key: str) -> bytes:
    """A key as it stands in its shard: UTF-8, or whatever other bytes a file was named by."""
    return key.encode(errors="surrogateescape")


def key_hash(key: str) -> int:
    """crc32 of a key, by which a reader recognises the sample it read."""
    return zlib.crc32(key_bytes(key))


def _crc32(header: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(header).encode())


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _dtype(name: str, dtype: Any) -> np.dtype[Any]:
    if dtype not in _DTYPES[name]:
        raise ValueError(f"{name} of {dtype!r}")
    return np.dtype(dtype)


def sequence_hash(
    shard_samples: np.ndarray, offsets: Pieces, keys: Pieces, counts: Pieces | None, labels: Pieces
) -> str:
    """sha256 of what fixes the sequence of samples: samples per shard, offsets, key hashes and labels; no paths."""
    digest = hashlib.sha256(f"vit-foundry index 1: {len(shard_samples)} {int(shard_samples.sum())}\n".encode())
    parts = [("shards", "<i8", [shard_samples]), ("offsets", "<u4", offsets), ("keys", "<u4", keys)]
    if counts is not None:
        parts.append(("counts", "<u4", counts))
    for name, dtype, pieces in [*parts, ("labels", "<i4", labels)]:
        digest.update(f"{name}\n".encode())
        for piece in pieces:
            digest.update(np.ascontiguousarray(piece, dtype).data)
    return digest.hexdigest()


def digest_text(sha256: str = "", etag: str = "") -> str:
    """What an index records of a shard's content: "sha256:…", "etag:…", both, or nothing."""
    return " ".join([*([f"sha256:{sha256}"] if sha256 else []), *([f"etag:{etag}"] if etag else [])])


def sha256_of(digest: str) -> str:
    """The sha256 (hex) in a digest; empty where there is none."""
    return digest.partition(" ")[0].removeprefix("sha256:") if digest.startswith("sha256:") else ""


def etag_of(digest: str) -> str:
    """The etag in a digest; empty where there is none."""
    rest = digest.partition(" ")[2] if digest.startswith("sha256:") else digest
    return rest.removeprefix("etag:") if rest.startswith("etag:") else ""


def count_kinds(digests: Iterable[str]) -> dict[str, int]:
    """How many shards have a sha256, an etag alone, or neither: {"sha256", "etag", "unknown"}."""
    counts = Counter("sha256" if sha256_of(one) else "etag" if etag_of(one) else "unknown" for one in digests)
    return {kind: counts[kind] for kind in ("sha256", "etag", "unknown")}


def unhashed_text(kinds: Mapping[str, int]) -> str:
    """What a hash does not cover of shards of these kinds, in words; empty where each has a sha256."""
    listed = ", ".join(f"{kind} of {count:,}" for kind, count in kinds.items() if count)
    if not kinds["etag"] and not kinds["unknown"]:
        return ""
    return (
        f"{listed} shards; not all of it is in the hash, so other images under the same keys, labels and sizes may "
        "have the same one. To have it there, index the shards again, remote ones with --sha256"
    )


def content_hash(sequence: str, digests: Iterable[str]) -> str:
    """sha256 of the samples' sequence and of every recorded sha256; without any it is `sequence` itself.

    Etags are left out: a copy of the shard elsewhere has another.
    """
    known = [sha256_of(digest) for digest in digests]
    if not any(known):
        return sequence
    return hashlib.sha256(
        "\n".join([f"vit-foundry index 2: {sequence}", *known]).encode(errors="surrogateescape")
    ).hexdigest()


def place_arrays(header: dict[str, Any], lengths: dict[str, tuple[str, int]]) -> tuple[bytes, int]:
    """Header bytes, padded to where the arrays begin, and the size of the whole file.

    `lengths` is name → (dtype, elements). The header gains the table "arrays" (name → dtype, elements, offset from the
    end of the padded header), "array_bytes", and "crc32", of itself without that.
    """
    table, at = {}, 0
    for name, (dtype, length) in lengths.items():
        table[name] = [dtype, length, at]
        at += -(-length * np.dtype(dtype).itemsize // ALIGN) * ALIGN
    header = {**header, "arrays": table, "array_bytes": at}
    text = json.dumps({**header, "crc32": _crc32(header)}).encode()
    start = MAGIC + len(text).to_bytes(8, "little") + text
    start += bytes(-len(start) % ALIGN)
    return start, len(start) + at


class IndexFile:
    """One index file mapped into memory: no array is read before something is looked up in it."""

    def __init__(self, path: Path) -> None:
        self.path = local_path(path)
        self._home = home(self.path)
        header, self._mapped, start = self._map()
        try:
            self._starts = {name: start + _count(at) for name, (_, _, at) in header["arrays"].items()}
            arrays = {
                name: np.frombuffer(self._mapped, _dtype(name, dtype), _count(length), self._starts[name])
                for name, (dtype, length, _) in header["arrays"].items()
            }
            self.samples = _count(header["samples"])
            self.num_shards = _count(header["shards"])
            self.num_classes = _count(header["num_classes"])
            self.multilabel = bool(header["multilabel"])
            self.longest = _count(header["longest"])
            first_version = header["version"] == 1
            self.sequence = str(header["hash" if first_version else "sequence"])
            self._hash = "" if first_version else str(header["hash"])
            self.classes: tuple[str, ...] | None = tuple(map(str, header["classes"])) if header["classes"] else None
            self.first: np.ndarray = arrays["first"]
            self.shard_bytes: np.ndarray = arrays["shard_bytes"]
            self.data_end: np.ndarray = arrays["data_end"]
            self._urls = arrays["url_ends"], arrays["urls"]
            self._digests = arrays["digest_ends"], arrays["digests"]
            self.offsets: np.ndarray = arrays["offsets"]
            self.key_hashes: np.ndarray = arrays["key_hashes"]
            self.labels: np.ndarray = arrays["labels"]
            self.label_starts = arrays["label_starts"] if self.multilabel else None
            whole = (
                len(self.offsets) == len(self.key_hashes) == self.samples == int(self.first[-1]) > 0
                and len(self.first) == len(self._urls[0]) == len(self._digests[0]) == self.num_shards + 1
                and len(self.shard_bytes) == len(self.data_end) == self.num_shards
                and (len(self.labels) == self.samples or self.label_starts is not None)
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._fault(f"damaged header ({type(error).__name__}: {error})") from error
        if not whole:
            raise self._fault("damaged header (its counts contradict each other)")

    def _map(self) -> tuple[dict[str, Any], mmap.mmap, int]:
        """Header, the whole file mapped, and the byte at which the arrays begin."""
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                start = file.read(16)
                length = int.from_bytes(start[8:], "little")
                if start[:8] != MAGIC[: len(start)] or not start:
                    kind = file_kind(start + file.read(LOOKED_AT))
                    shards = self.path if kind == TAR else "SHARDS…"
                    raise InputError(
                        f"{self.path}: not an index{f' but {kind}' if kind else ''}; an index is made with: "
                        f"python launch/shards.py index {shards}"
                    )
                if len(start) < 16 or size < 16 + length:
                    raise self._fault(f"truncated: {size} bytes, cut in its header")
                if length > _HEADER_LIMIT:
                    raise self._fault(f"damaged header ({length} bytes long)")
                try:
                    header = json.loads(file.read(length))
                    version, array_bytes = header["version"], int(header["array_bytes"])
                except (ValueError, KeyError, TypeError) as error:
                    raise self._fault(f"damaged header ({type(error).__name__}: {error})") from error
                if version not in _READ:
                    raise self._fault(f"index version {version!r}; this program reads versions up to {VERSION}")
                if header.pop("crc32", None) not in (None, _crc32(header)):  # the first indices had none
                    raise self._fault("damaged header (its checksum is another)")
                begin = 16 + length + -(16 + length) % ALIGN
                if size != begin + array_bytes:
                    word = "truncated" if size < begin + array_bytes else "too long"
                    raise self._fault(f"{word}: {size} bytes, its header says {begin + array_bytes}")
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                # Lookups are scattered: the kernel's read-ahead would fetch 128 KiB for the four bytes of one label.
                mapped.madvise(mmap.MADV_RANDOM)
                return header, mapped, begin
        except OSError as error:
            raise files.failure(self.path, error) from error

    def _fault(self, what: str) -> InputError:
        return InputError(
            f"{self.path}: {what}; make it again: python launch/shards.py index SHARDS… --out {self.path}"
        )

    def shard_url(self, shard: int) -> str:
        """Where a shard is: a URL, or a path made absolute from the index's folder."""
        url = self._string(self._urls, shard)
        return url if is_remote(url) else os.path.normpath(os.path.join(self._home, url))

    @cached_property
    def hash(self) -> str:
        """Equal for equal data: sequence and content. Reads all digests of a file of version 1."""
        return self._hash or content_hash(self.sequence, self.digests())

    @property
    def remote(self) -> bool:
        """Whether some shard is at a URL."""
        # One search over all names, of perhaps 10⁵ shards; a path in an index is normalised and has no double slash.
        return b"://" in self._urls[1].tobytes()

    def digest(self, shard: int) -> str:
        """ "sha256:…", "etag:…" or both of a shard; empty where neither was recorded."""
        return self._string(self._digests, shard)

    def digests(self) -> Iterator[str]:
        """The digests of all shards."""
        return map(self.digest, range(self.num_shards))

    def etag(self, shard: int) -> str:
        """A remote shard's etag when it was indexed; empty where none is recorded."""
        return etag_of(self.digest(shard))

    def _string(self, table: tuple[np.ndarray, np.ndarray], item: int) -> str:
        ends, text = table
        found = os.fsdecode(text[int(ends[item]) : int(ends[item + 1])].tobytes())
        if "\0" in found:
            raise self._fault(f"damaged: {found!r} names nothing")
        return found

    def pieces(self, name: str, overlap: int = 0) -> Iterator[np.ndarray]:
        """The array `name` ("labels", …) from its beginning to its end, a few megabytes at a time.

        Each piece holds the first `overlap` elements of the next as well.
        """
        array = getattr(self, name)
        for at in range(0, len(array) - overlap, _PIECE):
            piece = array[at : at + _PIECE + overlap]
            begin = self._starts[name] + at * array.itemsize
            page = begin - begin % mmap.PAGESIZE
            self._mapped.madvise(mmap.MADV_WILLNEED, page, begin + piece.nbytes - page)
            yield piece

    def check_content(self) -> None:
        """Raise InputError where the arrays are not those the file was written with; reads all of them."""
        found = self.rehash()
        if found != self.sequence:
            raise self._fault(f"damaged: its arrays hash to {found[:12]}…, its header says {self.sequence[:12]}…")
        found = content_hash(found, self.digests())
        if found != self.hash:
            raise self._fault(f"damaged: its digests hash to {found[:12]}…, its header says {self.hash[:12]}…")
        # What the hash leaves out because it does not determine the samples' sequence.
        last = self.offsets[self.first[1:] - 1].astype(np.int64) * BLOCK
        wrong = np.flatnonzero((last >= self.data_end) | (self.data_end > self.shard_bytes))
        if len(wrong):
            row = int(wrong[0])
            raise self._fault(
                f"damaged: the samples of shard {row} begin at byte {last[row]} at the latest, end at "
                f"{self.data_end[row]}, and the shard has {self.shard_bytes[row]} bytes"
            )

    def rehash(self) -> str:
        """The hash of the samples' sequence computed anew from the arrays; reads all of them."""
        counts = (np.diff(piece) for piece in self.pieces("label_starts", 1)) if self.multilabel else None
        shard_samples = np.diff(self.first)
        return sequence_hash(
            shard_samples, self.pieces("offsets"), self.pieces("key_hashes"), counts, self.pieces("labels")
        )
