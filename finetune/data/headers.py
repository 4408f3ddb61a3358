"""What an image file says of itself before its pixels are decoded: sides, orientation, transparency, length."""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

import PIL.Image

from configs import MAX_IMAGE_PIXELS
from finetune.data.findings import BadImage
from finetune.data.tiffs import TIFF_STARTS, open_header

try:
    import pillow_heif
except ImportError:
    # HEIC, which iPhones write, is read where its package is installed.
    pillow_heif = None
else:
    pillow_heif.register_heif_opener()

# Pillow's readers remark on tags that they skip; `read_header` sees to the limit of pixels.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)

# The formats of which Pillow's reader decodes files, where OpenCV does not; some others would start programs.
PILLOW_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "AVIF", "HEIF", "JPEG2000", "PPM", "TGA")
PILLOW_FORMATS += ("ICO", "PCX", "SGI", "DDS", "QOI", "PSD")
# The last bytes of a whole file. A JPEG's compressed pixels never hold its two.
END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
# Where the header has the file's length, what is to be added to it.
LENGTH_FIELDS = {b"RIFF": (4, 8), b"BM": (2, 0)}
JPEG_START = b"\xff\xd8\xff"
PNG_START = b"\x89PNG\r\n\x1a\n"
OTHER_STARTS = (b"GIF8", b"BM", b"RIFF", *TIFF_STARTS)
PFM_STARTS = (b"Pf\n", b"PF\n", b"Pf ", b"PF ")
GIT_LFS_START = b"version https://git-lfs"
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
# What Pillow's readers let through on damaged files, beside its own errors.
PILLOW_ERRORS = (OSError, ValueError, SyntaxError, EOFError, ArithmeticError, LookupError, TypeError, RuntimeError)
PILLOW_ERRORS += (struct.error, zlib.error, MemoryError, AttributeError)
# Deflate, the densest of the common packings, makes 1,032 bytes of one. A header that names more is damaged, or made
# to fill the memory; small pictures of one colour may be denser in other formats.
MOST_BITS_A_BYTE, ALWAYS_POSSIBLE_PIXELS = 8 * 1032, 2**24
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# Chunks of PNG that may hold an orientation, and may stand behind the pixels.
PNG_TEXTS = {b"eXIf", b"tEXt", b"zTXt", b"iTXt"}
TRANSPARENT_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
ORIENTATION_TAG = 0x0112
# A row of zeros in the compressed pixels of a JPEG that is longer than any that its codes give.
ZEROED_PART = bytes(512)
END_OF_BLOCK = 0
PROGRESSIVE, SCAN_MARKER, LAST_MARKER = 0xC2, 0xDA, 0xD9
# What ends compressed pixels: no stuffed byte, and no mark of a restart.
MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
ALL_COEFFICIENTS = 2**64 - 1


def reads_heic() -> bool:
    """Tells whether the package is installed that reads HEIC."""
    return pillow_heif is not None


