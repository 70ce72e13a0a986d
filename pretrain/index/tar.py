"""The samples of a tar as WebDataset groups them, found from its headers alone; every fault is named."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

from pretrain.errors import InputError
from pretrain.storage.filekind import IMAGE_ENDINGS, IMAGE_SUFFIXES, LOOKED_AT, TAR, file_kind
from pretrain.storage.shardfile import ShardReader
from pretrain.storage.store import Extent

BLOCK = 512
LABEL_SUFFIXES = ("cls", "json")
_LONGEST_HEADER = 1 << 20  # bytes of one extended header; the longest path a kernel takes is 4,096
_LONGEST_END = 1 << 20  # bytes of zeros behind the samples: the most that tar writes with records of usual size
# PAX records that do not change names or sizes. Global ones apply to every later member, also to those of a byte range
# that starts after them.
_HARMLESS = ("comment", "mtime", "atime", "ctime", "uid", "gid", "uname", "gname")
HARMLESS_PAX = frozenset(key.encode() for key in _HARMLESS)
_OF_SAMPLES = frozenset((*LABEL_SUFFIXES, *(ending[1:] for ending in IMAGE_ENDINGS)))  # of files of samples
_SORTED = "tar --sort=name -cf SHARD FOLDER writes them so"


@dataclass(frozen=True)
class TarSample:
    """One sample: its key, the byte its first header begins at, and suffix → (first byte, bytes) of its members."""

    key: str
    begin: int
    members: dict[str, tuple[int, int]]

    @property
    def image(self) -> str:
        """The suffix of its one image."""
        return next(suffix for suffix in IMAGE_SUFFIXES if suffix in self.members)

    @property
    def label(self) -> str:
        """The suffix of its label: `cls` where there is one (a json beside it is metadata), else `json`."""
        return next(suffix for suffix in LABEL_SUFFIXES if suffix in self.members)


_File = tuple[tarfile.TarInfo, str, str]  # header, key, suffix


def key_and_suffix(name: str) -> tuple[str, str] | None:
    """Member name → (key, suffix) by WebDataset's rule: cut at the first dot of the last path component.

    None where there is no key or no suffix (`README`, `.DS_Store`, `a/._0001.jpg`).
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and dot else None


def _of_a_sample(suffix: str) -> bool:
    """Whether a file with that suffix belongs to a sample: `2.jpg` too, of `x.2.jpg`, which is cut at the wrong dot."""
    return suffix.rpartition(".")[2] in _OF_SAMPLES


