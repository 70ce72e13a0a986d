"""The files in a range of whole tar members, where their headers are of the usual kinds."""

from __future__ import annotations

import zlib

from pretrain.stream.tar import BLOCK, HARMLESS_PAX

_POSIX, _GNU = b"ustar\x0000", b"ustar  \x00"


def plain_members(data: memoryview) -> list[tuple[str, memoryview]] | None:
    """Name and content of every file in `data`, whole members one after the other; None where tarfile must look.

    Understood are POSIX and GNU headers of plain files, their checksums right, and PAX records that say nothing of
    names or sizes: what WebDataset's writer and tar make of short names. A header takes tarfile 20 µs, with the
    interpreter's lock held against every decode thread of the rank, and a sample has two to four of them.
    """
    found: list[tuple[str, memoryview]] = []
    at, end = 0, len(data)
    while at < end:
        header = bytes(data[at : at + BLOCK])
        magic, size = header[257:265], _octal(header[124:136])
        if size is None or magic not in (_POSIX, _GNU) or not _is_whole(header):
            return None
        begin = at + BLOCK
        at = begin + -(-size // BLOCK) * BLOCK
        if at > end:
            return None
        kind = header[156:157]
        if kind in (b"0", b"\0"):
            name = _text(header[:100])
            if header[345]:
                if magic == _GNU:  # times of an incremental archive, which tarfile takes for part of the name
                    return None
                name = _text(header[345:500]) + b"/" + name
            if name.endswith(b"/") or name.startswith(b"__"):  # a folder; what webdataset keeps for itself
                return None
            found.append((name.decode("utf-8", "surrogateescape"), data[begin : begin + size]))
        elif kind != b"x" or any(data[begin + size : at]) or not _says_nothing(bytes(data[begin : begin + size])):
            return None
    return found


def _octal(digits: bytes) -> int | None:
    digits = digits.strip(b" \0")
    # No sign, no underscore, and no number base 256: what int() or tarfile would take besides.
    return int(digits, 8) if digits.isdigit() and b"8" not in digits and b"9" not in digits else None


def _is_whole(header: bytes) -> bool:
    """Whether a header has the sum that it says, its own eight bytes counted as spaces."""
    # Adler-32's lower half is the sum and 1, modulo 65,521: more than ASCII can add up to, and a fifth of sum()'s time.
    total = (zlib.adler32(header) & 0xFFFF) - 1 if header.isascii() else sum(header)
    return _octal(header[148:156]) == total - sum(header[148:156]) + 8 * ord(" ")


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _says_nothing(records: bytes) -> bool:
    """Whether PAX records, `LENGTH KEY=VALUE\\n` each, leave names and sizes as they are."""
    while records:
        length, space, _ = records.partition(b" ")
        if not (space and length.isdigit() and len(length) < int(length) <= len(records)):
            return False
        record, records = records[: int(length)], records[int(length) :]
        if record[len(length) + 1 :].partition(b"=")[0] not in HARMLESS_PAX or not record.endswith(b"\n"):
            return False
    return True
