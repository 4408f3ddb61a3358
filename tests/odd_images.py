"""Image files as other programs write them: orientations in every place, lossless JPEG, TIFF of few or many bits."""

import io
import struct
import zlib

import numpy as np
from encoding import encode, png_chunk
from PIL import Image

EXIF_START, XMP_START = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
# Struct's letters for the integer types of TIFF by their numbers.
INTEGER_TYPES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}


def quadrants() -> np.ndarray:
    """Returns red, green, blue and black quarters, uint8 RGB `(64, 96, 3)`."""
    image = np.zeros((64, 96, 3), np.uint8)
    image[:32, :48], image[:32, 48:], image[32:, :48] = (200, 30, 30), (30, 200, 30), (30, 30, 200)
    return image


def exif(orientation: int, kind: int = 3, order: str = "<") -> bytes:
    """Returns EXIF with an orientation alone, as an integer of one of `INTEGER_TYPES`."""
    start = b"II*\0" if order == "<" else b"MM\0*"
    value = struct.pack(order + INTEGER_TYPES[kind], orientation).ljust(4, b"\0")
    return start + struct.pack(f"{order}IHHHI", 8, 1, 0x0112, kind, 1) + value + bytes(4)


def xmp(orientation: int, is_attribute: bool = True) -> bytes:
    """Returns XMP with an orientation, as an attribute or an element."""
    attribute = f' tiff:Orientation="{orientation}"' * is_attribute
    element = f"<tiff:Orientation>{orientation}</tiff:Orientation>" * (not is_attribute)
    names = 'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:tiff="http://ns.adobe.com/tiff/1.0/"'
    description = f'<rdf:Description rdf:about=""{attribute}>{element}</rdf:Description>'
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF {names}>{description}</rdf:RDF></x:xmpmeta>'.encode()


def jpeg_with(*contents: bytes) -> bytes:
    """Returns the quadrants as a JPEG with APP1 segments."""
    data = encode("JPEG", quadrants(), quality=95, subsampling=0)
    segments = [b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content for content in contents]
    return data[:2] + b"".join(segments) + data[2:]


def png_with(name: bytes, content: bytes, is_behind: bool = False) -> bytes:
    """Returns the quadrants as a PNG with one more chunk, before or behind its pixels."""
    data = encode("PNG", quadrants())
    place = data.index(b"IEND" if is_behind else b"IDAT") - 4
    return data[:place] + png_chunk(name, content) + data[place:]


def raw_profile(name: str, content: bytes) -> bytes:
    """Returns the content of a zTXt chunk in which ImageMagick keeps metadata of other formats."""
    digits = content.hex()
    lines = [digits[start : start + 72] for start in range(0, len(digits), 72)]
    text = "\n".join(["", name, f"{len(content):8}", *lines, ""])
    return f"Raw profile type {name}".encode() + b"\0\0" + zlib.compress(text.encode())


