"""Weights at a URL (http, https, s3, gs), copied once to this host's cache.

The cache is `vit-foundry/weights` in `$XDG_CACHE_HOME`, or in `~/.cache`. A copy is named by the URL and by what the
server says of the file's version, so another version of it is another copy. Of a file whose version the server does
not tell, size aside, a copy is made each time.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pretrain import files
from pretrain.console import say
from pretrain.errors import InputError, StorageError
from pretrain.progress import Progress
from pretrain.storage.store import Extent, Stat, object_name, read_range, stat, url_under
from pretrain.weights.tensorfile import ENDINGS, INDEX
from pretrain.workers import in_threads

_PART = 1 << 25  # bytes of one request
_AT_ONCE = 8  # requests


@dataclass(frozen=True)
class RemoteFile:
    """A file of weights at a URL, in one version."""

    url: str
    version: Stat

    def copied(self, path: Path) -> bool:
        """Whether a copy of this version is at `path`."""
        return bool(self.version.etag or self.version.modified) and files.is_file(path)


@dataclass(frozen=True)
class Remote:
    """Weights at a URL: one file, or the files of a folder."""

    url: str
    files: Sequence[RemoteFile]

    @classmethod
    def find(cls, url: str) -> Remote:
        """Ask the server what is there. A folder is one of Hugging Face's: `config.json` and `model.safetensors`.

        Raises:
            InputError: nothing there, or not to be had; StorageError: for now.
        """
        if url.endswith(ENDINGS):
            return cls(url, [RemoteFile(url, stat(url))])
        described = [_of_folder(url, "config.json"), *_if_there(url, "preprocessor_config.json")]
        if whole := _if_there(url, "model.safetensors"):
            return cls(url, [*described, *whole])
        index = _of_folder(url, INDEX)  # a large network is cut into several files, which an index names
        try:
            parts = set(json.loads(b"".join(_content(index)))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            parts = set()
        if not parts or not all(isinstance(part, str) for part in parts):
            raise InputError(f"{index.url}: no weight_map of tensor names to files of this folder")
        return cls(url, [*described, index, *(_of_folder(url, part) for part in sorted(parts))])

    @property
    def local(self) -> Path:
        """Where the copy on this host is: a file or folder, whether or not it is there yet."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        told = [(file.url, file.version.size, file.version.etag, str(file.version.modified)) for file in self.files]
        name = hashlib.sha256(json.dumps([self.url, *told]).encode()).hexdigest()[:32]
        folder = cache / "vit-foundry" / "weights" / name
        return folder / object_name(self.url) if self.url.endswith(ENDINGS) else folder

    def download(self) -> None:
        """Copy what is not copied yet; shows progress.

        Raises:
            InputError: a file has changed meanwhile, or cannot be written; StorageError: the server does not answer.
        """
        local = self.local
        folder = local.parent if self.url.endswith(ENDINGS) else local
        missing = [file for file in self.files if not file.copied(folder / object_name(file.url))]
        if not missing:
            return
        files.make_folder(folder)
        size = sum(file.version.size for file in missing)
        with Progress(f"downloading {self.url}", "bytes", size) as progress:
            for file in missing:
                with files.atomic_write(folder / object_name(file.url)) as copy:
                    for part in _content(file, progress.advance):
                        copy.write(part)
        say(f"{self.url}: {size / 1e6:,.0f} MB copied to {folder}")


def _of_folder(folder: str, name: str) -> RemoteFile:
    url = url_under(folder, name)
    return RemoteFile(url, stat(url))


def _if_there(folder: str, name: str) -> list[RemoteFile]:
    try:
        return [_of_folder(folder, name)]
    except StorageError:
        raise
    except InputError:
        return []


def _content(file: RemoteFile, advance: Callable[[int], None] = lambda count: None) -> Iterator[bytes]:
    """The bytes of a file, part by part."""
    version = file.version

    def read(begin: int, stop: threading.Event) -> bytes:
        end = min(begin + _PART, version.size)
        return read_range(Extent(file.url, begin, end, version.etag, version.size), version, stop=stop)

    with closing(in_threads(read, range(0, version.size, _PART), _AT_ONCE)) as parts:
        for part in parts:
            yield part
            advance(len(part))
