"""One file of each kind of bad or unusual image, and one table of each kind of bad CSV file, for all tests."""

import functools
import io
import struct
import zlib

import cv2
import numpy as np
from encoding import SIZE, encode, photo, png_chunk
from PIL import Image

# Images as other programs write them

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
    """Returns the quadrants as a PNG with one more chunk, before or after its pixels."""
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
    """Returns the quadrants by name in files with an orientation, each in another place or format."""
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
    """Encodes uint8 `(height, width)` as a lossless JPEG, predicted from the left neighbour (ITU-T T.81, H)."""
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


# Bad and unusual images

# Names of `build_corpus` that no reader may accept.
UNREADABLE = (
    *("missing", "empty", "text", "html", "git_lfs", "folder", "header_only_png", "noise"),
    *("truncated_jpeg", "truncated_progressive", "truncated_png", "truncated_webp", "truncated_bmp", "truncated_gif"),
    *("truncated_tiff", "zero_filled_jpeg", "jpeg_start_only", "damaged_png"),
    *("bomb_png", "bomb_jpeg", "bomb_gif", "bomb_bmp"),
    *("cut_with_mark_jpeg", "zeroed_jpeg", "random_jpeg", "missing_part_jpeg", "deep_jpeg", "vector", "wave"),
)
BOMB_SIDES = (14_000, 14_000)


def png_bomb(height: int, width: int) -> bytes:
    """Returns a whole black PNG of one bit a pixel: a few kilobytes, whatever its size."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(height * (1 + (width + 7) // 8)), 9)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def jpeg_of_sides(height: int, width: int) -> bytes:
    """Returns a JPEG whose header claims other sides than it has."""
    data = bytearray(encode("JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def rotated(kind: str, orientation: int) -> bytes:
    """Returns a picture with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(kind, exif=exif)


def deep_png(channels: int) -> bytes:
    """Returns a 16-bit PNG of 1, 3 or 4 channels, all bits in use."""
    pixels = np.random.default_rng(1).integers(0, 2**16, (*SIZE, channels), np.uint16)
    return cv2.imencode(".png", pixels)[1].tobytes()


