"""What an image file says of itself before its pixels are decoded: sides, orientation, transparency, length."""

from __future__ import annotations

import contextlib
import os
import re
import struct
import warnings
import zlib
from typing import BinaryIO, NamedTuple

import PIL.Image

from configs import MAX_IMAGE_PIXELS
from finetune.data.findings import BadImage
from finetune.data.tiffs import TIFF_STARTS, open_header

try:
    import pillow_heif
except ImportError:
    # Optional: reads HEIC, the format of iPhones.
    pillow_heif = None
else:
    pillow_heif.register_heif_opener()

# Pillow warns about tags that it skips. `read_header` checks the number of pixels.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)

# Pillow decodes these formats where OpenCV does not. Some of its other readers would start programs.
PILLOW_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "AVIF", "HEIF", "JPEG2000", "PPM", "TGA")
PILLOW_FORMATS += ("ICO", "PCX", "SGI", "DDS", "QOI", "PSD")
# The last bytes of a whole file. The compressed pixels of a JPEG never contain its end mark.
END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
# Where the header has the file's length, and the number to add to it.
LENGTH_FIELDS = {b"RIFF": (4, 8), b"BM": (2, 0)}
JPEG_START = b"\xff\xd8\xff"
PNG_START = b"\x89PNG\r\n\x1a\n"
OTHER_STARTS = (b"GIF8", b"BM", b"RIFF", *TIFF_STARTS)
PFM_STARTS = (b"Pf\n", b"PF\n", b"Pf ", b"PF ")
GIT_LFS_START = b"version https://git-lfs"
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
# The exceptions of Pillow's readers on damaged files.
PILLOW_ERRORS = (OSError, ValueError, SyntaxError, EOFError, ArithmeticError, LookupError, TypeError, RuntimeError)
PILLOW_ERRORS += (struct.error, zlib.error, MemoryError, AttributeError)
# Deflate, the densest common compression, makes 1,032 bytes of one. A header that claims more pixels than that is
# damaged, or made to fill the memory. Small pictures of one colour may be denser in other formats.
MOST_BITS_A_BYTE, ALWAYS_POSSIBLE_PIXELS = 8 * 1032, 2**24
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# PNG chunks that may contain an orientation, before or after the pixels.
PNG_TEXTS = {b"eXIf", b"tEXt", b"zTXt", b"iTXt"}
TRANSPARENT_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
ORIENTATION_TAG = 0x0112


def reads_heic() -> bool:
    """Returns whether the package that reads HEIC is installed."""
    return pillow_heif is not None


def read_header(file: BinaryIO, max_pixels: int = MAX_IMAGE_PIXELS) -> PIL.Image.Image | None:
    """Reads the header of an open image file with Pillow, without decoding a pixel; None if Pillow lacks the format.

    Raises:
        BadImage: the header is damaged or claims more than `max_pixels`, the file is a Git LFS pointer, or reading it
            needs a package that is not installed.
    """
    PIL.Image.MAX_IMAGE_PIXELS = max_pixels
    start, size = file.read(26), file.seek(0, os.SEEK_END)
    file.seek(0)
    if start.startswith(PFM_STARTS):
        raise BadImage("unsupported", "it is a PFM, whose values OpenCV would round: save it as a float TIFF")
    try:
        image = _open(file)
        pixels = image.size[0] * image.size[1]
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        pixels = int(re.search(r"\d+", str(error))[0])
    except PILLOW_ERRORS as error:
        if fault := _find_header_fault(start, file):
            raise fault from error
        return None
    if pixels > max_pixels:
        raise BadImage("too_many_pixels", f"it has {pixels:,} pixels, more than max_image_pixels ({max_pixels:,})")
    bits = start[24] * PNG_CHANNELS[start[25]] if image.format == "PNG" else 1
    if pixels * bits > size * MOST_BITS_A_BYTE and pixels > ALWAYS_POSSIBLE_PIXELS:
        raise BadImage("unreadable", f"its header claims {pixels:,} pixels, which {size:,} bytes cannot hold")
    return image


def _open(file: BinaryIO) -> PIL.Image.Image:
    """Opens an image with Pillow; a TIFF whose type of values Pillow does not know gets a substitute header."""
    try:
        return PIL.Image.open(file)
    except PIL.UnidentifiedImageError:
        if (image := open_header(file)) is None:
            raise
        return image


