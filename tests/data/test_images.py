"""Headers, decoding and resizing of one image."""

import os

import cv2
import numpy as np
import pytest
import skimage.data
from checked_tables import corpus  # noqa: F401
from corpus import (
    EXIF_START,
    alpha_bmp,
    encode,
    encode_heic,
    exif,
    grey_tiff,
    jpeg_with,
    lossless_jpeg,
    oriented_files,
    photo,
    png_with,
    quadrants,
)
from picture_sets import (
    SIZE,
    unreadable,  # noqa: F401
)
from PIL import Image

from finetune.core.options import UserError
from finetune.data.images import JPEG_HEADER, choose_divisor, read_image, resize_image
from finetune.data.inspection import inspect_image


def over_white(picture):
    """Lays RGB and alpha of 0 to 255 over white."""
    share = picture[..., 3:].astype(float) / 255
    return share * picture[..., :3] + (1 - share) * 255


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_png_is_reduced_to_8_bits(tmp_path, channels):
    eight = np.random.default_rng(4).integers(0, 256, (*SIZE, channels), np.uint8)
    path = str(tmp_path / "deep.png")
    cv2.imwrite(path, eight.astype(np.uint16) * 257)
    expected = np.repeat(eight, 3, axis=2) if channels == 1 else eight[..., 2::-1]
    if channels == 4:
        expected = over_white(eight[..., [2, 1, 0, 3]])
    assert np.abs(read_image(path) - expected.astype(float)).max() <= (channels == 4)


@pytest.mark.parametrize("name", ["žltý kvet/ďatelina č. 1.png", "花.png", "with space.png", "UPPER.PNG"])
def test_any_path_is_read(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (5, 3), (1, 2, 3)).save(path)
    assert read_image(str(path)).tolist() == [[[1, 2, 3]] * 5] * 3


def test_shrinking_averages_areas():
    image = np.zeros((4, 8, 3), np.uint8)
    image[:2, :4] = [[[0, 40, 80]] * 4, [[20, 60, 100]] * 4]
    image[2, 6] = 200
    expected = np.zeros((2, 2, 3))
    expected[0, 0], expected[1, 1] = (10, 50, 90), 25
    np.testing.assert_array_equal(resize_image(image, (2, 2)), expected)


def test_shrinking_by_any_factor_keeps_the_mean():
    image = np.random.default_rng(6).integers(0, 256, (45, 64, 3), np.uint8)
    np.testing.assert_allclose(resize_image(image, (13, 22)).mean(axis=(0, 1)), image.mean(axis=(0, 1)), atol=0.5)


@pytest.mark.parametrize("size", [(3, 3), (12, 30), (31, 8), (50, 50), SIZE])
def test_resizing_keeps_a_plain_colour(size):
    plain = np.full((*SIZE, 3), (10, 120, 250), np.uint8)
    assert resize_image(plain, size).shape == (*size, 3)
    assert np.unique(resize_image(plain, size).reshape(-1, 3), axis=0).tolist() == [[10, 120, 250]]


def photo_jpeg(path, height, width, **options):
    """Writes a real photo, enlarged or shrunk, as a JPEG file."""
    image = Image.fromarray(skimage.data.astronaut()).resize((width, height), Image.Resampling.BICUBIC)
    image.save(path, quality=90, **options)
    return str(path)


@pytest.mark.parametrize(
    ("height", "width", "image_size", "divisor"),
    [
        *((3000, 4000, (224, 224), 8), (1800, 1800, (224, 224), 8), (1791, 3000, (224, 224), 4)),
        *((448, 640, (224, 224), 2), (447, 640, (224, 224), 1), (100, 100, (224, 224), 1)),
        # Turned upright the picture may be 300 wide, which a half of would be below 200.
        *((300, 900, (100, 200), 1), (400, 900, (100, 200), 2)),
    ],
)
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_suffices(height, width, image_size, divisor):
    assert choose_divisor((width, height), image_size) == divisor


@pytest.mark.parametrize(("height", "width"), [(480, 640), (1000, 1500), (3000, 4000)])
def test_scaled_decoding_is_close_to_full_decoding(tmp_path, height, width):
    path = photo_jpeg(tmp_path / "photo.jpg", height, width)
    scaled = read_image(path, (224, 224))
    assert min(scaled.shape[:2]) >= 224
    assert scaled.shape[0] <= height // 2
    full = cv2.resize(read_image(path), (224, 224), interpolation=cv2.INTER_AREA)
    assert np.abs(resize_image(scaled, (224, 224)).astype(int) - full).mean() < 2


