"""TIFFs of floats, wide and signed integers: each value becomes one brightness, whatever the picture's largest is."""

import io
import json
import struct
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

import predict
import train
from configs import Configs
from finetune.core.options import UserError
from finetune.data.data_check import check_data
from finetune.data.findings import BadImage
from finetune.data.images import decode_image, read_image
from finetune.data.inspection import inspect_image, resolve_pixel_range, resolve_pixel_range_of_files, tell_unfit_range
from finetune.data.tables import ImageTable
from finetune.loading.caches import DiskCache, digest_image
from finetune.models.description import describe_model
from generator import get_generator
from predict import PredictConfigs

RNG = np.random.default_rng(0)
SHAPE = (21, 37)


def encode(values, **options):
    """Returns values, `(height, width)` or `(height, width, channels)`, as a TIFF that tifffile writes."""
    file = io.BytesIO()
    options = {"photometric": "rgb" if values.ndim == 3 else "minisblack", "metadata": None} | options
    if options.get("planarconfig") == "separate":
        values = np.moveaxis(values, 2, 0)
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def decode(data, pixel_range=()):
    return decode_image(np.frombuffer(data, np.uint8), 10**8, pixel_range=pixel_range)


def replace_strip(data, page, packed, entry, order):
    """Returns a TIFF of one strip with other packed bytes and one more tag, at the end of the file."""
    tags = [bytearray(data[tag.offset : tag.offset + 12]) for tag in page.tags]
    for tag in tags:
        number = struct.unpack(f"{order}H", tag[:2])[0]
        if number in (273, 279):
            tag[2:] = struct.pack(f"{order}HII", 4, 1, len(data) if number == 273 else len(packed))
    tags = sorted([*map(bytes, tags), entry], key=lambda tag: struct.unpack(f"{order}H", tag[:2]))
    place = len(data) + len(packed)
    head = data[:4] + struct.pack(f"{order}I", place)
    return head + data[8:] + packed + struct.pack(f"{order}H", len(tags)) + b"".join(tags) + bytes(4)


def draw_values(dtype, shape=SHAPE):
    if np.dtype(dtype).kind == "f":
        return RNG.uniform(-900, 3100, shape).astype(dtype)
    limits = np.iinfo(dtype)
    low, high = (limits.min, limits.max) if limits.bits <= 16 else (-900 * (limits.min < 0), 3100)
    return RNG.integers(low, high, shape, dtype, endpoint=True)


def expect(values, pixel_range=(-1000, 3000)):
    """Returns the brightness of each value: by the type of 8 and 16 bits, else by the range."""
    if values.dtype.kind != "f" and values.dtype.itemsize <= 2:
        lowest = float(np.iinfo(values.dtype).min)
        return np.floor((values.astype(float) - lowest) / 256 ** (values.dtype.itemsize - 1))
    low, high = pixel_range
    return np.rint(np.clip((values.astype(float) - low) / (high - low), 0, 1) * 255)


def assert_reads(data, expected, pixel_range=(-1000, 3000), tolerance=0):
    image = decode(data, pixel_range)
    assert image.dtype == np.uint8
    expected = expected[..., None] if expected.ndim == 2 else expected
    assert image.shape == (*expected.shape[:2], 3)
    assert np.abs(image - expected).max() <= tolerance


@pytest.mark.parametrize("shape", [SHAPE, (*SHAPE, 3)], ids=["grey", "rgb"])
@pytest.mark.parametrize("dtype", ["i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"])
def test_every_type_and_layout_is_read(dtype, shape):
    values = draw_values(dtype, shape)
    layouts = [{}, {"rowsperstrip": 5}, {"tile": (16, 32)}, {"compression": "zlib"}, {"compression": "lzma"}]
    layouts += [{"compression": "zlib", "tile": (16, 32)}, {"compression": "zlib", "rowsperstrip": 4}]
    for layout in layouts:
        for order in "<>":
            assert_reads(encode(values, byteorder=order, **layout), expect(values))
            if values.ndim == 3:
                assert_reads(encode(values, byteorder=order, planarconfig="separate", **layout), expect(values))
    assert_reads(encode(values, bigtiff=True), expect(values))


