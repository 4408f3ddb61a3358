"""Pictures and image files."""

import io
import struct
import zlib

import cv2
import numpy as np
from PIL import Image

SIZE = (60, 80)


def photo(seed: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Returns a smooth random picture with some noise, uint8 RGB `(height, width, 3)`."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3), np.uint8)
    smooth = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)


def encode(kind: str, picture: np.ndarray | Image.Image | None = None, **options) -> bytes:
    """Returns a picture as a file of Pillow's format `kind`."""
    picture = photo() if picture is None else picture
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def png_chunk(name: bytes, content: bytes) -> bytes:
    """Returns a PNG chunk with its length and checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