def test_other_formats_are_decoded_whole(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(skimage.data.astronaut()).save(path)
    np.testing.assert_array_equal(read_image(str(path), (32, 32)), skimage.data.astronaut())


@pytest.mark.parametrize("size", [None, (30, 40)])
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif", "gif"])
def test_an_image_in_a_store_is_that_of_the_file(tmp_path, store, kind, size):
    path = tmp_path / f"a.{kind}"
    Image.fromarray(skimage.data.astronaut()[:120, :160]).save(path)
    store.put(f"memory://bucket/a.{kind}", path.read_bytes())
    np.testing.assert_array_equal(read_image(f"memory://bucket/a.{kind}", size), read_image(str(path), size))


@pytest.mark.parametrize(
    "name",
    [
        *("rotated_jpeg", "rotated_png", "rotated_tiff", "animated_gif", "animated_webp", "animated_png", "pages_tiff"),
        *("cmyk_jpeg", "cmyk_tiff", "alpha_webp", "palette_alpha_png", "grey_alpha_png", "grey_jpeg"),
    ],
)
def test_unusual_image_is_decoded_as_pillow_does(corpus, name):
    from PIL import ImageOps

    with Image.open(corpus[name]) as image:
        upright = ImageOps.exif_transpose(image)
        has_alpha = upright.mode in ("LA", "RGBA", "P")
        expected = np.asarray(upright.convert("RGB"))
        if has_alpha:
            expected = over_white(np.asarray(upright.convert("RGBA")))
    image = read_image(str(corpus[name]))
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).mean() < 1.5


def test_chunk_that_claims_gigabytes_takes_no_memory(corpus, tmp_path, monkeypatch):
    data = bytearray(corpus["good_png"].read_bytes())
    start = data.index(b"IDAT")
    data[start - 4 : start] = (3 * 2**30).to_bytes(4, "big")
    path = tmp_path / "chunk.png"
    path.write_bytes(data)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded by OpenCV"))
    with pytest.raises(UserError, match="longer than the file"):
        read_image(str(path))


def test_small_file_that_claims_more_pixels_than_it_can_hold_is_refused(tmp_path):
    path = tmp_path / "claim.bmp"
    data = bytearray(encode("BMP", photo(0, (8, 8))))
    data[18:26] = (12_000).to_bytes(4, "little") * 2
    path.write_bytes(data)
    with pytest.raises(UserError, match="cannot hold"):
        read_image(str(path))


def test_pixels_are_counted_before_decoding(corpus, monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    for name in ("bomb_png", "bomb_jpeg", "bomb_gif", "bomb_bmp", "good_png"):
        with pytest.raises(UserError, match="more than max_image_pixels"):
            read_image(str(corpus[name]), max_pixels=100)


# What a person sees

# Source: EXIF 2.32 (CIPA DC-008-2019), tag 0x0112: which row and column of the picture the first ones stored are.
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored),
}


@pytest.mark.parametrize("orientation", [5, 8, *(pytest.param(o, marks=pytest.mark.slow) for o in (1, 2, 3, 4, 6, 7))])
def test_every_file_that_tells_its_orientation_is_turned_upright(tmp_path, orientation):
    expected = UPRIGHT[orientation](quadrants())
    for name, data in oriented_files(orientation).items():
        path = tmp_path / name
        path.write_bytes(data)
        image = read_image(str(path))
        assert image.shape == expected.shape, name
        assert np.abs(image.astype(int) - expected).mean() < 8, name
        remarks = [kind for kind, _ in inspect_image(str(path), decode=True).remarks]
        # What is behind the pixels is not looked for; libheif turns HEIC itself.
        is_told = orientation != 1 and not name.endswith("behind") and name != "heic"
        assert ("rotated" in remarks) == is_told, name


def test_damaged_metadata_leave_a_picture_as_it_is(tmp_path):
    for name, data in {
        "exif.jpg": jpeg_with(EXIF_START + b"II*\0" + bytes(3)),
        "orientation.jpg": jpeg_with(EXIF_START + exif(99)),
        "raw.png": png_with(b"tEXt", b"Raw profile type exif\0\nexif\n 9\nnot hexadecimal"),
        "xmp.png": png_with(b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + b'tiff:Orientation="x"'),
    }.items():
        (tmp_path / name).write_bytes(data)
        assert np.abs(read_image(str(tmp_path / name)).astype(int) - quadrants()).mean() < 8, name


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF", "AVIF", "TGA", "JPEG2000", "ICO", "HEIF"])
def test_a_black_shape_on_a_transparent_ground_is_black_on_white(tmp_path, kind):
    picture = np.zeros((32, 32, 4), np.uint8)
    picture[8:24, 8:24, 3] = 255
    path = tmp_path / f"shape.{kind.lower()}"
    Image.fromarray(picture).save(path, kind, **({"lossless": True} if kind == "WEBP" else {}))
    image = read_image(str(path)).astype(int)
    assert image.shape == (32, 32, 3)
    assert image[10:22, 10:22].max() <= 8
    assert min(image[:6].min(), image[26:].min(), image[:, :6].min(), image[:, 26:].min()) >= 247
    assert "alpha" in [remark for remark, _ in inspect_image(str(path)).remarks]