@pytest.mark.parametrize("packing", ["tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits", "zstd"])
@pytest.mark.parametrize(("dtype", "predictor"), [("f4", 3), ("f4", 2), ("i4", 2), ("u2", 2), ("f4", 1)])
def test_what_libtiff_packs_with_a_predictor_is_read(dtype, predictor, packing):
    file, values = io.BytesIO(), draw_values(dtype)
    Image.fromarray(values).save(file, "TIFF", compression=packing, tiffinfo={317: predictor, 278: 5})
    page = tifffile.TiffFile(io.BytesIO(file.getvalue())).pages[0]
    assert packing == "packbits" or page.predictor == predictor
    assert (page.compression > 1, page.rowsperstrip) == (True, 5)
    assert_reads(file.getvalue(), expect(values))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("order", "<>")
def test_differences_of_floats_in_three_channels_are_undone(dtype, order):
    values = draw_values(dtype, (*SHAPE, 3))
    # By TIFF Technical Note 3: of a row the first bytes of all values, then the second ones; each byte less that of
    # the same channel before it.
    ranks = np.moveaxis(values.astype(f">{dtype}").reshape(SHAPE[0], -1, 1).view(np.uint8), 2, 1)
    rows = ranks.reshape(SHAPE[0], -1).copy()
    rows[:, 3:] -= ranks.reshape(SHAPE[0], -1)[:, :-3]
    data = encode(values, byteorder=order, compression="zlib", rowsperstrip=SHAPE[0], software=False)
    page = tifffile.TiffFile(io.BytesIO(data)).pages[0]
    packed = zlib.compress(rows.tobytes())
    entry = struct.pack(f"{order}HHI", 317, 3, 1) + struct.pack(f"{order}HH", 3, 0)
    data = replace_strip(data, page, packed, entry, order)
    assert_reads(data, expect(values))


