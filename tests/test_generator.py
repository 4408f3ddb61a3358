import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import cv2
import keras
import numpy as np
import pytest
from PIL import Image, ImageOps

from augmenter import build_augmenter
from callbacks import EpochOrder
from configs import UserError
from generator import AugmentedImageSequence, read_image, resize_image
from utils import naming_bad_images, predict

SIZE = (12, 16)


@pytest.fixture
def pictures(tmp_path):
    generator = np.random.default_rng(2)
    images = generator.integers(0, 256, (10, *SIZE, 3), np.uint8)
    paths = [str(tmp_path / f"{position}.png") for position in range(10)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths, images


def sequence_of(paths, labels=None, **options):
    labels = np.arange(len(paths)) if labels is None else labels
    return AugmentedImageSequence(paths, labels, **{"image_size": SIZE, "batch_size": 4} | options)


def one_epoch(sequence):
    images, labels = zip(*(sequence[index] for index in range(len(sequence))), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def test_batches_are_uint8_rgb_in_the_order_of_the_csv(pictures):
    paths, images = pictures
    batches, labels = one_epoch(sequence_of(paths))
    assert batches.dtype == np.uint8
    np.testing.assert_array_equal(batches, images)
    np.testing.assert_array_equal(labels, np.arange(10))


@pytest.mark.parametrize(("batch_size", "sizes"), [(4, [4, 4, 2]), (5, [5, 5]), (10, [10]), (16, [10]), (1, [1] * 10)])
def test_the_last_batch_may_be_short(pictures, batch_size, sizes):
    sequence = sequence_of(pictures[0], batch_size=batch_size)
    assert sequence.steps == len(sequence) == len(sizes)
    assert [sequence[index][0].shape for index in range(len(sizes))] == [(size, *SIZE, 3) for size in sizes]


def test_images_are_resized_to_height_by_width(pictures):
    images, _ = sequence_of(pictures[0], image_size=(8, 5))[0]
    assert images.shape == (4, 8, 5, 3)


def test_shuffling_keeps_images_with_their_labels_and_loses_none(pictures):
    paths, images = pictures
    batches, labels = one_epoch(sequence_of(paths, shuffle=True))
    assert sorted(labels) == list(range(10))
    assert labels.tolist() != list(range(10))
    np.testing.assert_array_equal(batches, images[labels])


def test_the_order_changes_with_epoch_and_seed_and_repeats_for_the_same(pictures):
    def order(seed, epoch):
        sequence = sequence_of(pictures[0], shuffle=True, seed=seed)
        sequence.epoch = epoch
        return tuple(one_epoch(sequence)[1])

    orders = {key: order(*key) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    assert len(set(orders.values())) == 4
    assert order(0, 1) == orders[0, 1]


def test_going_back_to_an_epoch_gives_its_order_again(pictures):
    sequence = sequence_of(pictures[0], shuffle=True)
    first = one_epoch(sequence)[1]
    sequence.epoch = 1
    one_epoch(sequence)
    sequence.epoch = 0
    np.testing.assert_array_equal(one_epoch(sequence)[1], first)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("labels", [np.arange(10), np.eye(10, 3, dtype=np.float32)], ids=["single", "multi"])
def test_y_true_is_what_the_batches_bring(pictures, labels, epoch, shuffle):
    sequence = sequence_of(pictures[0], labels, shuffle=shuffle, seed=5)
    sequence.epoch = epoch
    np.testing.assert_array_equal(sequence.get_y_true(), one_epoch(sequence)[1])


@pytest.mark.parametrize(
    ("labels", "counts"),
    [
        (np.array([2, 0, 2, 2], np.int32), [1, 0, 3]),
        (np.array([[1, 0], [1, 0], [0, 0], [1, 0]], np.float32), [3, 0]),
    ],
    ids=["single", "multi"],
)
def test_class_counts(labels, counts):
    found = sequence_of(["unread.png"] * 4, labels, shuffle=True).get_class_counts()
    assert found.tolist() == counts
    assert np.issubdtype(found.dtype, np.integer)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    quadrants = np.zeros((32, 48, 3), np.uint8)
    quadrants[:16, :24], quadrants[:16, 24:], quadrants[16:, :24] = (200, 30, 30), (30, 200, 30), (30, 30, 200)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = str(tmp_path / "photo.jpg")
    Image.fromarray(quadrants).save(path, exif=exif, quality=95, subsampling=0)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    image = read_image(path)
    assert image.shape == ((48, 32, 3) if orientation > 4 else (32, 48, 3))
    assert np.abs(image.astype(int) - upright).mean() < 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_png_of_any_mode_is_read_as_8_bit_rgb(tmp_path, mode):
    colours = np.random.default_rng(3).integers(0, 256, (*SIZE, 3), np.uint8)
    picture = Image.fromarray(colours).convert(mode)
    if mode in ("LA", "RGBA"):
        picture.putalpha(Image.fromarray(colours[..., 0]))
    path = str(tmp_path / "picture.png")
    picture.save(path)
    image = read_image(path)
    assert image.dtype == np.uint8
    expected = picture.convert("RGBA").convert("RGB") if mode in ("LA", "RGBA") else picture.convert("RGB")
    np.testing.assert_array_equal(image, np.asarray(expected))


def test_palette_png_with_a_transparent_colour_keeps_its_colours(tmp_path):
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    picture.putpalette([250, 10, 20, 30, 240, 40, 50, 60, 230])
    path = str(tmp_path / "palette.png")
    picture.save(path, transparency=1)
    assert read_image(path).tolist() == [[[250, 10, 20], [30, 240, 40], [50, 60, 230]]]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_png_is_reduced_to_8_bits(tmp_path, channels):
    eight = np.random.default_rng(4).integers(0, 256, (*SIZE, channels), np.uint8)
    path = str(tmp_path / "deep.png")
    cv2.imwrite(path, eight.astype(np.uint16) * 257)
    expected = np.repeat(eight, 3, axis=2) if channels == 1 else eight[..., 2::-1]
    np.testing.assert_array_equal(read_image(path), expected)


@pytest.mark.parametrize("name", ["žltý kvet/ďatelina č. 1.png", "花.png", "with space.png", "UPPER.PNG"])
def test_any_path_is_read(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (5, 3), (1, 2, 3)).save(path)
    assert read_image(str(path)).tolist() == [[[1, 2, 3]] * 5] * 3


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


UNREADABLE = {
    "missing": None,
    "empty": b"",
    "text": b"this is no image",
    "header only": png_header(12, 16),
    "oversized": png_header(2**17, 2**17),
}


@pytest.fixture(params=UNREADABLE, ids=lambda kind: kind.replace(" ", "_"))
def unreadable(request, tmp_path):
    path = tmp_path / "bad image.png"
    if UNREADABLE[request.param] is not None:
        path.write_bytes(UNREADABLE[request.param])
    return str(path)


def test_an_unreadable_image_is_named(unreadable):
    with pytest.raises(UserError) as caught:
        read_image(unreadable)
    assert unreadable in str(caught.value)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
def test_half_an_image_is_refused(tmp_path, suffix):
    path = tmp_path / f"half.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"half.{suffix}"):
        read_image(str(path))


def test_a_folder_in_place_of_an_image_is_named(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        read_image(str(tmp_path))


def test_the_sequence_keeps_its_error(pictures, unreadable):
    sequence = sequence_of([*pictures[0], unreadable])
    sequence[0]
    assert sequence.error is None
    with pytest.raises(UserError) as caught:
        sequence[2]
    assert sequence.error is caught.value


def flat_model(record: list | None = None) -> keras.Model:
    class Recorder(keras.Model):
        def train_step(self, data):
            record.append(tuple(part.numpy() for part in data))
            return {"loss": 0.0}

    inputs = keras.Input((*SIZE, 3))
    outputs = keras.layers.Dense(2, kernel_initializer="ones")(keras.layers.Flatten()(inputs))
    model = keras.Model(inputs, outputs) if record is None else Recorder(inputs, outputs)
    model.compile(loss="mse", run_eagerly=True)
    return model


@pytest.mark.parametrize("workers", [1, 3])
def test_predict_names_an_unreadable_image_whatever_the_workers(pictures, tmp_path, workers):
    bad = tmp_path / "damaged.jpg"
    bad.write_bytes(b"\xff\xd8\xff\xe0 damaged")
    paths = [*pictures[0], str(bad), *pictures[0]]
    with pytest.raises(UserError, match="damaged.jpg"):
        predict(flat_model(), sequence_of(paths, workers=workers, batch_size=2))


@pytest.mark.parametrize("workers", [1, 3])
def test_fit_names_an_unreadable_image_whatever_the_workers(pictures, tmp_path, workers):
    sequence = sequence_of([*pictures[0], str(tmp_path / "lost.png")], workers=workers, batch_size=2)
    with pytest.raises(UserError, match=r"lost\.png"), naming_bad_images(sequence):
        flat_model().fit(sequence, verbose=0)


def test_an_error_of_another_kind_passes_naming_bad_images(pictures):
    with pytest.raises(ZeroDivisionError), naming_bad_images(sequence_of(pictures[0])):
        _ = 1 / 0


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_predictions_come_in_the_order_of_the_csv_whatever_the_workers(pictures, workers):
    paths, images = pictures
    predictions = predict(flat_model(), sequence_of(paths, workers=workers, batch_size=3))
    np.testing.assert_allclose(predictions[:, 0], images.sum(axis=(1, 2, 3)), rtol=1e-5)


def augmented_sequence(paths, seed=7, **options):
    return sequence_of(paths, augmenter=build_augmenter(), shuffle=True, seed=seed, batch_size=2, **options)


def test_augmentation_changes_with_seed_epoch_and_index(pictures):
    same = [pictures[0][0]] * 4
    first, second = augmented_sequence(same), augmented_sequence(same)
    second.epoch = 1
    batches = [first[0][0], first[1][0], second[0][0], augmented_sequence(same, seed=8)[0][0]]
    assert len({batch.tobytes() for batch in batches}) == 4
    assert len({image.tobytes() for image in first[0][0]}) == 2


def test_augmented_batches_do_not_depend_on_threads_or_access_order(pictures):
    sequential = augmented_sequence(pictures[0])
    expected = {}
    for sequential.epoch in range(3):
        expected |= {(sequential.epoch, index): sequential[index] for index in range(len(sequential))}
    for number_of_threads in (1, 3):
        sequence = augmented_sequence(pictures[0], workers=number_of_threads)
        for epoch in (2, 0, 1, 0):
            sequence.epoch = epoch
            indices = np.random.default_rng(epoch).permutation(np.tile(np.arange(len(sequence)), 4)).tolist()
            with ThreadPoolExecutor(number_of_threads) as pool:
                for index, batch in zip(indices, pool.map(sequence.__getitem__, indices), strict=True):
                    np.testing.assert_array_equal(batch[0], expected[epoch, index][0])
                    np.testing.assert_array_equal(batch[1], expected[epoch, index][1])


@pytest.mark.parametrize("workers", [1, 3])
def test_fit_receives_the_same_batches_whatever_the_workers(pictures, workers):
    received = []
    sequence = augmented_sequence(pictures[0], workers=workers)
    flat_model(received).fit(sequence, epochs=3, shuffle=False, verbose=0, callbacks=[EpochOrder(sequence)])
    expected = []
    direct = augmented_sequence(pictures[0])
    for direct.epoch in range(3):
        expected += [direct[index] for index in range(len(direct))]
    assert len(received) == len(expected)
    for (images, labels), (expected_images, expected_labels) in zip(received, expected, strict=True):
        np.testing.assert_array_equal(labels, expected_labels)
        np.testing.assert_array_equal(images, expected_images)


def test_the_given_augmenter_is_not_reseeded(pictures):
    augmenter = build_augmenter()
    augmenter.seed_(1)
    untouched = build_augmenter()
    untouched.seed_(1)
    sequence_of(pictures[0], augmenter=augmenter)[0]
    np.testing.assert_array_equal(augmenter(images=pictures[1]), untouched(images=pictures[1]))


@pytest.mark.parametrize("size", [(5, 7), (40, 9), (9, 40), (33, 50), (12, 16)])
def test_resizing_gives_height_by_width_uint8(size):
    resized = resize_image(np.zeros((*SIZE, 3), np.uint8), size)
    assert resized.shape == (*size, 3)
    assert resized.dtype == np.uint8


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


def test_an_image_of_the_right_size_stays_as_it_is():
    image = np.random.default_rng(6).integers(0, 256, (5, 7, 3), np.uint8)
    np.testing.assert_array_equal(resize_image(image, (5, 7)), image)


@pytest.mark.parametrize("size", [(3, 3), (12, 30), (31, 8), (50, 50)])
def test_resizing_keeps_a_plain_colour(size):
    plain = np.full((*SIZE, 3), (10, 120, 250), np.uint8)
    assert np.unique(resize_image(plain, size).reshape(-1, 3), axis=0).tolist() == [[10, 120, 250]]
