"""Tests that damage inside the packed pixels of a TIFF is found, whatever the packing."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import pytest
import skimage.data
from encoding import encode

from finetune.data.findings import BadImage
from finetune.data.images import decode_image

PACKINGS = ["tiff_adobe_deflate", "tiff_deflate", "tiff_lzw", "jpeg"]
MOST_PIXELS = 10**6
PHOTO = skimage.data.astronaut()[:240:2, :320:2]


def pack(packing, mode="RGB", **options):
    picture = PIL.Image.fromarray(PHOTO).convert(mode)
    return encode("TIFF", picture, compression=packing, **({"quality": 95} if packing == "jpeg" else {}), **options)


def decode(data):
    return decode_image(np.frombuffer(data, np.uint8), MOST_PIXELS)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("packing", [*PACKINGS, "packbits", "raw"])
def test_a_whole_tiff_is_read_as_it_was_written(packing, mode):
    expected = np.array(PIL.Image.fromarray(PHOTO).convert(mode).convert("RGB"), int)
    assert np.abs(decode(pack(packing, mode)) - expected).mean() < (2 if packing == "jpeg" else 1e-9)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("damage", ["zeros", "random"])
def test_a_tiff_with_a_part_overwritten_is_refused(packing, damage):
    data, random = bytearray(pack(packing)), np.random.default_rng(2)
    start, length = len(data) // 3, min(2048, len(data) // 4)
    data[start : start + length] = bytes(length) if damage == "zeros" else random.bytes(length)
    with pytest.raises(BadImage, match="damaged|cannot be decoded|missing"):
        decode(bytes(data))


def test_one_wrong_byte_of_deflated_pixels_is_found_by_their_checksum():
    data = bytearray(pack("tiff_adobe_deflate"))
    data[len(data) // 2] ^= 1
    with pytest.raises(BadImage, match="damaged|missing"):
        decode(bytes(data))


@pytest.mark.parametrize("packing", ["tiff_adobe_deflate", "tiff_lzw"])
def test_every_strip_is_looked_at(packing):
    data = bytearray(pack(packing, strip_size=160 * 3 * 8))
    tags = PIL.Image.open(io.BytesIO(data)).tag_v2
    last, length = tags[273][-1], tags[279][-1]
    assert len(tags[273]) == 15
    data[last + length // 2 : last + length] = b"\xff" * (length - length // 2)
    with pytest.raises(BadImage):
        decode(bytes(data))