def oriented_files(orientation: int) -> dict[str, bytes]:
    """Returns by name the quadrants in files that tell an orientation, each in another place or way."""
    o = orientation
    tag = Image.Exif()
    tag[0x0112] = o
    found = {
        f"jpeg_exif_type_{kind}_{'little' if order == '<' else 'big'}": jpeg_with(EXIF_START + exif(o, kind, order))
        for kind in INTEGER_TYPES
        for order in "<>"
    }
    itxt = b"XML:com.adobe.xmp" + bytes(5)
    return found | {
        "jpeg_xmp": jpeg_with(XMP_START + xmp(o)),
        "jpeg_xmp_before_exif": jpeg_with(XMP_START + xmp(1), EXIF_START + exif(o)),
        "jpeg_other_segment_first": jpeg_with(b"other\0", EXIF_START + exif(o)),
        "png_exif": png_with(b"eXIf", exif(o)),
        "png_exif_behind": png_with(b"eXIf", exif(o), is_behind=True),
        "png_raw_exif": png_with(b"zTXt", raw_profile("exif", EXIF_START + exif(o))),
        "png_raw_exif_behind": png_with(b"zTXt", raw_profile("exif", EXIF_START + exif(o)), is_behind=True),
        "png_xmp": png_with(b"iTXt", itxt + xmp(o)),
        "png_xmp_element": png_with(b"iTXt", itxt + xmp(o, is_attribute=False)),
        "png_xmp_behind": png_with(b"iTXt", itxt + xmp(o), is_behind=True),
        "webp_exif": encode("WEBP", quadrants(), lossless=True, exif=EXIF_START + exif(o)),
        "webp_xmp": encode("WEBP", quadrants(), lossless=True, xmp=xmp(o)),
        "avif_exif": encode("AVIF", quadrants(), quality=95, exif=exif(o)),
        "avif_xmp": encode("AVIF", quadrants(), quality=95, xmp=xmp(o)),
        "tiff": encode("TIFF", quadrants(), exif=tag),
        "tiff_lzw": encode("TIFF", quadrants(), exif=tag, compression="tiff_lzw"),
        "heic": encode_heic(quadrants(), exif=EXIF_START + exif(o)),
    }


def encode_heic(image: np.ndarray, **options) -> bytes:
    """Returns a picture as HEIC."""
    import pillow_heif

    file = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(image)).save(file, quality=95, **options)
    return file.getvalue()


def lossless_jpeg(grey: np.ndarray) -> bytes:
    """Encodes uint8 `(height, width)` as a lossless JPEG: each value is told by its left neighbour (ITU-T T.81, H)."""
    height, width = grey.shape
    values = grey.astype(int)
    predicted = np.empty_like(values)
    predicted[:, 1:], predicted[1:, 0], predicted[0, 0] = values[:, :-1], values[:-1, 0], 128
    bits = []
    for difference in (values - predicted).ravel().tolist():
        size = abs(difference).bit_length()
        bits.append(f"{size:04b}")
        if size:
            bits.append(f"{difference if difference > 0 else difference + (1 << size) - 1:0{size}b}")
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    scan = bytes(int(text[start : start + 8], 2) for start in range(0, len(text), 8)).replace(b"\xff", b"\xff\0")

    def segment(marker: int, content: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content

    frame = segment(0xC3, struct.pack(">BHHB", 8, height, width, 1) + bytes([1, 0x11, 0]))
    # Ten codes of four bits, for differences of 0 to 9 bits.
    table = segment(0xC4, bytes([0, 0, 0, 0, 10, *[0] * 12, *range(10)]))
    return b"\xff\xd8" + frame + table + segment(0xDA, bytes([1, 1, 0, 1, 0, 0])) + scan + b"\xff\xd9"


def grey_tiff(values: np.ndarray, bits: int) -> bytes:
    """Encodes grey values of 2 bits, `(height, width)` with a width of whole bytes, as a TIFF."""
    height, width = values.shape
    packed = np.zeros((height, width * bits // 8), np.uint8)
    for place in range(8 // bits):
        packed |= (values[:, place :: 8 // bits] << (8 - bits * (place + 1))).astype(np.uint8)
    data = packed.tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags, (279, len(data))]]
    return (
        b"II*\0"
        + struct.pack("<I", 8 + len(data))
        + data
        + struct.pack("<H", len(entries))
        + b"".join(entries)
        + bytes(4)
    )


def alpha_bmp(alpha: np.ndarray) -> bytes:
    """Encodes a black picture with an alpha channel, uint8 `(height, width)`, as a BMP with a version 5 header."""
    height, width = alpha.shape
    pixels = np.dstack([np.zeros((height, width, 3), np.uint8), alpha])[::-1].tobytes()
    header = struct.pack("<IiiHHIIiiII", 124, width, height, 1, 32, 3, len(pixels), 0, 0, 0, 0)
    header += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs"
    header = header.ljust(124, b"\0")
    return b"BM" + struct.pack("<IHHI", 138 + len(pixels), 0, 0, 138) + header + pixels
