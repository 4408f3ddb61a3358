"""One image: decoding it upright and over white, resizing it. Nothing else decodes."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import PIL.Image
import simplejpeg

from configs import MAX_IMAGE_PIXELS, Configs
from finetune.core.arguments import take_path, take_size
from finetune.core.options import UserError
from finetune.data.findings import BadImage
from finetune.data.headers import (
    JPEG_START,
    PILLOW_ERRORS,
    PILLOW_FORMATS,
    PNG_START,
    check_chunks,
    check_length,
    find_orientation,
    is_transparent,
    read_frame,
    read_header,
)
from finetune.data.stores import read_bytes
from finetune.data.tiffs import BITS, check_parts, decode_numbers, read_layout

# The border of a padded picture: the middle of the range, which most preprocessing maps to about 0, as convolutions
# pad. It is the same for all backbones, so that they share cached pictures.
PAD_GREY = 127
END_OF_JPEG = b"\xff\xd9"
# The contents of a JPEG header, to be read once only, and the length of the file that it belongs to.
JPEG_HEADER = np.dtype([("bytes", "<i8"), ("width", "<i4"), ("height", "<i4"), ("orientation", "u1")])
# Turns a picture upright, by its orientation. Source: EXIF 2.32 (CIPA DC-008-2019), tag 0x0112.
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda image: cv2.flip(image, 1),
    3: lambda image: cv2.rotate(image, cv2.ROTATE_180),
    4: lambda image: cv2.flip(image, 0),
    5: cv2.transpose,
    6: lambda image: cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE),
    7: lambda image: cv2.rotate(cv2.transpose(image), cv2.ROTATE_180),
    8: lambda image: cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE),
}
# The details of these faults continue "it".
STORE_FAULTS = ("missing", "unreachable")
# What to do about an image, by its fault.
REMEDIES = {
    "unreachable": "Check the address, the network and your permissions",
    "needs_package": "Install it",
    "unsupported": "Save it as an ordinary JPEG or PNG",
}


class Placement(NamedTuple):
    """The rows and columns of a picture that a model sees, and those of the model's input that they fill."""

    seen: tuple[slice, slice]
    filled: tuple[slice, slice]


def read_image(
    path: str,
    image_size: Sequence[int] | None = None,
    max_pixels: int = MAX_IMAGE_PIXELS,
    header: np.ndarray | None = None,
    pixel_range: Sequence[float] = (),
) -> np.ndarray:
    """Decodes an image as a person sees it: upright by its EXIF or XMP, transparency over white.

    Args:
        path: a file, or a URL that fsspec reads.
        image_size: `(height, width)` that the picture will be resized to. A JPEG at least twice as large is decoded
            at 1/2, 1/4 or 1/8 of its size, which is faster; neither side gets smaller than these two.
        max_pixels: the largest number of pixels allowed; the header is checked before anything is decoded.
        header: `(1,)` of the type `JPEG_HEADER`, from an earlier reading of this file: valid while the file has the
            same length. Zeros are filled in.
        pixel_range: the option of that name, as in a run's `configs.json`: the values of float and 32-bit TIFFs that
            are black and white. Empty assumes 0 and 1 for floats, 0 and 255 for integers.

    Returns:
        uint8 RGB `(height, width, 3)`; grey is repeated, 16 bits are reduced to 8.

    Raises:
        UserError: the file is missing, damaged, too large or cannot be decoded, or an argument is invalid.
    """
    path = take_path("path", path)
    if image_size is not None:
        image_size = take_size("image_size", image_size)
    if type(max_pixels) is not int or max_pixels < 1:
        Configs.check_values(max_image_pixels=max_pixels)
    try:
        return decode_image(read_bytes(path), max_pixels, image_size, header, pixel_range)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"Cannot read the image {path}: {reason}. Replace it, or drop its row.") from error
    except BadImage as error:
        what = f"read the image {path}: it" if error.kind in STORE_FAULTS else f"decode the image {path}:"
        remedy = REMEDIES.get(error.kind, "Replace it")
        raise UserError(f"Cannot {what} {error.detail}. {remedy}, or drop its row.") from error


def build_reader(configs: Configs) -> Callable[..., np.ndarray]:
    """Returns `read_image` with the options' limit of pixels and pixel range."""
    return functools.partial(read_image, max_pixels=configs.max_image_pixels, pixel_range=configs.pixel_range)


