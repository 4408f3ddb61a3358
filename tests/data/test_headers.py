"""Which image files are damaged: every kind of damage is found, and nothing sound is refused."""

import numpy as np
import pytest
import skimage.data
from corpus import encode, photo
from PIL import Image

from finetune.core.options import UserError
from finetune.data.headers import read_frame
from finetune.data.images import read_image
from finetune.data.inspection import inspect_image


def damage(data, rng):
    """Yields a JPEG with 4 KiB of its pixels zeroed, random or missing, cut, and cut with an end mark appended."""
    place = int(rng.integers(read_frame(data).scan + 500, len(data) - 5000))
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


@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_one_damaged_byte_of_a_png_is_found_wherever_it_is(tmp_path, mode):
    picture = Image.fromarray(photo(0, (16, 20)))
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