def test_floats_of_opencv_are_unpacked(tmp_path):
    values = RNG.uniform(0, 255, (*SHAPE, 3)).astype(np.float32)
    cv2.imwrite(str(tmp_path / "a.tif"), values[..., ::-1])
    data = (tmp_path / "a.tif").read_bytes()
    assert tifffile.TiffFile(tmp_path / "a.tif").pages[0].compression == 34676
    # LogLuv keeps three digits of the brightness, and the hue coarsely.
    assert np.abs(decode(data, (0, 255)).astype(float) - values).mean() < 2
    damaged = bytearray(data)
    damaged[40:400] = bytes(360)
    for wrong in (bytes(damaged), damaged[: len(data) // 2]):
        with pytest.raises(BadImage):
            decode(bytes(wrong))


@pytest.mark.parametrize("kind", ["f4", "i4"])
def test_brightness_does_not_depend_on_the_largest_value(kind):
    # A picture of one part more or less than what is white, and one bright pixel, change nothing else.
    scale = 1 if kind == "f4" else 255
    ramp = np.linspace(0, scale, 40 * 64).reshape(40, 64)
    plain = decode(encode(ramp.astype(kind))).astype(int)
    assert (plain.min(), plain.max()) == (0, 255)
    for factor in (1.001, 1.01, 2):
        larger = np.append(ramp[:-1], ramp[-1:] * factor, axis=0).astype(kind)
        assert np.abs(decode(encode(larger))[:-1].astype(int) - plain[:-1]).max() == 0


def test_infinities_are_black_and_white_and_what_is_no_number_black():
    values = np.array([[np.inf, -np.inf, np.nan, -0.5, 0.5, 2, 1e38, -1e38]], np.float32)
    assert decode(encode(values))[0, :, 0].tolist() == [255, 0, 0, 0, 128, 255, 255, 0]
    assert decode(encode(values), (-0.5, 0.5))[0, :, 0].tolist() == [255, 0, 0, 0, 255, 255, 255, 0]
    inverted = decode(encode(values, photometric="miniswhite"))[0, :, 0]
    assert inverted.tolist() == [0, 255, 0, 255, 128, 0, 0, 255]


@pytest.mark.parametrize("dtype", ["u2", "i2", "u4", "f4"])
def test_where_zero_is_white_brightness_is_turned(dtype):
    values = draw_values(dtype)
    expected = 255 - expect(values)
    # A half is rounded to the other side.
    assert_reads(encode(values, photometric="miniswhite"), expected, tolerance=1 if dtype in ("u4", "f4") else 0)


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
def test_what_is_transparent_lies_over_white(kind):
    colours = RNG.uniform(0, 1, (*SHAPE, 3)).astype(np.float32)
    opacity = np.linspace(0.1, 1, SHAPE[1], dtype=np.float32)[None, :, None].repeat(SHAPE[0], axis=0)
    stored = np.concatenate([colours * (opacity if kind == "assocalpha" else 1), opacity], axis=2)
    expected = 255 * (colours * opacity + 1 - opacity)
    assert_reads(encode(stored, extrasamples=[kind]), expected, (0, 1), tolerance=1.01)
    grey = np.concatenate([stored[..., :1], opacity], axis=2)
    data = encode(grey, photometric="minisblack", planarconfig="contig", extrasamples=[kind])
    assert_reads(data, expected[..., :1], (0, 1), tolerance=1.01)
    shown = decode(encode((stored * 65535).astype(np.uint16), extrasamples=[kind]))
    assert np.abs(shown - expected).max() <= (2 if kind == "unassalpha" else 3)


def test_a_picture_of_floats_is_turned_upright_and_the_first_page_counts():
    values = RNG.uniform(0, 1, (*SHAPE, 3)).astype(np.float32)
    turned = decode(encode(values, extratags=[(274, 3, 1, 6, True)]))
    np.testing.assert_array_equal(turned, np.rot90(expect(values, (0, 1)), -1))
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for page in (values, 1 - values):
            writer.write(page, photometric="rgb", metadata=None)
    assert_reads(file.getvalue(), expect(values, (0, 1)), (0, 1))


def test_remarks_come_from_the_header_of_what_pillow_has_no_mode_for(tmp_path):
    path = str(tmp_path / "a.tif")
    values = RNG.uniform(0, 1, (*SHAPE, 4)).astype(np.float32)
    with tifffile.TiffWriter(path) as writer:
        for _ in range(2):
            options = {"photometric": "rgb", "extrasamples": ["unassalpha"], "metadata": None}
            writer.write(values, extratags=[(274, 3, 1, 6, True)], **options)
    for decodes in (False, True):
        found = inspect_image(path, decodes)
        assert found.fault is None
        assert found.sides == SHAPE
        assert {kind for kind, _ in found.remarks} == {"rotated", "animated", "alpha"}


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"tile": (16, 16)}, {"compression": "lzma"}])
def test_a_cut_or_damaged_file_is_refused(options):
    data = encode(RNG.uniform(0, 1, (90, 90, 3)).astype(np.float32), **options)
    with pytest.raises(BadImage):
        decode(data[: len(data) * 2 // 3])
    if options.get("compression"):
        damaged = bytearray(data)
        damaged[len(data) // 2 : len(data) // 2 + 4096] = bytes(4096)
        with pytest.raises(BadImage):
            decode(bytes(damaged))


def test_tags_that_lie_are_refused():
    data = encode(RNG.uniform(0, 1, (32, 32)).astype(np.float32), tile=(16, 16))

    def with_tag(tag, value):
        place = data.index(struct.pack("<H", tag), 8)
        return data[: place + 8] + struct.pack("<I", value) + data[place + 12 :]

    for tag, value in ((322, 2**30), (256, 2**15), (257, 2**15), (324, 2**31), (259, 999)):
        with pytest.raises(BadImage):
            decode_image(np.frombuffer(with_tag(tag, value), np.uint8), 10**8)


def test_bands_of_no_known_colour_and_other_files_of_floats_are_refused(tmp_path):
    bands = RNG.uniform(0, 1, (*SHAPE, 5)).astype(np.float32)
    with pytest.raises(BadImage):
        decode(encode(bands, photometric="minisblack", planarconfig="contig"))
    Image.fromarray(bands[..., 0]).save(tmp_path / "a.pfm")
    with pytest.raises(UserError, match="PFM"):
        read_image(str(tmp_path / "a.pfm"))


# Which range


def write_tiffs(folder, **pictures):
    for name, values in pictures.items():
        (folder / f"{name}.tif").write_bytes(encode(np.asarray(values)))
    return [str(folder / f"{name}.tif") for name in pictures]


def find_range(files, **options):
    return resolve_pixel_range_of_files(Configs(**options), {"train.csv": files}).pixel_range


def test_the_range_is_that_of_the_training_images(tmp_path, capsys):
    ramp = np.linspace(0, 1, 40, dtype=np.float32).reshape(5, 8)
    odd = ramp.copy() * 1.5
    odd[0, :3] = np.inf, -np.inf, np.nan
    files = write_tiffs(tmp_path, a=ramp * 0.5, b=ramp * 0.9 + 0.1, c=odd, d=(ramp * 300).astype(np.int32) - 7)
    files += write_tiffs(tmp_path, deep=(ramp * 9).astype(np.uint16), flat=np.full((5, 8), 7, np.uint32))
    (tmp_path / "damaged.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:200])
    rest = [str(tmp_path / "damaged.tif"), str(tmp_path / "missing.tif"), str(tmp_path)]
    assert find_range([files[4], *rest]) == []
    assert capsys.readouterr().out == ""
    assert find_range(files[:2] + rest) == [0, 1]
    assert "0 is black and 1 white (values in the 2 of train.csv: 0 to 1)" in capsys.readouterr().out
    assert find_range(files[:3]) == [0, 1.5]
    assert find_range([files[3]]) == [-7, 293]
    assert find_range([files[5]]) == [7, 14]
    capsys.readouterr()
    assert find_range(files) == [0, 1.5, -7, 293]
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert find_range(files, pixel_range=[0, 9]) == [0, 9]
    # Of two pairs the second is for integers.
    assert read_image(files[3], pixel_range=(0, 1.5, -7, 293)).max() == 255
    assert read_image(files[2], pixel_range=(0, 1.5, -7, 293))[-1, -1, 0] == 255


@pytest.mark.parametrize("values", [[1], [2, 1], [1, 1], [0, 1, 2], [0, 1, 5, 5], [0, float("inf")], [float("nan"), 1]])
def test_a_range_that_is_none_is_refused(values):
    with pytest.raises(UserError, match="pixel_range"):
        Configs(pixel_range=values).validate()


def test_the_full_check_tells_infinities_and_what_is_beyond_the_range(tmp_path):
    ramp = np.linspace(0, 1, 40 * 64, dtype=np.float32).reshape(40, 64)
    odd = ramp.copy()
    odd[0, :3] = np.inf
    files = write_tiffs(tmp_path, right=ramp, odd=odd, beyond=ramp * 4)
    table = ImageTable("training", "train.csv", files, files, ["a", "b", "a"])
    found = check_data([table], Configs(pixel_range=[0, 1]), False, "full").findings
    found = [one for one in found if one.kind == "odd_values"]
    assert [one.row for one in found] == [3, 4]
    assert "3 infinite or NaN values" in found[0].detail
    assert "75 %" in found[1].detail
    found = check_data([table], Configs(pixel_range=[0, 4]), False, "full").findings
    assert [one.row for one in found if one.kind == "odd_values"] == [3]


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_cache_knows_the_pictures_of_its_range_alone(tmp_path, kind):
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    files = write_tiffs(tmp_path, a=ramp, b=1 - ramp)
    (tmp_path / "a.csv").write_text("path,class\n" + "".join(f"{file},red\n" for file in files))
    facts = {"image_target_size": (8, 8, 3), "image_cache": kind, "image_cache_path": str(tmp_path / "cache")}
    for pixel_range in ([0, 1], [0, 2], [0, 1]):
        sequence = get_generator(str(tmp_path / "a.csv"), ["red"], Configs(pixel_range=pixel_range, **facts), False)
        for _ in range(2):
            np.testing.assert_array_equal(sequence[0][0][0, ..., 0], np.rint(ramp.astype(float) / pixel_range[1] * 255))
    folder = str(tmp_path / "cache")
    assert DiskCache(files, (8, 8), folder, pixel_range=(0, 1)).path != DiskCache(files, (8, 8), folder).path
    assert len({digest_image(files[0], pixel_range) for pixel_range in ((), (0, 1), (0, 2))}) == 3


@pytest.mark.parametrize("factor", [100, 1e-3])
def test_pictures_without_a_range_or_that_a_range_makes_white_or_black_are_named(tmp_path, capsys, factor):
    ramp = np.linspace(0, 1000, 64, dtype=np.float32).reshape(8, 8)
    right, flat, wrong = write_tiffs(tmp_path, right=ramp, flat=np.zeros_like(ramp), wrong=ramp * factor)
    tables = [tmp_path / f"{name}.csv" for name in ("right", "wrong")]
    for table, file in zip(tables, (right, wrong), strict=True):
        table.write_text(f"path,class\n{file},red\n")

    def printed(function, *arguments):
        function(*arguments)
        return capsys.readouterr().out

    assert printed(tell_unfit_range, "photos", [right, flat, str(tmp_path / "missing.tif")], (0, 1000)) == ""
    assert printed(tell_unfit_range, "photos", [wrong], ()) == ""
    shown = printed(tell_unfit_range, "photos", [right, wrong, flat], (0, 1000))
    assert all(text in shown for text in ("photos: 1 of 3", "0 to 1000", wrong))
    shown = printed(get_generator, str(tables[0]), ["red"], Configs(), False)
    assert all(text in shown for text in ("right.csv: 1 float or 32-bit TIFF", "0 is black and 255 white"))
    assert printed(get_generator, str(tables[0]), ["red"], Configs(pixel_range=[0, 1000]), False) == ""
    assert wrong in printed(get_generator, str(tables[1]), ["red"], Configs(pixel_range=[0, 1000]), False)
    for options in ({}, {"pixel_range": [0, 1000]}):
        shown = printed(resolve_pixel_range, Configs(**options), [str(table) for table in tables])
        assert "wrong.csv: 1 of 1" in shown
        assert "right.csv: 1 of 1" not in shown


def write_set(folder, name, high):
    """Writes twelve pictures of two classes whose values reach from -0.5 to `high`, and their table."""
    rows = []
    for number in range(12):
        values = RNG.uniform(-0.5, high, (32, 32)).astype(np.float32)
        values[0, :2], values[16:] = (-0.5, high), values[16:] * (0.2 if number % 2 else 1)
        rows.append((*write_tiffs(folder, **{f"{name}_{number}": values}), "ab"[number % 2]))
    (folder / f"{name}.csv").write_text("path,class\n" + "".join(f"{path},{label}\n" for path, label in rows))
    return str(folder / f"{name}.csv")


@pytest.mark.slow
def test_a_run_keeps_the_range_of_its_training_images(tmp_path, small_run, capsys):
    tables = write_set(tmp_path, "train", 3), write_set(tmp_path, "test", 9)
    configs = small_run(*tables, num_epochs=1, verify_data="off")
    train.main(configs)
    assert "Float TIFFs: -0.5 is black and 3 white" in capsys.readouterr().out
    folder = configs.save_model_path
    assert describe_model(Configs(), f"{folder}/best_model.keras").pixel_range == [-0.5, 3]
    with pytest.raises(UserError, match="pixel_range"):
        describe_model(Configs(pixel_range=[0, 9]), f"{folder}/best_model.keras")
    train.main(small_run(*tables, num_epochs=2, load_model_path=folder))
    assert "sets other values" not in capsys.readouterr().out
    options = {"input": str(tmp_path / "test_0.tif"), "write_path": str(tmp_path / "p.csv"), "load_model_path": folder}
    predict.main(PredictConfigs(**options))
    told = capsys.readouterr().out
    assert "sets other values" not in told
    assert "-0.5 to 3" in told


@pytest.mark.parametrize("stored", [{}, {"pixel_range": []}])
def test_a_run_that_has_no_range_takes_one(tmp_path, stored):
    (tmp_path / "configs.json").write_text(json.dumps({"image_target_size": [32, 32, 3]} | stored))
    assert describe_model(Configs(pixel_range=[0, 9]), str(tmp_path / "best_model.keras")).pixel_range == [0, 9]