def deep_jpeg() -> bytes:
    """Returns a JPEG whose header says that it has 12 bits a channel."""
    data = bytearray(encode("JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    return bytes(data)


def damaged_jpegs() -> dict[str, tuple[str, bytes]]:
    """Returns JPEGs by name that have their end mark but not all of their pixels."""
    data = encode("JPEG", photo(6, (240, 320)), quality=95)
    start, end = len(data) // 2, len(data) // 2 + 4096
    noise = np.random.default_rng(1).bytes(4096)
    return {
        "cut_with_mark_jpeg": ("cut_with_mark.jpg", data[: len(data) // 3] + b"\xff\xd9"),
        "zeroed_jpeg": ("zeroed.jpg", data[:start] + bytes(4096) + data[end:]),
        "random_jpeg": ("random.jpg", data[:start] + noise + data[end:]),
        "missing_part_jpeg": ("missing_part.jpg", data[:start] + data[end:]),
    }


@functools.cache
def images() -> dict[str, tuple[str, bytes | None]]:
    """Returns each file's name and its bytes by the name of the case; None if the file does not exist."""
    jpeg, png = encode("JPEG", quality=90), encode("PNG")
    frames = [Image.fromarray(photo(seed)) for seed in range(3)]
    animated = {"save_all": True, "append_images": frames[1:]}
    translucent = Image.fromarray(np.dstack([photo(), photo(1)[..., 0]]))
    palette = Image.fromarray(photo()).quantize(32)
    bmp = bytearray(encode("BMP"))
    bmp[18:26] = struct.pack("<ii", *BOMB_SIDES)
    damaged = bytearray(png)
    damaged[len(png) // 2] ^= 0xFF
    halves = {
        "truncated_jpeg": ("truncated.jpg", jpeg),
        "truncated_progressive": ("progressive.jpg", encode("JPEG", progressive=True)),
        "truncated_png": ("truncated.png", png),
        "truncated_webp": ("truncated.webp", encode("WEBP")),
        "truncated_bmp": ("truncated.bmp", encode("BMP")),
        "truncated_gif": ("truncated.gif", encode("GIF")),
        "truncated_tiff": ("truncated.tif", encode("TIFF")),
    }
    return {
        "good_jpeg": ("good.jpg", jpeg),
        "good_png": ("good.png", encode("PNG", photo(1))),
        "trailing_bytes_jpeg": ("trailing.jpg", encode("JPEG", photo(2)) + b"\0" * 5000),
        "missing": ("missing.jpg", None),
        "empty": ("empty.jpg", b""),
        "text": ("text.jpg", b"this is a text, not an image, whatever its name says\n" * 20),
        "git_lfs": ("1.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"),
        "html": ("page.png", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
        "noise": ("noise.jpg", np.random.default_rng(0).bytes(5000)),
        "header_only_png": ("header.png", png[:33]),
        "jpeg_start_only": ("start.jpg", b"\xff\xd8\xff\xe0 damaged"),
        "zero_filled_jpeg": ("zeros.jpg", jpeg[: len(jpeg) // 2] + bytes(len(jpeg) - len(jpeg) // 2)),
        "damaged_png": ("damaged.png", bytes(damaged)),
        **{name: (file, data[: len(data) // 2]) for name, (file, data) in halves.items()},
        "bomb_png": ("bomb.png", png_bomb(*BOMB_SIDES)),
        "bomb_jpeg": ("bomb.jpg", jpeg_of_sides(65_000, 65_000)),
        "bomb_gif": ("bomb.gif", b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + encode("GIF")[10:]),
        "bomb_bmp": ("bomb.bmp", bytes(bmp)),
        "png_named_jpg": ("really_png.jpg", encode("PNG", photo(3))),
        "jpeg_named_png": ("really_jpeg.png", encode("JPEG", photo(4))),
        "rotated_jpeg": ("rotated.jpg", rotated("JPEG", 6)),
        "rotated_png": ("rotated.png", rotated("PNG", 6)),
        "rotated_webp": ("rotated.webp", rotated("WEBP", 6)),
        "rotated_tiff": ("rotated.tif", rotated("TIFF", 6)),
        "animated_gif": ("animated.gif", encode("GIF", frames[0], **animated)),
        "animated_webp": ("animated.webp", encode("WEBP", frames[0], lossless=True, **animated)),
        "animated_png": ("animated.png", encode("PNG", frames[0], **animated)),
        "pages_tiff": ("pages.tif", encode("TIFF", frames[0], **animated)),
        "deep_grey_png": ("deep_grey.png", deep_png(1)),
        "deep_png": ("deep.png", deep_png(3)),
        "deep_alpha_png": ("deep_alpha.png", deep_png(4)),
        "cmyk_jpeg": ("cmyk.jpg", encode("JPEG", Image.fromarray(photo()).convert("CMYK"), quality=95)),
        "cmyk_tiff": ("cmyk.tif", encode("TIFF", Image.fromarray(photo()).convert("CMYK"))),
        "grey_jpeg": ("grey.jpg", encode("JPEG", Image.fromarray(photo()).convert("L"), quality=95)),
        "grey_alpha_png": ("grey_alpha.png", encode("PNG", translucent.convert("LA"))),
        "alpha_png": ("alpha.png", encode("PNG", translucent)),
        "alpha_webp": ("alpha.webp", encode("WEBP", translucent, lossless=True)),
        "palette_png": ("palette.png", encode("PNG", palette)),
        "palette_alpha_png": ("palette_alpha.png", encode("PNG", palette, transparency=3)),
        **damaged_jpegs(),
        "deep_jpeg": ("deep.jpg", deep_jpeg()),
        "vector": ("vector.jpg", encode("EPS")),
        "wave": ("wave.jpg", b"RIFF" + (100).to_bytes(4, "little") + b"WAVEfmt " + bytes(92)),
        "lossless_jpeg": ("lossless.jpg", lossless_jpeg(photo()[..., 0])),
        **{kind: (f"photo.{kind}", encode("JPEG", photo(7))) for kind in ("jfif", "jpe", "jpeg")},
        "heic": ("photo.heic", encode_heic(photo(8))),
        "avif": ("photo.avif", encode("AVIF", photo(9))),
        "float_tiff": ("float.tif", encode("TIFF", Image.fromarray(photo(10)[..., 0] / np.float32(255)))),
        "two_bits_tiff": ("two_bits.tif", grey_tiff(photo(11)[..., 0] >> 6, 2)),
        "alpha_gif": ("alpha.gif", encode("GIF", translucent)),
        "twelve_bits_png": (
            "twelve_bits.png",
            encode("PNG", Image.fromarray(photo(12)[..., 0].astype(np.uint16) * 12)),
        ),
        "one_pixel": ("one_pixel.png", encode("PNG", photo()[:1, :1])),
        "long_strip": ("strip.png", encode("PNG", photo(5, (4, 900)))),
    }


def build_corpus(folder) -> dict:
    """Writes every image into a folder; returns their paths by name. `missing` does not exist."""
    paths = {}
    for name, (file, content) in images().items():
        paths[name] = folder / file
        if content is not None:
            paths[name].write_bytes(content)
    paths["folder"] = folder / "folder.jpg"
    paths["folder"].mkdir()
    return paths


# Bad tables

# Tables with the columns path and class, and the names that the error or the findings must contain, separated by "|".
# The classes are multi-label if the name says so. The last two tables are sound.
TABLE_CASES = {
    "empty": (b"", "table.csv|empty|path|class"),
    "blank_lines": (b"\n\n\n", "table.csv|empty"),
    "header_alone": (b"path,class\n", "table.csv|no rows"),
    "no_path_column": (b"file,class\na.jpg,cat\n", "'path'|file, class|Rename"),
    "no_label_column": (b"path,label\na.jpg,cat\n", "'class'|path, label|csv_label_column"),
    "semicolons": (b"path;class\na.jpg;cat\nb.jpg;dog\n", "'path'|semicolons"),
    "tabs": (b"path\tclass\na.jpg\tcat\nb.jpg\tdog\n", "'path'|tabs"),
    "bars": (b"path|class\na.jpg|cat\nb.jpg|dog\n", "'path'|bars"),
    "latin_1": ("path,class\na.jpg,Ärmel\nb.jpg,dog\n".encode("latin-1"), "table.csv|line 2|Ärmel|Latin-1"),
    "utf_16": ("path,class\na.jpg,cat\n".encode("utf-16"), "UTF-16|UTF-8"),
    "utf_16_without_mark": ("path,class\na.jpg,cat\n".encode("utf-16-le"), "UTF-16|byte order mark"),
    "utf_16_big_endian_without_mark": ("path,class\na.jpg,cat\n".encode("utf-16-be"), "UTF-16|byte order mark"),
    "utf_32": ("path,class\na.jpg,cat\n".encode("utf-32"), "UTF-8"),
    "workbook": (b"PK\x03\x04\x14\x00\x06\x00xl/workbook.xml", "Excel"),
    "web_page": (b"\n<!DOCTYPE html>\n<html><body>path,class</body></html>", "web page"),
    "image_in_place_of_a_table": (b"\x89PNG\r\n\x1a\n\x00\x00\xff\x00", "no text|line 1"),
    "blanks_in_the_header": (b" path ,class \na.jpg,cat\n", "' path '|blanks|'class '"),
    "quoted_header": (b"'path','class'\na.jpg,cat\n", "quotation marks|'path'|'class'"),
    "capitals_in_the_header": (b"Path,CLASS\na.jpg,cat\n", "'Path'|capitals|'CLASS'"),
    "no_header": (b"a.jpg,cat\nb.jpg,dog\n", "no header|path,class"),
    "no_header_of_three_columns": (b"a.jpg,cat,7\nb.jpg,dog,8\n", "no header|path,class"),
    "no_header_and_semicolons": (b"a.jpg;cat\nb.jpg;dog\n", "semicolons|no header|path,class"),
    "no_header_of_ids": (b"0001,cat\n0002,dog\n", "no header|path,class"),
    "other_names": (b"Filename,label\na.jpg,cat\n", "'Filename'|csv_label_column|'label'"),
    "ids": (b"id,breed\n0001,boxer\n0002,pug\n", "'id'|make_csv_from_folders.py --table_path table.csv"),
    "one_hot": (b"path,cat,dog\na.jpg,1,0\nb.jpg,0,1\n", "0 and 1|make_csv_from_folders.py --table_path table.csv"),
    "one_hot_of_ids": (b"image_id,cat,dog\n0001,1.0,0.0\n0002,0.0,1.0\n", "0 and 1|--table_path table.csv"),
    "separator_line": (b"sep=;\npath;class\na.jpg;cat\n", "'sep=;'|semicolons"),
    "separator_line_of_a_comma": (b"sep=,\npath,class\na.jpg,cat\n", "'sep=,'"),
    "blank_first_line": (b"\npath,class\na.jpg,cat\n", "blank line"),
    "comment_in_front": (b"# made by hand\npath,class\na.jpg,cat\n", "'#'|line"),
    "header_as_a_comment": (b"#path,class\na.jpg,cat\n", "'#'"),
    "git_lfs_place": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00", "gzip"),
    "json": (b'[{"path": "a.jpg", "class": "cat"}]\n', "JSON"),
    "json_lines": (b'{"path": "a.jpg", "class": "cat"}\n', "JSON"),
    "lines_in_quotes": (b'"path,class"\n"a.jpg,cat"\n', "path,class|quot"),
    "comma_at_the_ends": (b"path,class\na.jpg,cat,\nb.jpg,dog,\n", "comma"),
    "numbers_in_front": (b"path,class\n0,a.jpg,cat\n1,b.jpg,dog\n", "number|'row,'"),
    "null_bytes": (b"path,class\na\x00.jpg,cat\nb.jpg,do\x00g\n", "missing, row 2"),
    "open_quote": (b'path,class\na.jpg,"cat\n', "quotation mark|line 2"),
    "too_many_fields": (b"path,class\na.jpg,cat,dog\nb.jpg,dog,cat\n", "more fields"),
    "too_many_fields_later": (b"path,class\na.jpg,cat\nb.jpg,dog,cat\n", "line 3|3 fields|2"),
    "too_few_fields": (b"path,class\na.jpg,cat\nb.jpg\n", "empty_label, row 3"),
    "column_named_twice": (b"path,class,class\na.jpg,cat,dog\n", "two columns|'class'"),
    "path_column_named_twice": (b"path,path,class\na.jpg,b.jpg,dog\n", "two columns|'path'"),
    "empty_paths": (b"path,class\n,cat\n  ,dog\nc.jpg,dog\n", "empty_path, row 2|empty_path, row 3"),
    "empty_labels": (b"path,class\na.jpg,\nb.jpg,   \nc.jpg,dog\n", "empty_label, row 2|empty_label, row 3"),
    "blank_line_between": (b"path,class\na.jpg,cat\n\nb.jpg,dog\n", "empty_path, row 3|empty_label, row 3"),
    "multi_label_empty_parts": (
        b"path,class\na.jpg,cat$\nb.jpg,cat$$dog\nc.jpg,$dog\nd.jpg,dog\n",
        "empty_label_part, row 2|empty_label_part, row 3|empty_label_part, row 4|'cat$$dog'",
    ),
    "multi_label_doubled": (b"path,class\na.jpg,cat$cat\nb.jpg,dog\n", "doubled_label, row 2|'cat$cat'"),
    "white_space": (
        b"path,class\na.jpg,cat\nb.jpg,cat \nc.jpg, dog\nd.jpg,dog\n",
        "white_space_variant, row 4|white_space_variant, row 3|'cat '",
    ),
    "case_variants": (
        b"path,class\na.jpg,cat\nb.jpg,Cat\nc.jpg,dog\nd.jpg,dog\n",
        "case_variant, row 2|'cat' (1|'Cat'",
    ),
    "duplicate_paths": (
        b"path,class\na.jpg,cat\n./a.jpg,cat\nb.jpg,dog\nb.jpg,cat\n",
        "duplicate_with_other_label, row 5|b.jpg (row 4)|'cat' here|duplicate_path, row 3|a.jpg (row 2)",
    ),
    "one_class": (b"path,class\na.jpg,cat\nb.jpg,cat\n", "one class|cat"),
    "class_of_one_image": (b"path,class\na.jpg,cat\nb.jpg,cat\nc.jpg,dog\n", "class_of_one_image, row 4|'dog'"),
    "line_break_in_a_path": (b'path,class\n"a\nb.jpg",cat\nc.jpg,dog\n', ""),
    "markup": (b'path,class\n<script>alert(1)</script>.jpg,"<img src=x onerror=alert(1)>"\nb.jpg,dog\n', ""),
}
BAD_TABLES = {name: content for name, (content, _) in TABLE_CASES.items()}


def check_message(message, names, folder) -> None:
    """Checks that a message is one short line without the folder's path, and contains the names, separated by "|"."""
    message = message.replace(f"{folder}/", "")
    assert [name for name in names.split("|") if name not in message] == [], message
    assert message.replace("\t", " ").isprintable()
    assert len(message) < 700
