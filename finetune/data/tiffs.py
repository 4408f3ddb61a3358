"""TIFF files: checks of their parts, and pictures of numbers whose range is not 0 to 255."""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import cv2
import numpy as np
import PIL.Image
import simplejpeg
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from finetune.core.texts import show_count
from finetune.data.findings import BadImage

WIDTH, HEIGHT, BITS, PACKING, MEANING, FILL_ORDER, ORIENTATION, CHANNELS = 256, 257, 258, 259, 262, 266, 274, 277
STRIP_HEIGHT, PLANES, PREDICTOR, TILE_WIDTH, TILE_HEIGHT, EXTRAS, FORMAT = 278, 284, 317, 322, 323, 338, 339
JPEG_TABLES = 347
# Offsets and lengths of the strips, and of the tiles.
PART_TAGS = ((273, 279), (324, 325))
UNPACKED, JPEG, DEFLATE = 1, 7, (8, 32946)
UNPACKED_AT_ONCE = 2**20
# Pillow reads the tags of BigTIFF in one byte order only.
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0")
# Photometric interpretations: grey with 0 as white, grey with 0 as black, RGB.
WHITE_IS_ZERO, GREY, RGB = 0, 1, 2
# OpenCV's default for three channels of float32; libtiff makes RGB of it again.
LOG_LUV = 32845
DIFFERENCES, FLOAT_DIFFERENCES = 2, 3
# libtiff ignores a predictor with other compressions.
PREDICTED = (5, 8, 32946, 34925, 50000)
ASSOCIATED, UNASSOCIATED = 1, 2
# NumPy's letters by sample format. 4 is undefined: readers take it for unsigned integers.
FORMATS = {1: "u", 2: "i", 3: "f", 4: "u"}
# Black and white without a `pixel_range`, by `Layout.kind`.
ASSUMED_RANGES = {"float": (0.0, 1.0), "integer": (0.0, 255.0)}
VALUES_AT_ONCE = 2**20
# The share of values outside the range from which the data check warns.
MOST_BEYOND = 0.01
# Tiles may be larger than the picture, within reason.
MOST_PADDING, ALWAYS_POSSIBLE = 4, 2**24


def check_parts(image: PIL.Image.Image, data: bytes) -> None:
    """Raises BadImage if a strip or tile of a TIFF is damaged or cut short; checks deflate and JPEG."""
    tags = getattr(image, "tag_v2", {})
    packing = tags.get(PACKING)
    if packing not in (*DEFLATE, JPEG):
        return
    for start_tag, length_tag in PART_TAGS:
        for start, length in zip(tags.get(start_tag, ()), tags.get(length_tag, ()), strict=False):
            part = data[start : start + length]
            # A part without bytes means zeros.
            if part and packing == JPEG:
                _check_jpeg(part, tags.get(JPEG_TABLES, b""))
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
    """Decodes a part strictly, after the tables that all parts share; both have start and end marks."""
    try:
        simplejpeg.decode_jpeg(tables[:-2] + part[2:] if tables else part, "GRAY")
    except ValueError as error:
        raise BadImage("unreadable", f"it is damaged: {str(error).removeprefix('Corrupt JPEG data: ')}") from error


class Layout(NamedTuple):
    """How the first picture of a TIFF is stored.

    Attributes:
        size: `(width, height)`.
        dtype: of a value, in the file's byte order.
        channels: values per pixel.
        alpha: `ASSOCIATED` or `UNASSOCIATED` if the last channel is the opacity, else 0.
        white_is_zero: the least value is white.
        tags: of the picture.
    """

    size: tuple[int, int]
    dtype: np.dtype
    channels: int
    alpha: int
    white_is_zero: bool
    tags: Mapping[int, Any]

    @property
    def kind(self) -> str:
        """`type` if the type of the values defines black and white; `float` or `integer` need a `pixel_range`."""
        if self.dtype.kind == "f":
            return "float"
        return "integer" if self.dtype.itemsize > 2 else "type"


def read_layout(file: BinaryIO) -> Layout | None:
    """Returns how an open file's picture is stored; None if it is no TIFF of float, signed or wide numbers.

    Raises BadImage if its tags are cut short, or any of `headers.PILLOW_ERRORS`.
    """
    file.seek(0)
    start = file.read(8)
    if not start.startswith(TIFF_STARTS):
        return None
    tags = ImageFileDirectory_v2(start + file.read(8) if start[2] == TIFF_STARTS[2][2] else start)
    place = tags.next
    file.seek(place)
    tags.load(file)
    layout = describe_tags(tags, "<" if start.startswith(b"II") else ">")
    # If the file ends within its tags, Pillow keeps those that it has read: the type may be missing.
    if layout is not None and tags.next == place:
        raise BadImage("truncated", "its end is missing")
    return layout