def read_header(file: BinaryIO, max_pixels: int = MAX_IMAGE_PIXELS) -> PIL.Image.Image | None:
    """Reads the header of an image file with Pillow, which decodes no pixel.

    Args:
        file: the open file, or its bytes.
        max_pixels: what the image may have.

    Returns:
        The image, not loaded; None where Pillow does not know the format.

    Raises:
        BadImage: the header is damaged, names too many pixels, or is of HEIC, whose package is not installed; or the
            file stands for an image that is elsewhere.
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
        if start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS and pillow_heif is None:
            raise BadImage("needs_package", "it is HEIC, which needs a package: pip install pillow-heif") from error
        if start.startswith(JPEG_START) and (bits := find_bits(_read_all(file))) > 8:
            raise BadImage("unsupported", f"it is a JPEG of {bits} bits a channel") from error
        if start.startswith((JPEG_START, PNG_START[:4])):
            raise BadImage("unreadable", "its header is damaged or cut short") from error
        if start.startswith(OTHER_STARTS) and not (start.startswith(b"RIFF") and start[8:12] != b"WEBP"):
            raise BadImage("unreadable", "its header cannot be read") from error
        if start.startswith(GIT_LFS_START):
            what = "it is the place that Git LFS keeps for the image: git lfs pull fetches it"
            raise BadImage("not_an_image", what) from error
        return None
    if pixels > max_pixels:
        raise BadImage("too_many_pixels", f"it has {pixels:,} pixels, more than max_image_pixels ({max_pixels:,})")
    bits = start[24] * PNG_CHANNELS[start[25]] if image.format == "PNG" else 1
    if pixels * bits > size * MOST_BITS_A_BYTE and pixels > ALWAYS_POSSIBLE_PIXELS:
        raise BadImage("unreadable", f"its header names {pixels:,} pixels, which {size:,} bytes cannot hold")
    return image


def _open(file: BinaryIO) -> PIL.Image.Image:
    """Opens an image file with Pillow, a TIFF of values that it does not know with what stands for its header."""
    try:
        return PIL.Image.open(file)
    except PIL.UnidentifiedImageError:
        if (image := open_header(file)) is None:
            raise
        return image


def check_length(start: bytes, size: int) -> None:
    """Raises BadImage where a file of `size` bytes is shorter than its first 12 bytes say."""
    for name, (position, more) in LENGTH_FIELDS.items():
        if start.startswith(name) and int.from_bytes(start[position : position + 4], "little") + more > size:
            raise BadImage("truncated", "it is shorter than its header says")


def lacks_end(image: PIL.Image.Image, tail: bytes, file: BinaryIO) -> bool:
    """Tells whether a file has no end mark: from its last bytes, `tail`, where they suffice, else from all of it."""
    mark = END_MARKS.get(image.format)
    if mark is None or tail.endswith(mark):
        return False
    data = _read_all(file)
    return data.find(mark, find_scan(data)) < 0


def find_orientation(image: PIL.Image.Image) -> int:
    """Returns the orientation of an image by its EXIF or XMP, 1 to 8; 1 is upright, and where nothing says otherwise.

    Args:
        image: from `read_header`; of a PNG whose text stands behind the pixels it has to be loaded.
    """
    value: object = 1
    with contextlib.suppress(*PILLOW_ERRORS):
        # That of PNG would decode the whole image.
        value = PIL.Image.Image.getexif(image).get(ORIENTATION_TAG, 1)
    # Some writers take another type than that of the standard.
    value = value[0] if isinstance(value, bytes | tuple) and len(value) else value
    return int(value) if value in range(2, 9) else 1


def is_transparent(image: PIL.Image.Image) -> bool:
    """Tells whether an image's header says that parts of it may be seen through."""
    return image.mode in TRANSPARENT_MODES or "transparency" in image.info


class Segment(NamedTuple):
    """A part of a JPEG file before its pixels: its marker's second byte, where its content begins, and its length."""

    marker: int
    start: int
    length: int


def list_segments(data: bytes) -> list[Segment]:
    """Returns the parts of a JPEG file before its pixels, and the head of these last."""
    found, position = [], 2
    while data[:2] == b"\xff\xd8" and position + 4 <= len(data) and data[position] == 0xFF:
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        found.append(Segment(data[position + 1], position + 4, length - 2))
        if data[position + 1] == 0xDA:
            break
        position += 2 + length
    return found


def find_scan(data: bytes) -> int:
    """Returns where a JPEG's compressed pixels begin: thumbnails before them have end marks of their own."""
    segments = list_segments(data)
    return segments[-1].start if segments and segments[-1].marker == 0xDA else 0


def find_frame(data: bytes) -> Segment | None:
    """Returns the part of a JPEG file that tells how its pixels are coded; None where that is missing."""
    frames = [segment for segment in list_segments(data) if segment.marker in range(0xC0, 0xD0)]
    return next((segment for segment in frames if segment.marker not in (0xC4, 0xC8, 0xCC)), None)