class ShardTar:
    """Walks the headers of one tar.

    Afterwards it holds `data_end`, the byte its end-of-archive marker begins at, and how many files were passed over
    because they can hold no sample. tarfile, which webdataset reads with, ends without an error where a header is cut
    or damaged; this walk must arrive at a marker of zeros with nothing behind it.
    """

    def __init__(self, file: BinaryIO, url: str) -> None:
        self.file = file
        self.url = url
        self.size = file.seek(0, os.SEEK_END)
        self.data_end = -1
        self.passed_over = 0
        self.first_passed_over = ""

    def samples(self) -> Iterator[TarSample]:
        """Every sample in order. Raises InputError naming shard, member and byte at the first fault."""
        seen: dict[str, int] = {}
        files = self._files()
        for sample in self._groups(files):
            if sample.key in seen:
                raise self._fault(
                    f"key {sample.key!r} again at byte {sample.begin}, first at byte {seen[sample.key]}; keys are "
                    f"unique and the members of a sample stand together ({_SORTED})"
                )
            if any(map(_of_a_sample, sample.members)):
                self._check_whole(sample, files)
                seen[sample.key] = sample.begin
                yield sample
            else:
                self._pass_over(f"{sample.key}.{next(iter(sample.members))}", sample.begin, len(sample.members))
        if not seen:
            passed = f": passed over {self.passed_over} files, the first {self.first_passed_over}"
            raise self._fault(
                f"holds no samples{passed if self.passed_over else ' and no files'}; a sample is an image, "
                f"KEY.{'|'.join(IMAGE_SUFFIXES)}, and its label, KEY.cls or KEY.json"
            )

    def _groups(self, files: Iterator[_File]) -> Iterator[TarSample]:
        """Neighbouring files with one key."""
        group: TarSample | None = None
        for info, key, suffix in files:
            if group is None or key != group.key:
                if group is not None:
                    yield group
                group = TarSample(key, info.offset, {})
            if suffix in group.members:
                raise self._fault(f"member {info.name!r} twice, again at byte {info.offset}; keys are unique")
            group.members[suffix] = (info.offset_data, info.size)
        if group is not None:
            yield group

    def _pass_over(self, name: str, begin: int, files: int = 1) -> None:
        self.first_passed_over = self.first_passed_over or f"{name!r} at byte {begin}"
        self.passed_over += files

    def _check_whole(self, sample: TarSample, rest: Iterator[_File]) -> None:
        """Raise InputError where a sample lacks its one image or its label; `rest` are the files behind it."""
        found = ", ".join(sample.members)
        images = [suffix for suffix in sample.members if suffix in IMAGE_SUFFIXES]
        labelled = any(suffix in sample.members for suffix in LABEL_SUFFIXES)
        if len(images) == 1 and labelled:
            return
        where = f"sample {sample.key!r} at byte {sample.begin}"
        if len(images) < 2 and (other := self._apart(sample, rest)):
            raise self._fault(
                f"the parts of sample {sample.key!r} stand apart: .{found} at byte {sample.begin}, {other}; a sample's "
                f"files stand together ({_SORTED})"
            )
        if len(images) != 1:
            count = "no image" if not images else "more than one image"
            raise self._fault(
                f"{where} has {count}: members {found}; one of {', '.join(IMAGE_SUFFIXES)} is needed "
                "(WebDataset cuts a name at its first dot)"
            )
        raise self._fault(
            f"{where} has no label: members {found}; a .cls holding one integer, or a .json holding a "
            "list of integers, is needed"
        )

    @staticmethod
    def _apart(sample: TarSample, rest: Iterator[_File]) -> str:
        """Where else in the shard a file with that key is; empty for nowhere."""
        with suppress(InputError):  # a further fault, behind the one at hand
            for info, key, suffix in rest:
                if key == sample.key:
                    return f".{suffix} at byte {info.offset}"
        return ""

    def _files(self) -> Iterator[_File]:
        """Every file that has a key and a suffix.

        Folders and WebDataset's own `__meta__` files are ignored. Others that can hold no sample are counted: hidden
        ones (`._x.jpg`, `.DS_Store`), those without a suffix, and links or devices whose name is not a sample's.
        """
        for info in self._members():
            name = info.name
            if info.isdir() or (name.startswith("__") and name.split("/")[0].endswith("__")):
                continue
            split = key_and_suffix(name)
            if split is not None and _of_a_sample(split[1]):
                self._check_name(info)
                yield info, *split
            elif split is None or not info.isreg():
                self._pass_over(name, info.offset)
            else:
                yield info, *split

    def _check_name(self, info: tarfile.TarInfo) -> None:
        name = info.name
        if any(ord(letter) < 32 or letter in "\\\x7f" for letter in name) or name[0] == "/" or ".." in name.split("/"):
            raise self._fault(
                f"member {name!r} at byte {info.offset}: absolute names, '..', backslashes and control characters are "
                "refused"
            )
        if not info.isreg():
            what = (
                "a link, of which tar -h --hard-dereference makes a file" if info.issym() or info.islnk() else "no file"
            )
            raise self._fault(f"member {name!r} at byte {info.offset} is {what}; samples are plain files")

    def _members(self) -> Iterator[tarfile.TarInfo]:
        self.file.seek(0)
        tar: tarfile.TarFile | None = None
        begin: int | None = None  # of a member's first header; before the first member, global ones may stand
        while True:
            try:
                if tar is None:
                    # tarfile decodes names in the locale's encoding by default; readers take them for UTF-8.
                    headers = _HeaderReads(self)
                    tar = tarfile.TarFile(fileobj=headers, encoding="utf-8", errors="surrogateescape")
                info = tar.next()
            # tarfile also raises ValueError, for damaged extended headers and impossible sizes.
            except (tarfile.TarError, ValueError) as error:
                raise self._unreadable(tar, error) from error
            if info is None:
                break
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header
            foreign = set(tar.pax_headers) - set(_HARMLESS)
            if foreign:
                raise self._fault(f"global PAX header sets {', '.join(sorted(foreign))}; write plain members")
            if begin is not None and info.offset != begin:  # it would count as bytes of the sample before it
                raise self._fault(f"global PAX header at byte {begin}, behind the first member; write plain members")
            if info.size < 0 or info.offset % BLOCK:
                raise self._fault(f"member {info.name!r} at byte {info.offset} has an impossible size or offset")
            if info.issparse():
                raise self._fault(
                    f"member {info.name!r} at byte {info.offset} is stored sparse, its zeros left out, so its bytes do "
                    "not stand in the shard; write it without tar's --sparse (-S)"
                )
            end = info.offset_data + (-(-info.size // BLOCK) * BLOCK if info.isreg() else 0)
            if end > self.size:
                raise self._fault(
                    f"truncated: {self.size} bytes, cut in the data of member {info.name!r}, which ends at "
                    f"byte {end}; copy or write the shard again"
                )
            begin = tar.offset
            yield info
        self.data_end = tar.offset
        self._check_end()

    def _check_end(self) -> None:
        end = self.data_end
        self.file.seek(end)
        block = self.file.read(BLOCK)
        again = "copy or write the shard again"
        if not block:
            raise self._fault(
                f"truncated: {self.size} bytes and no end-of-archive marker; cut between two members, or its "
                f"writer did not close it; {again}"
            )
        if len(block) < BLOCK:
            raise self._fault(f"truncated: {self.size} bytes, cut in the header at byte {end}; {again}")
        if block.count(0) != BLOCK:
            raise self._fault(f"damaged: no tar header at byte {end}; {again}")
        while rest := self.file.read(1 << 20):
            if rest.count(0) != len(rest):
                raise self._fault(
                    f"data after the end-of-archive marker at byte {end}, which readers never see; write one "
                    "archive (tar -A joins two)"
                )
        if self.size - end > _LONGEST_END:
            raise self._fault(
                f"nothing but zeros from byte {end} to {self.size}, as where a copy was cut off whose room was taken "
                f"beforehand; copy or write the shard again, or, if it is whole, cut off the zeros: truncate -s "
                f"{end + 2 * BLOCK} FILE"
            )

    def _unreadable(self, tar: tarfile.TarFile | None, error: Exception) -> InputError:
        if tar is not None:
            return self._fault(f"damaged at byte {tar.offset}: {error}; copy or write the shard again")
        self.file.seek(0)
        start = self.file.read(LOOKED_AT)
        kind = file_kind(start)
        if kind.startswith("compressed"):
            return self._fault(f"{kind}; shards are plain tars, whose samples can be found by byte: decompress it")
        if self.size < BLOCK and kind in ("", "an empty file", "a text", TAR):
            shown = f" ({start[:60].decode()!r})" if kind == "a text" and start.isascii() else ""
            return self._fault(
                f"truncated: {self.size} bytes{shown}, cut in the header at byte 0; copy or write it again"
            )
        return self._fault(f"not a tar archive: {f'it is {kind}' if kind else error}")

    def _fault(self, what: str) -> InputError:
        return InputError(f"{self.url}: {what}")


class _HeaderReads(io.RawIOBase):
    """A shard as tarfile sees it: no read is longer than a header can be, whatever size a damaged header claims."""

    def __init__(self, shard: ShardTar) -> None:
        self._shard = shard
        self._file = shard.file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LONGEST_HEADER:
            raise InputError(f"{self._shard.url}: extended header of {size} bytes before byte {self._file.tell()}")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def read_sample(extent: Extent) -> tuple[str, dict[str, bytes]]:
    """The one sample in an extent: (key, suffix → data). Raises InputError if it is not one."""
    data = bytes(ShardReader().read(extent))
    where = f"{extent.url} from byte {extent.begin}"
    samples = list(ShardTar(io.BytesIO(data + bytes(2 * BLOCK)), where).samples())
    if len(samples) != 1:
        raise InputError(f"{where}: {len(samples)} samples where the index has one; index the shards again")
    sample = samples[0]
    return sample.key, {suffix: data[at : at + size] for suffix, (at, size) in sample.members.items()}