def decode_image(
    encoded: np.ndarray,
    max_pixels: int,
    image_size: Sequence[int] | None = None,
    known: np.ndarray | None = None,
    pixel_range: Sequence[float] = (),
) -> np.ndarray:
    """Decodes the bytes of an image file, uint8 `(bytes,)`, as `read_image` does; raises BadImage, not UserError."""
    is_jpeg = encoded[:3].tobytes() == JPEG_START
    size, width, height, orientation = known.item() if known is not None else (0, 0, 0, 0)
    if is_jpeg and size == encoded.size:
        return _decode_jpeg(encoded, (width, height), orientation, image_size)
    check_length(encoded[:12].tobytes(), encoded.size)
    header = read_header(io.BytesIO(encoded), max_pixels)
    image = decode_pixels(encoded, header, image_size, pixel_range)
    if known is not None and header is not None and is_jpeg:
        known[0] = encoded.size, *header.size, find_orientation(header)
    return image


def decode_pixels(
    encoded: np.ndarray,
    header: PIL.Image.Image | None,
    image_size: Sequence[int] | None = None,
    pixel_range: Sequence[float] = (),
) -> np.ndarray:
    """Decodes the bytes of an image file, uint8 `(bytes,)`, with its header from `read_header`.

    The data check, training and prediction share it; raises BadImage if the file is damaged or no image.
    """
    if header is None:
        return _decode_by_opencv(encoded, header)
    if encoded[:3].tobytes() == JPEG_START:
        return _decode_jpeg(encoded, header.size, find_orientation(header), image_size)
    if encoded[:8].tobytes() == PNG_START and check_chunks(data := encoded.tobytes()):
        return _decode_by_pillow(data)
    if header.format == "TIFF":
        data = encoded.tobytes()
        with _describing_failures(data):
            if layout := read_layout(io.BytesIO(data)):
                return turn_upright(decode_numbers(data, layout, pixel_range), find_orientation(header))
    # OpenCV returns incomplete pictures of damaged TIFFs.
    if header.format in ("GIF", "AVIF", "HEIF", "TIFF") or is_transparent(header):
        return _decode_by_pillow(encoded.tobytes())
    return turn_upright(_decode_by_opencv(encoded, header), find_orientation(header))