def describe_tags(tags: ImageFileDirectory_v2, order: str) -> Layout | None:
    """Returns the layout that tags describe; None if that is no such picture in grey or RGB."""
    bits, formats = set(_list(tags, BITS, 1)), set(_list(tags, FORMAT, 1))
    size = tuple(_first(tags, tag, 0) for tag in (WIDTH, HEIGHT))
    meaning, channels, extras = _first(tags, MEANING, -1), _first(tags, CHANNELS, 1), _list(tags, EXTRAS, 0)
    if meaning == LOG_LUV and channels == 3 and min(size) > 0:
        return Layout(size, np.dtype("f4"), channels, 0, False, tags)
    if len(bits) != 1 or len(formats) != 1 or min(size) < 1 or meaning not in (WHITE_IS_ZERO, GREY, RGB):
        return None
    (bit,), (form,) = bits, formats
    dtype = f"{order}{FORMATS.get(form)}{bit // 8}"
    if (form, bit) in ((1, 8), (4, 8)) or dtype[1:] not in ("u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"):
        return None
    has_alpha = channels in (2, 4) and extras[-1] in (ASSOCIATED, UNASSOCIATED)
    # All readers ignore a fourth channel without a meaning, and take three channels that GDAL writes as grey for RGB.
    if channels not in (1, 3) and not has_alpha and not (meaning == RGB and channels == 4):
        return None
    return Layout(size, np.dtype(dtype), channels, extras[-1] * has_alpha, meaning == WHITE_IS_ZERO, tags)


def open_header(file: BinaryIO) -> PIL.Image.Image | None:
    """Returns an 8-bit header, not to be loaded, for a TIFF that has a `Layout` but no mode of Pillow; else None."""
    if (layout := read_layout(file)) is None:
        return None
    channels = 1 if layout.channels < 3 else 3
    has_alpha = bool(layout.alpha)
    tags = {WIDTH: [layout.size[0]], HEIGHT: [layout.size[1]], BITS: [8] * (channels + has_alpha), PACKING: [UNPACKED]}
    tags |= {MEANING: [GREY if channels == 1 else RGB], CHANNELS: [channels + has_alpha], 273: [0], 279: [0]}
    tags |= {EXTRAS: [UNASSOCIATED]} if has_alpha else {}
    tags |= {ORIENTATION: _list(layout.tags, ORIENTATION, 1)}
    return PIL.Image.open(io.BytesIO(_build_file(b"", tags, has_more=bool(layout.tags.next))))


def decode_values(data: bytes, layout: Layout) -> np.ndarray:
    """Returns the values of a TIFF's first picture, `(height, width, channels)` in this machine's byte order.

    Raises BadImage if a part is damaged or missing, or any of `headers.PILLOW_ERRORS`.
    """
    if _first(layout.tags, MEANING, -1) == LOG_LUV:
        return _decode_log_luv(data, layout)
    planes = layout.channels if _first(layout.tags, PLANES, 1) == 2 else 1
    offsets, counts, is_tiled = _list_parts(layout)
    needed, part = len(offsets) // planes, layout.channels // planes
    found = [
        _decode_plane(data, layout, part, (offsets[start : start + needed], counts[start : start + needed], is_tiled))
        for start in range(0, needed * planes, needed)
    ]
    return found[0] if planes == 1 else np.concatenate(found, axis=2)


def find_range(pixel_range: Sequence[float], kind: str) -> tuple[float, float]:
    """Returns the values that are black and white by the option `pixel_range`, for a kind of `ASSUMED_RANGES`."""
    if len(pixel_range) == 0:
        return ASSUMED_RANGES[kind]
    return tuple(pixel_range[2:] if kind == "integer" and len(pixel_range) == 4 else pixel_range[:2])