def test_a_bmp_is_transparent_where_its_fourth_byte_is_used_at_all(tmp_path):
    alpha = np.zeros((8, 8), np.uint8)
    (tmp_path / "unused.bmp").write_bytes(alpha_bmp(alpha))
    assert read_image(str(tmp_path / "unused.bmp")).max() == 0
    alpha[2:6, 2:6] = 255
    (tmp_path / "used.bmp").write_bytes(alpha_bmp(alpha))
    np.testing.assert_array_equal(read_image(str(tmp_path / "used.bmp")), np.repeat(255 - alpha[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_png_without_transparency_is_read_as_it_is(tmp_path, mode):
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (*SIZE, 3), np.uint8)).convert(mode)
    picture.save(tmp_path / "picture.png")
    np.testing.assert_array_equal(read_image(str(tmp_path / "picture.png")), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "LA"])
def test_transparency_by_a_colour_or_a_palette_is_white_too(tmp_path, mode):
    picture = Image.fromarray(np.full((20, 20), 40, np.uint8))
    picture.paste(90, (5, 5, 15, 15))
    transparent = {"L": 40, "RGB": (40, 40, 40), "P": 40}
    if mode == "LA":
        picture.putalpha(Image.eval(picture, lambda value: 255 if value == 90 else 0))
    picture.convert(mode).save(tmp_path / "a.png", **({"transparency": transparent[mode]} if mode != "LA" else {}))
    image = read_image(str(tmp_path / "a.png"))
    expected = np.full((20, 20, 3), 255)
    expected[5:15, 5:15] = 90
    np.testing.assert_array_equal(image, expected)


RAMP = np.linspace(0, 1, 40 * 64).reshape(40, 64)


def test_tiff_of_2_bits_is_read(tmp_path):
    values = np.random.default_rng(0).integers(0, 4, (9, 16), np.uint8)
    (tmp_path / "a.tif").write_bytes(grey_tiff(values, 2))
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.tif"))[..., 1], values * 85)
    assert inspect_image(str(tmp_path / "a.tif"), decode=True).fault is None


def test_what_the_check_passes_can_be_trained_on_a_lossless_jpeg(tmp_path):
    grey = np.asarray(Image.fromarray(skimage.data.astronaut()).convert("L"))[:400, :480]
    (tmp_path / "a.jpg").write_bytes(lossless_jpeg(grey))
    assert inspect_image(str(tmp_path / "a.jpg"), decode=True).fault is None
    for size in (None, (100, 100)):
        image = read_image(str(tmp_path / "a.jpg"), size)
        np.testing.assert_array_equal(image, np.repeat(grey[..., None], 3, axis=2))


def test_a_jpeg_that_simplejpeg_does_not_know_is_read_by_pillow_and_turned_once(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("tjDecompressHeader3(): Could not determine subsampling level of JPEG image")

    (tmp_path / "a.jpg").write_bytes(jpeg_with(EXIF_START + exif(6)))
    monkeypatch.setattr("simplejpeg.decode_jpeg", refuse)
    assert np.abs(read_image(str(tmp_path / "a.jpg")).astype(int) - UPRIGHT[6](quadrants())).mean() < 8


def test_12_bits_in_the_place_of_16_are_a_warning_and_a_faint_photo_is_none(tmp_path):
    deep = (RAMP * 3100).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray((100 + RAMP * 30).astype(np.uint8)).save(tmp_path / "faint.png")
    found = inspect_image(str(tmp_path / "deep.png"), decode=True).remarks
    assert "nearly_uniform" in [kind for kind, _ in found]
    assert inspect_image(str(tmp_path / "faint.png"), decode=True).remarks == []


def test_heic_without_its_package_names_it(tmp_path, monkeypatch):
    path = tmp_path / "IMG_0001.HEIC"
    path.write_bytes(encode_heic(photo()))
    monkeypatch.setattr("finetune.data.headers.pillow_heif", None)
    monkeypatch.setattr("PIL.Image.ID", [name for name in Image.ID if name != "HEIF"])
    assert inspect_image(str(path)).fault[0] == "needs_package"
    with pytest.raises(UserError, match="pip install pillow-heif"):
        read_image(str(path))


def test_a_header_is_read_once_for_as_long_as_the_file_has_its_length(tmp_path, monkeypatch):
    path, header = str(tmp_path / "photo.jpg"), np.zeros(1, JPEG_HEADER)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(skimage.data.astronaut()[:300])
    picture.save(path, exif=exif)
    expected = read_image(path, (100, 60))
    np.testing.assert_array_equal(read_image(path, (100, 60), header=header), expected)
    assert header.item() == (os.path.getsize(path), 512, 300, 6)
    with monkeypatch.context() as patched:
        patched.setattr("finetune.data.images.read_header", lambda *_: pytest.fail("the header was read again"))
        np.testing.assert_array_equal(read_image(path, (100, 60), header=header), expected)
    picture.crop((0, 0, 200, 300)).save(path)
    assert read_image(path, header=header).shape == (300, 200, 3)
    assert header.item() == (os.path.getsize(path), 200, 300, 1)
    picture.save(path, "PNG")
    assert read_image(path, header=header).shape == (300, 512, 3)
