"""Whether the packed strips or tiles of a TIFF are whole: libtiff passes over their checksums, and over bad JPEGs."""

from __future__ import annotations

import zlib

import PIL.Image
import simplejpeg

from finetune.findings import BadImage

PACKING_TAG, TABLES_TAG = 259, 347
# Where the parts begin, and how long they are.
PART_TAGS = ((273, 279), (324, 325))
DEFLATE, JPEG = (8, 32946), 7
UNPACKED_AT_ONCE = 2**20


def check_parts(image: PIL.Image.Image, data: bytes) -> None:
    """Checks the parts of a TIFF that are packed by deflate or as JPEG.

    Args:
        image: opened, of any format.
        data: of the file.

    Raises:
        BadImage: one is damaged, or cut short.
    """
    tags = getattr(image, "tag_v2", {})
    packing = tags.get(PACKING_TAG)
    if packing not in (*DEFLATE, JPEG):
        return
    for start_tag, length_tag in PART_TAGS:
        for start, length in zip(tags.get(start_tag, ()), tags.get(length_tag, ()), strict=False):
            part = data[start : start + length]
            # A part of no bytes is one of zeros.
            if part and packing == JPEG:
                _check_jpeg(part, tags.get(TABLES_TAG, b""))
            elif part:
                _check_deflated(part)


def _check_deflated(part: bytes) -> None:
    unpacker = zlib.decompressobj()
    try:
        while part:
            unpacker.decompress(part, UNPACKED_AT_ONCE)
            part = unpacker.unconsumed_tail
    except zlib.error as error:
        raise BadImage("unreadable", "it is damaged: a checksum of its pixels is wrong") from error
    if not unpacker.eof:
        raise BadImage("truncated", "a part of its pixels is missing")


def _check_jpeg(part: bytes, tables: bytes) -> None:
    """Decodes a part strictly, with the tables that all parts share, which end and begin with marks of their own."""
    try:
        simplejpeg.decode_jpeg(tables[:-2] + part[2:] if tables else part, "GRAY")
    except ValueError as error:
        raise BadImage("unreadable", f"it is damaged: {str(error).removeprefix('Corrupt JPEG data: ')}") from error
