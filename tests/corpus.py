"""One file of every kind of bad or unusual image, and one table of every kind of bad CSV file, for all tests."""

import struct
import zlib

import cv2
import numpy as np
from encoding import SIZE, encode, photo, png_chunk
from odd_images import encode_heic, grey_tiff, lossless_jpeg
from PIL import Image

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
    """Returns a JPEG whose header names other sides than it has."""
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
    """Returns by name JPEGs that have their end mark, and not all of their pixels."""
    data = encode("JPEG", photo(6, (240, 320)), quality=95)
    start, end = len(data) // 2, len(data) // 2 + 4096
    noise = np.random.default_rng(1).bytes(4096)
    return {
        "cut_with_mark_jpeg": ("cut_with_mark.jpg", data[: len(data) // 3] + b"\xff\xd9"),
        "zeroed_jpeg": ("zeroed.jpg", data[:start] + bytes(4096) + data[end:]),
        "random_jpeg": ("random.jpg", data[:start] + noise + data[end:]),
        "missing_part_jpeg": ("missing_part.jpg", data[:start] + data[end:]),
    }


def images() -> dict[str, tuple[str, bytes | None]]:
    """Returns by name the file's name and its bytes, None where there is no such file."""
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
        "jfif": ("photo.jfif", encode("JPEG", photo(7))),
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
    """Writes every image into a folder; returns their paths by name. That of `missing` leads to no file."""
    paths = {}
    for name, (file, content) in images().items():
        paths[name] = folder / file
        if content is not None:
            paths[name].write_bytes(content)
    paths["folder"] = folder / "folder.jpg"
    paths["folder"].mkdir()
    return paths


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