def _find_header_fault(start: bytes, file: BinaryIO) -> BadImage | None:
    """Returns why Pillow cannot open a file of a known format; None if the format is unknown."""
    if start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS and pillow_heif is None:
        return BadImage("needs_package", "it is HEIC, which needs a package: pip install pillow-heif")
    if start.startswith(JPEG_START) and (bits := read_frame(_read_all(file)).bits) > 8:
        return BadImage("unsupported", f"it is a JPEG of {bits} bits per channel")
    if start.startswith((JPEG_START, PNG_START[:4])):
        return BadImage("unreadable", "its header is damaged or cut short")
    if start.startswith(OTHER_STARTS) and not (start.startswith(b"RIFF") and start[8:12] != b"WEBP"):
        return BadImage("unreadable", "its header cannot be read")
    if start.startswith(GIT_LFS_START):
        return BadImage("not_an_image", "it is a Git LFS pointer: git lfs pull fetches the image")
    return None


def check_length(start: bytes, size: int) -> None:
    """Raises BadImage if a file of `size` bytes is shorter than its first 12 bytes say."""
    for name, (position, more) in LENGTH_FIELDS.items():
        if start.startswith(name) and int.from_bytes(start[position : position + 4], "little") + more > size:
            raise BadImage("truncated", "it is shorter than its header says")


def lacks_end(image: PIL.Image.Image, tail: bytes, file: BinaryIO) -> bool:
    """Returns whether a file has no end mark. If its last bytes, `tail`, don't end with it, the whole file is read."""
    mark = END_MARKS.get(image.format)
    if mark is None or tail.endswith(mark):
        return False
    data = _read_all(file)
    return data.find(mark, read_frame(data).scan) < 0


def _read_all(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()


def find_orientation(image: PIL.Image.Image) -> int:
    """Returns the orientation of an image by its EXIF or XMP, 1 to 8; 1, upright, if it has none.

    A PNG with its metadata after the pixels must be loaded first.
    """
    value: object = 1
    with contextlib.suppress(*PILLOW_ERRORS):
        # The getexif of PNG would decode the whole image.
        value = PIL.Image.Image.getexif(image).get(ORIENTATION_TAG, 1)
    # Some writers use another type than the standard's.
    value = value[0] if isinstance(value, bytes | tuple) and len(value) else value
    return int(value) if value in range(2, 9) else 1


def is_transparent(image: PIL.Image.Image) -> bool:
    """Returns whether an image's header declares transparency."""
    return image.mode in TRANSPARENT_MODES or "transparency" in image.info


class JpegFrame(NamedTuple):
    """How a JPEG's pixels are coded: the second byte of the frame's marker, bits per channel, and where they begin.

    Unknown values are 0. Thumbnails before the pixels, at `scan`, have end marks of their own.
    """

    marker: int = 0
    bits: int = 0
    scan: int = 0

    @property
    def is_ordinary(self) -> bool:
        """Whether all readers know this kind: 8 bits, baseline or progressive, not lossless."""
        return self.marker in (0xC0, 0xC1, 0xC2) and self.bits == 8


def read_frame(data: bytes) -> JpegFrame:
    """Returns how the pixels of a JPEG file are coded."""
    frame, position = JpegFrame(), 2
    while data[:2] == JPEG_START[:2] and position + 4 <= len(data) and data[position] == 0xFF:
        marker, content = data[position + 1], position + 4
        if marker == 0xDA:
            return frame._replace(scan=content)
        # The other three of this range are tables and an extension.
        if marker in range(0xC0, 0xD0) and marker not in (0xC4, 0xC8, 0xCC) and not frame.marker:
            frame = JpegFrame(marker, int.from_bytes(data[content : content + 1]))
        position += 2 + int.from_bytes(data[position + 2 : content], "big")
    return frame


def check_chunks(data: bytes) -> bool:
    """Checks the lengths and checksums of a PNG's chunks: OpenCV allocates whatever a length claims.

    Returns whether Pillow must decode it: OpenCV 4.12 crashes on damaged animations, and some files have metadata after
    the pixels. Raises BadImage if a chunk is damaged.
    """
    view, position, has_pixels, needs_pillow = memoryview(data), len(PNG_START), False, False
    while position + 8 <= len(data):
        name, length = data[position + 4 : position + 8], int.from_bytes(data[position : position + 4], "big")
        end = position + 12 + length
        if end > len(data) and END_MARKS["PNG"] not in data[position:]:
            break
        if end > len(data):
            raise BadImage("unreadable", "it is damaged: a part of it is longer than the file")
        if zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise BadImage("unreadable", f"it is damaged: the checksum of its part {ascii(name)[2:-1]} is wrong")
        has_pixels |= name == b"IDAT"
        needs_pillow |= name in PNG_TEXTS if has_pixels else name == b"acTL"
        if name == b"IEND":
            return needs_pillow
        position = end
    raise BadImage("truncated", "its end is missing")