def decode_numbers(data: bytes, layout: Layout, pixel_range: Sequence[float]) -> np.ndarray:
    """Decodes the first picture of a TIFF to uint8 RGB `(height, width, 3)`, over white, not turned.

    Infinities are black or white, NaN is black.
    """
    values = decode_values(data, layout)
    opacity = None
    if layout.alpha:
        opacity = _measure_opacity(values[..., -1:])
        values = values[..., :-1]
        if layout.alpha == ASSOCIATED:
            values = values / np.where(opacity > 0, opacity, 1)
    values = values[..., : 1 if values.shape[2] < 3 else 3]
    image = np.empty(values.shape, np.uint8)
    step = max(1, VALUES_AT_ONCE // max(values[0].size, 1))
    for start in range(0, len(values), step):
        image[start : start + step] = _reduce(values[start : start + step], layout, pixel_range)
    if opacity is not None:
        image = np.rint(image * opacity + 255 * (1 - opacity)).astype(np.uint8)
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


def _reduce(values: np.ndarray, layout: Layout, pixel_range: Sequence[float]) -> np.ndarray:
    """Reduces values to 8 bits: by their type to the highest bits, else to their rounded share of the range."""
    if layout.kind == "type":
        shift = 8 * (layout.dtype.itemsize - 1)
        reduced = (np.rint(np.nan_to_num(values)).astype(np.int32) - np.iinfo(layout.dtype).min) >> shift
        return np.clip(255 - reduced if layout.white_is_zero else reduced, 0, 255).astype(np.uint8)
    low, high = find_range(pixel_range, layout.kind)
    with np.errstate(invalid="ignore", over="ignore"):
        share = np.clip((values.astype(np.float64) - low) / (high - low), 0, 1)
    reduced = np.rint(255 * (1 - share if layout.white_is_zero else share))
    return np.nan_to_num(reduced, copy=False).astype(np.uint8)


def _measure_opacity(values: np.ndarray) -> np.ndarray:
    """Returns the alpha channel as float64 in `[0, 1]`."""
    most = 1 if values.dtype.kind == "f" else np.iinfo(values.dtype).max
    return np.nan_to_num(np.clip(values.astype(np.float64) / most, 0, 1), nan=0)


def _list_parts(layout: Layout) -> tuple[list[int], list[int], bool]:
    """Returns the offsets and lengths of the strips or tiles of all planes, and whether they are tiles."""
    tags, (width, height) = layout.tags, layout.size
    is_tiled = TILE_WIDTH in tags
    starts, lengths = (_list(tags, tag, 0) for tag in PART_TAGS[is_tiled])
    part_width, part_height = _get_part_size(layout)
    number = math.ceil(width / part_width) * math.ceil(height / part_height)
    number *= layout.channels if _first(tags, PLANES, 1) == 2 else 1
    pixels = math.ceil(width / part_width) * part_width * math.ceil(height / part_height) * part_height
    if is_tiled and pixels > MOST_PADDING * width * height + ALWAYS_POSSIBLE:
        raise BadImage("unreadable", f"it is damaged: its tiles have {part_width}x{part_height} pixels")
    if PART_TAGS[is_tiled][1] not in tags and _first(tags, PACKING, UNPACKED) == UNPACKED:
        # Old writers leave the lengths out.
        lengths = [part_width * part_height * layout.channels * layout.dtype.itemsize] * len(starts)
    if min(len(starts), len(lengths)) < number:
        raise BadImage("truncated", "a part of its pixels is missing")
    return starts[:number], lengths[:number], is_tiled


def _get_part_size(layout: Layout) -> tuple[int, int]:
    """Returns `(width, height)` of a tile, or of a strip, which is at most as high as the picture."""
    width, height = layout.size
    if TILE_WIDTH in layout.tags:
        return max(_first(layout.tags, TILE_WIDTH, width), 1), max(_first(layout.tags, TILE_HEIGHT, height), 1)
    return width, max(min(_first(layout.tags, STRIP_HEIGHT, height), height), 1)


def _decode_plane(
    data: bytes, layout: Layout, channels: int, parts: tuple[Sequence[int], Sequence[int], bool]
) -> np.ndarray:
    """Returns the values of a plane, `(height, width, channels)`: Pillow unpacks its parts as grey bytes."""
    offsets, counts, is_tiled = parts
    (width, height), (part_width, part_height) = layout.size, _get_part_size(layout)
    pixel = channels * layout.dtype.itemsize
    columns = math.ceil(width / part_width)
    tags = {WIDTH: [columns * part_width * pixel], HEIGHT: [height], BITS: [8], MEANING: [GREY], CHANNELS: [1]}
    tags |= {tag: _list(layout.tags, tag, 1) for tag in (PACKING, FILL_ORDER)}
    tags |= (
        {TILE_WIDTH: [part_width * pixel], TILE_HEIGHT: [part_height]} if is_tiled else {STRIP_HEIGHT: [part_height]}
    )
    tags |= dict(zip(PART_TAGS[is_tiled], (offsets, counts), strict=True))
    file = _build_file(data, tags)
    image = TiffImageFile(io.BytesIO(file))
    check_parts(image, file)
    image.load()
    rows = np.asarray(image).reshape(height, columns, part_width * pixel)
    values = _undo_predictor(rows, layout, channels).reshape(height, columns * part_width, channels)
    return values[:, :width]


def _decode_log_luv(data: bytes, layout: Layout) -> np.ndarray:
    kept = (WIDTH, HEIGHT, BITS, PACKING, MEANING, CHANNELS, STRIP_HEIGHT, PLANES, FORMAT, *PART_TAGS[0])
    # The orientation is left out: OpenCV would turn the picture by it.
    file = _build_file(data, {tag: _list(layout.tags, tag, 1) for tag in kept if tag in layout.tags})
    values = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != layout.dtype or values.shape != (*layout.size[::-1], 3):
        raise BadImage("unreadable", "it cannot be decoded: its packed pixels are damaged")
    return values[..., ::-1]


def _undo_predictor(rows: np.ndarray, layout: Layout, channels: int) -> np.ndarray:
    """Turns the bytes of rows of tiles, `(rows, columns, bytes)`, into values, `(rows, columns, values)`."""
    size, native = layout.dtype.itemsize, layout.dtype.newbyteorder("=")
    predictor = _first(layout.tags, PREDICTOR, 1) if _first(layout.tags, PACKING, UNPACKED) in PREDICTED else 1
    if predictor == FLOAT_DIFFERENCES:
        steps = rows.reshape(*rows.shape[:2], -1, channels)
        # A row has first the highest byte of all values, then the next one.
        ranks = np.cumsum(steps, axis=2, dtype=np.uint8).reshape(*rows.shape[:2], size, -1)
        return np.ascontiguousarray(np.moveaxis(ranks, 2, -1)).view(native.newbyteorder(">"))[..., 0].astype(native)
    if predictor == DIFFERENCES:
        whole = np.dtype(f"u{size}")
        steps = rows.view(whole.newbyteorder(layout.dtype.byteorder)).astype(whole)
        steps = steps.reshape(*rows.shape[:2], -1, channels)
        return np.cumsum(steps, axis=2, dtype=whole).reshape(*rows.shape[:2], -1).view(native)
    return rows.view(layout.dtype).astype(native, copy=False)


def _build_file(data: bytes, tags: Mapping[int, Sequence[int]], has_more: bool = False) -> bytes:
    """Returns a BigTIFF with these tags around another TIFF file, whose strips or tiles it uses."""
    header = 16
    shifted = {tag: [offset + header for offset in tags[tag]] for tag in (273, 324) if tag in tags}
    place = header + len(data)
    behind = place + 16 + 20 * len(tags)
    entries, arrays = [], b""
    for tag, values in sorted((dict(tags) | shifted).items()):
        content = struct.pack(f"<{len(values)}Q", *values)
        entries.append(struct.pack("<HHQ", tag, 16, len(values)))
        if len(values) > 1:
            content, arrays = struct.pack("<Q", behind + len(arrays)), arrays + content
        entries.append(content)
    start = b"II+\0" + struct.pack("<HHQ", 8, 0, place)
    return b"".join([start, data, struct.pack("<Q", len(tags)), *entries, struct.pack("<Q", has_more), arrays])


def _list(tags: Mapping[int, Any], tag: int, default: int) -> list[int]:
    value = tags.get(tag, default)
    return [int(part) for part in value] if isinstance(value, tuple) else [int(value)]


def _first(tags: Mapping[int, Any], tag: int, default: int) -> int:
    return _list(tags, tag, default)[0]


class Measure(NamedTuple):
    """The values of a picture without its opacity.

    Attributes:
        kind: of `Layout`.
        low, high: the least and the largest finite value; infinity and minus infinity if there is none.
        odd: number of infinite values and NaN.
        beyond: share of the finite values outside the given range.
    """

    kind: str
    low: float
    high: float
    odd: int
    beyond: float


def measure_values(data: bytes, layout: Layout, pixel_range: Sequence[float] = ()) -> Measure:
    """Measures the values of a TIFF of the kind `float` or `integer`; raises as `decode_values` does."""
    values = decode_values(data, layout)
    values = values[..., : 1 if values.shape[2] < 3 else 3]
    is_finite = np.isfinite(values)
    finite = values[is_finite]
    low, high = find_range(pixel_range, layout.kind)
    beyond = float(((finite < low) | (finite > high)).mean()) if finite.size else 0.0
    bounds = (float(finite.min()), float(finite.max())) if finite.size else (math.inf, -math.inf)
    return Measure(layout.kind, *bounds, values.size - finite.size, beyond)


def find_odd_values(data: bytes, pixel_range: Sequence[float]) -> Iterator[tuple[str, str]]:
    """Yields a remark on a TIFF with infinite values or NaN, and on one with many values outside `pixel_range`."""
    layout = read_layout(io.BytesIO(data))
    if layout is None or layout.kind == "type":
        return
    found = measure_values(data, layout, pixel_range)
    if found.odd:
        yield "odd_values", f"it has {show_count(found.odd, 'infinite or NaN value')}"
    if found.beyond > MOST_BEYOND:
        low, high = find_range(pixel_range, layout.kind)
        reach = f"its values are from {found.low:g} to {found.high:g}"
        yield "odd_values", f"{reach}; {100 * found.beyond:.0f} % of them are outside {low:g} to {high:g}"
