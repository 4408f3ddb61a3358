"""Which image files are damaged: every kind of damage is found, and nothing sound is refused."""

import re

import numpy as np
import pytest
import skimage.data
from corpus import encode, photo
from PIL import Image

from finetune.core.options import UserError
from finetune.data.findings import BadImage
from finetune.data.headers import find_scan, has_zeroed_part, lacks_scans
from finetune.data.images import decode_image, read_image
from finetune.data.inspection import inspect_image


def damage(data, rng):
    """Yields a JPEG with 4 KiB of its pixels zeroed, random or missing, cut, and cut with an end mark appended."""
    place = int(rng.integers(find_scan(data) + 500, len(data) - 5000))
    before, after = data[:place], data[place + 4096 :]
    yield "zeroed", before + bytes(4096) + after
    yield "random", before + rng.bytes(4096) + after
    yield "missing", before + after
    yield "cut", data[:place]
    yield "cut, with an end mark", data[:place] + b"\xff\xd9"
    yield "a third, with an end mark", data[: len(data) // 3] + b"\xff\xd9"


@pytest.mark.parametrize(
    "option",
    ["quality", *(pytest.param(o, marks=pytest.mark.slow) for o in ("progressive", "optimize", "restart_marker_rows"))],
)
def test_damaged_jpegs_are_refused_by_check_and_training_alike(tmp_path, option):
    rng, path = np.random.default_rng(0), tmp_path / "a.jpg"
    missed, number = [], 0
    for name in ("astronaut", "coffee", "chelsea"):
        data = encode(
            "JPEG",
            getattr(skimage.data, name)()[:, :400],
            **{"quality": 90} | {option: 90 if option == "quality" else 1},
        )
        path.write_bytes(data)
        assert inspect_image(str(path), decode=True).fault is None
        for _ in range(8):
            for kind, damaged in damage(data, rng):
                path.write_bytes(damaged)
                fault = inspect_image(str(path), decode=True).fault
                number += 1
                missed += [kind] * (fault is None)
                for size in (None, (100, 100)):
                    if fault is None:
                        read_image(str(path), size)
                    else:
                        with pytest.raises(UserError, match=r"a\.jpg"):
                            read_image(str(path), size)
    assert len(missed) <= number // 100, missed


def test_zeros_that_decode_to_as_many_blocks_are_found(tmp_path):
    """Zeros of such a length are looked for: one in forty of 4 KiB ends where the pixels that it replaced did."""
    data = encode("JPEG", skimage.data.astronaut(), quality=90)
    place = find_scan(data) + 9000
    assert not has_zeroed_part(data)
    assert not has_zeroed_part(data[:place] + bytes(100) + data[place + 100 :])
    assert has_zeroed_part(data[:place] + bytes(600) + data[place + 600 :])
    # Behind the end mark they are of no account.
    assert not has_zeroed_part(data + bytes(5000))


def test_plain_surfaces_whose_codes_are_zeros_are_sound():
    plain = np.full((2000, 2000, 3), 255, np.uint8)
    plain[:64, :64] = photo(0, (64, 64))
    data = encode("JPEG", plain, optimize=True, quality=60)
    assert bytes(512) in data
    assert not has_zeroed_part(data)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_one_damaged_byte_of_a_png_is_found_wherever_it_is(tmp_path, mode):
    picture = Image.fromarray(photo(0, (24, 30)))
    picture = picture.quantize(40) if mode == "P" else picture.convert(mode)
    data, path = encode("PNG", picture), tmp_path / "a.png"
    path.write_bytes(data)
    assert inspect_image(str(path), decode=True).fault is None
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        assert inspect_image(str(path), decode=True).fault is not None, place
        with pytest.raises(UserError):
            read_image(str(path))


def test_a_photo_without_its_end_mark_is_whole_and_a_cut_one_is_not(tmp_path):
    data, path = encode("JPEG", skimage.data.astronaut()), tmp_path / "a.jpg"
    path.write_bytes(data[:-2])
    assert inspect_image(str(path), decode=True).fault is None
    assert inspect_image(str(path)).fault is None
    assert read_image(str(path)).shape == (512, 512, 3)
    path.write_bytes(data[:-200])
    assert inspect_image(str(path)).fault == ("truncated", "its end is missing")


def test_damaged_is_said_of_damaged_files_alone(tmp_path):
    deep = bytearray(encode("JPEG"))
    deep[deep.index(b"\xff\xc0") + 4] = 12
    for name, data, kind in (
        ("deep.jpg", bytes(deep), "unsupported"),
        ("page.jpg", encode("EPS"), "unsupported"),
        ("sound.jpg", b"RIFF" + (100).to_bytes(4, "little") + b"WAVE" + bytes(96), "not_an_image"),
    ):
        (tmp_path / name).write_bytes(data)
        for decode in (False, True):
            fault = inspect_image(str(tmp_path / name), decode).fault
            assert fault[0] == kind, name
            assert "damaged" not in fault[1]
        with pytest.raises(UserError) as caught:
            read_image(str(tmp_path / name))
        assert "damaged" not in str(caught.value).replace(str(tmp_path), "")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_progressive_jpeg_that_ends_between_two_scans_is_refused(mode):
    data = encode("JPEG", Image.fromarray(skimage.data.astronaut()).convert(mode), progressive=True)
    scans = [found.start() for found in re.finditer(rb"\xff\xda", data)]
    assert len(scans) > 5
    decode_image(np.frombuffer(data, np.uint8), 10**6)
    assert not lacks_scans(data)
    for place in scans[1:]:
        # What belongs to a scan stands before it: its Huffman tables.
        table = data.rfind(b"\xff\xc4", 0, place)
        for end in {place, table if table > max(scan for scan in scans if scan < place) else place}:
            cut = data[:end] + b"\xff\xd9"
            assert lacks_scans(cut)
            with pytest.raises(BadImage, match="its last scans are missing"):
                decode_image(np.frombuffer(cut, np.uint8), 10**6)
