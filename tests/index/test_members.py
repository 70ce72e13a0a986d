"""The walk over plain members: what tarfile reads, or nothing."""

import io
import random
import tarfile

import pytest
import webdataset

from pretrain.index.members import plain_members

FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def tar_of(names, form, **fields):
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w", format=form) as tar:
            for number, name in enumerate(names):
                info = tarfile.TarInfo(name)
                info.size = 300 * number
                for field, value in fields.items():
                    setattr(info, field, value)
                tar.addfile(info, io.BytesIO(bytes([number % 256]) * info.size))
            end = tar.offset
        return file.getvalue()[:end]


def by_tarfile(data):
    with tarfile.open(fileobj=io.BytesIO(data), mode="r|*") as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar if info.isreg()]


NAMES = ["0001.jpg", "0001.cls", "a/b/c.d.png", "x" * 90 + ".jpg", "0002.txt", "über.png"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fields", [{}, {"mtime": 12345.678}, {"uname": "someone", "uid": 99999999}], ids=str)
def test_usual_members_are_walked_over_and_are_those_of_tarfile(form, fields):
    if form != "pax" and "mtime" in fields:
        fields = {"mtime": 12345}
    if form == "ustar" and "uid" in fields:
        fields = {"uid": 9999}
    names = NAMES if form != "pax" else NAMES[:-1]  # PAX puts a name that is not ASCII into a record
    data = tar_of(names, FORMS[form], **fields)
    assert plain_members(data) == by_tarfile(data)
    assert len(plain_members(data)) == len(names)


def test_what_webdatasets_writer_writes_is_walked_over():
    with io.BytesIO() as file:
        with webdataset.TarWriter(file) as tar:
            for number in range(5):
                tar.write({"__key__": f"a/{number:08d}", "jpg": b"\xff\xd8" * number, "cls": number, "json": {"a": 1}})
        data = file.getvalue()
    data = data[: len(data.rstrip(b"\0")) + 511 >> 9 << 9]
    assert plain_members(data) == by_tarfile(data)
    assert len(plain_members(data)) == 15


def test_a_ustar_name_in_two_fields_is_one_name():
    data = tar_of(["f" * 80 + "/" + "g" * 90 + ".png"], tarfile.USTAR_FORMAT)
    assert plain_members(data) == by_tarfile(data)


@pytest.mark.parametrize(
    ("names", "form", "fields"),
    [
        (["n" * 150 + ".jpg"], "gnu", {}),
        (["n" * 150 + ".jpg"], "pax", {}),
        (["über.png"], "pax", {}),
        (["a"], "ustar", {"type": tarfile.DIRTYPE}),
        (["a"], "ustar", {"type": tarfile.SYMTYPE, "linkname": "b"}),
        (["__meta__.json"], "ustar", {}),
    ],
)
def test_the_unusual_is_left_to_tarfile(names, form, fields):
    assert plain_members(tar_of(names, FORMS[form], **fields)) is None


def test_the_times_of_an_incremental_archive_are_left_to_tarfile():
    header = bytearray(tar_of(["a.jpg"], tarfile.GNU_FORMAT)[:512])
    header[345:357] = b"14000000000\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    assert plain_members(bytes(header)) is None


def test_a_range_that_is_cut_or_ends_in_zeros_is_left_to_tarfile():
    data = tar_of(NAMES, tarfile.GNU_FORMAT)
    assert all(plain_members(data[:cut]) is None for cut in range(1, len(data), 300) if cut % 512)
    assert plain_members(data[:-512]) is None
    assert plain_members(data + bytes(512)) is None
    assert plain_members(b"") == []


def test_records_without_their_file_or_with_more_behind_them_are_left_to_tarfile():
    data = bytearray(tar_of(["a.jpg", "b.jpg"], tarfile.PAX_FORMAT, mtime=1.5))
    assert len(plain_members(bytes(data))) == 2
    assert data[2048 + 156 - 512 : 2048 + 157 - 512] == b"x", "the second file's"
    assert plain_members(bytes(data[: 1536 + 1024])) is None
    size = int(data[124:135], 8)
    data[512 + size : 512 + size + 14] = b"14 path=c.png\n"
    assert plain_members(bytes(data)) is None


@pytest.mark.parametrize("form", FORMS)
def test_whatever_bytes_change_it_is_tarfiles_answer_or_none(form):
    whole = tar_of(NAMES[:4], FORMS[form], mtime=1.5 if form == "pax" else 1)
    headers = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    draw, walked = random.Random(0), 0
    for _ in range(3000):
        data = bytearray(whole)
        at = draw.choice(headers)
        for _ in range(draw.randint(1, 3)):
            field = draw.choice([(0, 100), (124, 136), (148, 157), (257, 265), (345, 512), (512, len(data) - at)])
            data[at + draw.randrange(*field)] = draw.choice([0, 32, 48, 49, 55, draw.randrange(256)])
        if draw.random() < 0.8:  # a header whose checksum is wrong is refused for that alone
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        found = plain_members(bytes(data))
        if found is not None:
            walked += 1
            assert found == by_tarfile(bytes(data))
    assert walked > 500


def test_numbers_are_octal_digits_and_nothing_else():
    data = tar_of(["a.jpg"], tarfile.USTAR_FORMAT)
    odd = [b"0000000000_", b"-0000000000", b"+0000000001", b"00000000008", b"\x80" + bytes(10)]
    for digits in (*odd, bytes(11), b"\0" + b"0" * 9 + b"1"):  # what stands behind a zero byte does not count
        header = bytearray(data[:512])
        header[124:135] = digits
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        assert plain_members(bytes(header)) is None


def test_images_are_views_of_the_range():
    data = bytearray(tar_of(["a.jpg", "b.jpg"], tarfile.USTAR_FORMAT))
    (_, (name, image)) = plain_members(memoryview(data))
    assert (name, image) == ("b.jpg", bytes([1]) * 300)
    data[-512:] = bytes(512)
    assert not any(image)


def test_sums_beyond_16_bits_are_compared_whole():
    header = bytearray(tar_of(["a.jpg"], tarfile.USTAR_FORMAT)[:512])
    header[157:257] = b"\xff" * 100
    header[265:345] = b"\xff" * 80
    header[500:512] = b"\xff" * 12
    header[1:100] = b"\xff" * 99
    header[148:156] = b" " * 8
    total = sum(header)
    assert total > 65_521
    for said, walked in ((total, True), (total - 65_521, False)):
        header[148:156] = b"%06o\0 " % said
        assert (plain_members(bytes(header)) is not None) == walked