def choose_divisor(sides: Sequence[int], image_size: Sequence[int]) -> int:
    """Returns the largest of 8, 4, 2 and 1 by which a JPEG of these sides can shrink and still cover `image_size`."""
    # Its orientation may swap the sides, so the shorter one has to suffice for both.
    return next(divisor for divisor in (8, 4, 2, 1) if divisor == 1 or min(sides) // divisor >= max(image_size))


def turn_upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turns and mirrors a picture by its EXIF orientation, 1 to 8."""
    return TURNS[orientation](image) if orientation in TURNS else image


def resize_image(image: np.ndarray, image_size: Sequence[int], target: np.ndarray | None = None) -> np.ndarray:
    """Stretches an image to `(height, width)`; `fit_image` returns what the model sees.

    Shrinking averages areas. If neither side shrinks by 1.5, neighbours are interpolated instead: 0.1 ms, not 0.5 ms,
    from 240x320 to 224x224.

    Args:
        image: `(any height, any width, 3)`.
        image_size: `(height, width)`.
        target: receives the result, `(height, width, 3)` of the image's type; None makes a new array.
    """
    height, width = image_size
    if image.shape[:2] == (height, width):
        if target is None:
            return image
        target[:] = image
        return target
    ratios = image.shape[0] / height, image.shape[1] / width
    averages = min(ratios) >= 1 and max(ratios) >= 1.5
    return cv2.resize(image, (width, height), target, interpolation=cv2.INTER_AREA if averages else cv2.INTER_LINEAR)


def place_image(picture_size: Sequence[int], image_size: Sequence[int], resize_mode: str) -> Placement:
    """Returns which part of an upright picture a model sees, and where, in whole pixels.

    `stretch` fills the input with all of it. `crop` shows the largest central part of the input's shape. `pad` centres
    all of it, as large as it fits.

    Args:
        picture_size: `(height, width)` of the picture.
        image_size: `(height, width)` of the model's input.
        resize_mode: one of `configs.RESIZE_MODES`.
    """
    scales = [side / wanted for side, wanted in zip(picture_size, image_size, strict=True)]
    seen, filled = picture_size, image_size
    if resize_mode == "crop":
        seen = [side * min(scales) for side in image_size]
    elif resize_mode == "pad":
        filled = [side / max(scales) for side in picture_size]
    return Placement(_take_middle(picture_size, seen), _take_middle(image_size, filled))


def _take_middle(whole: Sequence[int], part: Sequence[float]) -> tuple[slice, slice]:
    sides = [max(1, round(side)) for side in part]
    starts = [(all_of_it - side) // 2 for all_of_it, side in zip(whole, sides, strict=True)]
    rows, columns = (slice(start, start + side) for start, side in zip(starts, sides, strict=True))
    return rows, columns


def shape_image(image: np.ndarray, image_size: Sequence[int], resize_mode: str) -> np.ndarray:
    """Returns the part of an image that the model sees, or the padded image: to be stretched to `image_size`."""
    seen, filled = place_image(image.shape[:2], image_size, resize_mode)
    if resize_mode != "pad":
        return image[seen]
    padded = np.full((*image_size, 3), PAD_GREY, image.dtype)
    padded[filled] = resize_image(image, [part.stop - part.start for part in filled])
    return padded


def fit_image(image: np.ndarray, image_size: Sequence[int], resize_mode: str) -> np.ndarray:
    """Returns what a model sees of an image, `(height, width, 3)`, by `resize_mode`."""
    return resize_image(shape_image(image, image_size, resize_mode), image_size)


def _decode_jpeg(
    encoded: np.ndarray, sides: Sequence[int], orientation: int, image_size: Sequence[int] | None
) -> np.ndarray:
    """Decodes a JPEG upright, reduced if that suffices. Warnings are errors, but not a missing end mark."""
    divisor = choose_divisor(sides, image_size) if image_size else 1
    data = encoded.tobytes()
    has_end = data.endswith(END_OF_JPEG)
    smallest = {"min_width": -(-sides[0] // divisor), "min_height": -(-sides[1] // divisor)} if divisor > 1 else {}
    try:
        image = simplejpeg.decode_jpeg(data if has_end else data + END_OF_JPEG, "RGB", **smallest)
    except ValueError as error:
        frame = read_frame(data)
        # simplejpeg makes no RGB of lossless JPEGs and of rare subsampling.
        if not frame.is_ordinary or "subsampling" in str(error):
            return turn_upright(_decode_by_pillow(data, turns=False), orientation)
        if not has_end and data.find(END_OF_JPEG, frame.scan) < 0:
            raise BadImage("truncated", "its end is missing") from error
        raise BadImage("unreadable", f"it is damaged: {str(error).removeprefix('Corrupt JPEG data: ')}") from error
    return turn_upright(image, orientation)


def _decode_by_opencv(encoded: np.ndarray, header: PIL.Image.Image | None) -> np.ndarray:
    """Decodes with OpenCV or, if that fails and Pillow knows the format, with Pillow; not turned."""
    reason = ""
    try:
        image = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION) if encoded.size else None
    except cv2.error as error:
        image, reason = None, f": {error.err}"
    if image is None and header is not None:
        return _decode_by_pillow(encoded.tobytes(), turns=False)
    if image is None and not reason:
        raise BadImage("not_an_image", "it is no image that OpenCV reads")
    if image is None:
        raise BadImage("unreadable", f"it cannot be decoded{reason}")
    return image


def _decode_by_pillow(data: bytes, turns: bool = True) -> np.ndarray:
    """Decodes the first picture of a file with Pillow, over white."""
    with _describing_failures(data):
        image = PIL.Image.open(io.BytesIO(data))
        if image.format not in PILLOW_FORMATS:
            raise BadImage("unsupported", f"it is a file of the kind {image.format}")
        check_parts(image, data)
        image.load()
        # Pillow turns TIFFs when it loads them, and then reports them as upright.
        return turn_upright(_convert_to_rgb(image), find_orientation(image) if turns else 1)


@contextlib.contextmanager
def _describing_failures(data: bytes) -> Iterator[None]:
    """Turns Pillow's exceptions into BadImage."""
    try:
        yield
    except PILLOW_ERRORS as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        if data.startswith(JPEG_START) or isinstance(error, NotImplementedError) or "not available" in reason:
            fault = BadImage("unsupported", f"it is of a kind that is not read: {reason}")
        elif "truncated" in reason or "not enough" in reason or isinstance(error, EOFError):
            fault = BadImage("truncated", "its end is missing")
        else:
            fault = BadImage("unreadable", f"it cannot be decoded: {reason}")
        raise fault from error


def _convert_to_rgb(image: PIL.Image.Image) -> np.ndarray:
    """Converts a loaded image of any of Pillow's modes to uint8 RGB `(height, width, 3)`."""
    if image.mode.startswith("I"):
        # A TIFF may have 12 bits; other formats have 16.
        deepest = getattr(image, "tag_v2", {}).get(BITS, (16,))[0]
        return cv2.cvtColor(np.clip(np.asarray(image) >> (deepest - 8), 0, 255).astype(np.uint8), cv2.COLOR_GRAY2RGB)
    if is_transparent(image):
        layer = image.convert("RGBA")
        if image.format in ("BMP", "DIB") and not layer.getchannel("A").getextrema()[1]:
            # Many programs write 0 into the fourth byte, which viewers then ignore.
            return np.array(image.convert("RGB"))
        white = PIL.Image.new("RGBA", image.size, "white")
        return np.array(PIL.Image.alpha_composite(white, layer).convert("RGB"))
    return np.array(image.convert("RGB"))