def find_bits(data: bytes) -> int:
    """Returns the bits of a channel of a JPEG file; 0 where it does not tell."""
    frame = find_frame(data)
    return data[frame.start] if frame and frame.start < len(data) else 0


def is_ordinary_jpeg(data: bytes) -> bool:
    """Tells whether a JPEG is of the kinds that all readers know: 8 bits, baseline or progressive, no lossless one."""
    frame = find_frame(data)
    return frame is not None and frame.marker in (0xC0, 0xC1, 0xC2) and find_bits(data) == 8


def _read_all(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()


def has_zeroed_part(data: bytes) -> bool:
    """Tells whether a part of a baseline JPEG's compressed pixels was overwritten by zeros.

    One time in forty such a part decodes to as many blocks as stood there, and no decoder finds anything amiss. Zeros
    alone are a plain surface where the shortest code means the end of a block, and can be nothing where it does not.
    """
    # Nearly no file has such a row anywhere, which is found at once.
    if ZEROED_PART not in data:
        return False
    position = data.find(ZEROED_PART, find_scan(data))
    if position < 0 or position > data.rfind(b"\xff\xd9") > 0:
        return False
    segments = list_segments(data)
    frames = [data[start + 5] for marker, start, _ in segments if marker in (0xC0, 0xC1)]
    # A scan of some of the colours alone may well have no detail.
    is_whole_baseline = bool(frames) and data[segments[-1].start] == frames[0]
    return is_whole_baseline and any(symbol != END_OF_BLOCK for symbol in list_shortest_codes(data, segments))


def list_shortest_codes(data: bytes, segments: Sequence[Segment]) -> Iterator[int]:
    """Yields what a code of zeros alone means in each of a JPEG's Huffman tables of the AC coefficients."""
    for marker, start, length in segments:
        table = start
        while marker == 0xC4 and table + 17 < start + length:
            if data[table] >> 4:
                yield data[table + 17]
            table += 17 + sum(data[table + 1 : table + 17])


def lacks_scans(data: bytes) -> bool:
    """Tells whether a progressive JPEG ends between its scans: what is left is a picture of less detail to any decoder.

    Each of a component's 64 coefficients is complete when a scan has brought its lowest bit.
    Source: ITU-T T.81, B.2.3 and G.1.1.1.
    """
    frame = find_frame(data)
    if frame is None or frame.marker != PROGRESSIVE:
        return False
    complete = dict.fromkeys(data[frame.start + 6 : frame.start + frame.length : 3], 0)
    position = 2
    while (marker := MARKER.search(data, position)) and marker[0][-1] != LAST_MARKER:
        start = marker.end() + 2
        position = marker.end() + int.from_bytes(data[marker.end() : start], "big")
        if marker[0][-1] == SCAN_MARKER and len(head := data[start + 1 : position]) >= 3:
            *components, first, last, bits = head
            brought = 0 if bits & 0xF else (2 << last) - (1 << first)
            complete |= {component: complete.get(component, 0) | brought for component in components[::2]}
    return any(coefficients != ALL_COEFFICIENTS for coefficients in complete.values())


def check_chunks(data: bytes) -> bool:
    """Checks the lengths and checksums of a PNG's parts: OpenCV takes the memory that a length claims.

    Returns:
        Whether texts that may hold an orientation stand behind the pixels.

    Raises:
        BadImage: a part is damaged.
    """
    view, position, has_pixels, has_text_behind = memoryview(data), len(PNG_START), False, False
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
        has_text_behind |= has_pixels and name in PNG_TEXTS
        if name == b"IEND":
            return has_text_behind
        position = end
    raise BadImage("truncated", "its end is missing")


def is_animated_png(data: bytes) -> bool:
    """Tells whether a PNG is an animated one."""
    return b"acTL" in data[: data.find(b"IDAT")]


def open_bytes(data: bytes) -> PIL.Image.Image:
    """Opens an image file's bytes with Pillow; raises any of `PILLOW_ERRORS`."""
    return PIL.Image.open(io.BytesIO(data))
