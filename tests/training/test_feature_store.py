"""Stored features: computed once, whatever stops in between, and again if an image or the backbone changes."""

import itertools
import os
import shutil
import signal
from pathlib import Path

import keras
import numpy as np
import pytest
from loaded_processes import LoadedProcess
from probed_photos import (
    build,
    make_sequence,
    photos,  # noqa: F401
)

from finetune.core.options import UserError
from finetune.models.backbones import build_preprocessing
from finetune.training import feature_store
from finetune.training.feature_store import FeatureStore, find_features, get_features
from finetune.training.probe import compute_features


@pytest.fixture(scope="module")
def model() -> keras.Model:
    keras.utils.set_random_seed(1)
    return build()


@pytest.fixture(scope="module")
def expected(model, photos):
    return compute_features(model, make_sequence(photos))[0]


@pytest.fixture
def computed(monkeypatch):
    """The images that were computed, a list for each chunk."""
    chunks, select = [], feature_store.select_rows

    def select_rows(sequence, rows):
        chunks.append(rows.tolist())
        return select(sequence, rows)

    monkeypatch.setattr(feature_store, "select_rows", select_rows)
    return chunks


def test_features_are_computed_once(model, photos, expected, tmp_path, computed):
    first, is_read = get_features(model, make_sequence(photos), str(tmp_path))
    np.testing.assert_allclose(first, expected, atol=1e-5)
    assert first.dtype == np.float32
    assert is_read.all()
    assert sorted(itertools.chain(*computed)) == list(range(36))
    computed.clear()
    again, is_read = get_features(model, make_sequence(photos), str(tmp_path))
    np.testing.assert_array_equal(again, first)
    assert is_read.all()
    assert computed == []


def test_order_and_number_of_images_may_differ(model, photos, expected, tmp_path, computed):
    get_features(model, make_sequence((photos[0][:20], photos[1][:20])), str(tmp_path))
    computed.clear()
    backwards = make_sequence((photos[0][::-1], photos[1][::-1]))
    found, _ = get_features(model, backwards, str(tmp_path))
    np.testing.assert_allclose(found, expected[::-1], atol=1e-5)
    assert sorted(itertools.chain(*computed)) == list(range(16))


def test_mirror_images_weights_sizes_and_preprocessing_have_their_own_files(model, tmp_path):
    def path_of(model, mirrored=False):
        return FeatureStore(str(tmp_path), model, mirrored).path

    other_weights = build()
    other_preprocessing = keras.models.clone_model(model)
    other_preprocessing.set_weights(model.get_weights())
    assert path_of(other_preprocessing) == path_of(model)
    inputs = keras.Input((32, 32, 3))
    outputs = model.layers[-1](model.layers[-2](build_preprocessing("torch")(inputs)))
    models = [model, other_weights, keras.Model(inputs, outputs), build(size=40), build(pooling="max")]
    paths = [path_of(one) for one in models]
    assert len({*paths, path_of(model, mirrored=True)}) == 6
    assert "32x32" in path_of(model)
    # The weights of the head do not matter.
    logits = other_preprocessing.get_layer("classifier").get_layer("logits")
    logits.set_weights([weights + 1 for weights in logits.get_weights()])
    assert path_of(other_preprocessing) == path_of(model)


def test_a_changed_image_is_computed_again(model, photos, tmp_path, computed):
    paths = [shutil.copy(path, str(tmp_path / f"{row}.jpg")) for row, path in enumerate(photos[0])]
    before, _ = get_features(model, make_sequence((paths, photos[1])), str(tmp_path))
    computed.clear()
    shutil.copy(photos[0][30], paths[4])
    found, _ = get_features(model, make_sequence((paths, photos[1])), str(tmp_path))
    assert computed == [[4]]
    np.testing.assert_allclose(found[4], before[30], atol=1e-5)
    np.testing.assert_array_equal(np.delete(found, 4, axis=0), np.delete(before, 4, axis=0))


@pytest.mark.parametrize("cut", [1, 30])
def test_an_incomplete_record_is_ignored_and_the_next_ones_are_complete(
    model, photos, expected, tmp_path, computed, cut
):
    path = Path(FeatureStore(str(tmp_path), model, False).path)
    get_features(model, make_sequence((photos[0][:9], photos[1][:9])), str(tmp_path))
    path.write_bytes(path.read_bytes()[:-cut])
    computed.clear()
    found, _ = get_features(model, make_sequence(photos), str(tmp_path))
    # Six channels make a record of 44 bytes.
    assert sorted(itertools.chain(*computed)) == list(range(8, 36))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    computed.clear()
    get_features(model, make_sequence(photos), str(tmp_path))
    assert computed == []


def test_a_damaged_record_is_computed_again(model, photos, expected, tmp_path, computed):
    path = Path(FeatureStore(str(tmp_path), model, False).path)
    get_features(model, make_sequence(photos), str(tmp_path))
    content = bytearray(path.read_bytes())
    content[44 * 7 + 30] ^= 1
    path.write_bytes(content)
    row = [*itertools.chain(*computed)][7]
    computed.clear()
    found, _ = get_features(model, make_sequence(photos), str(tmp_path))
    assert computed == [[row]]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_unreadable_image_is_named_and_retried(model, photos, expected, tmp_path, computed):
    paths = [*photos[0][:5], str(tmp_path / "late.jpg"), *photos[0][6:]]
    with pytest.raises(UserError, match="late.jpg"):
        get_features(model, make_sequence((paths, photos[1])), str(tmp_path))
    sequence = make_sequence((paths, photos[1]), skip_bad_images=True)
    features, is_read = get_features(model, sequence, str(tmp_path))
    assert np.flatnonzero(~is_read).tolist() == [5]
    assert np.isnan(features[5]).all()
    np.testing.assert_allclose(features[is_read], expected[is_read], atol=1e-5)
    assert [*sequence.bad_images] == [5]
    assert "late.jpg" in sequence.bad_images[5]
    shutil.copy(photos[0][5], paths[5])
    computed.clear()
    features, is_read = get_features(model, make_sequence((paths, photos[1])), str(tmp_path))
    assert computed == [[5]]
    assert is_read.all()
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_an_image_without_a_digest_is_computed_each_time(model, photos, expected, tmp_path, computed, monkeypatch):
    digest = feature_store.digest_image
    monkeypatch.setattr(feature_store, "digest_image", lambda path, _: b"" if path == photos[0][3] else digest(path))
    for rows in (range(36), [3]):
        computed.clear()
        found, is_read = get_features(model, make_sequence(photos), str(tmp_path))
        assert sorted(itertools.chain(*computed)) == [*rows]
        assert is_read.all()
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_folder_that_cannot_be_written_is_named(model, photos, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"below.*image_cache_path"):
        get_features(model, make_sequence(photos), str(tmp_path / "file" / "below"))


@pytest.mark.parametrize(
    ("number", "batch_size", "sizes"),
    [
        (0, 16, []),
        (5, 16, [5]),
        (40, 16, [24, 16]),
        # Only whole batches follow the first chunk.
        (600, 16, [24, 256, 256, 64]),
        (600, 24, [24, 240, 240, 96]),
        (1100, 500, [600, 500]),
    ],
)
def test_the_first_chunk_has_every_size_of_batch(number, batch_size, sizes):
    chunks = feature_store._split_rows(np.arange(number), batch_size)
    assert [len(chunk) for chunk in chunks] == sizes
    assert np.concatenate([*chunks, []]).tolist() == list(range(number))


def test_finding_uses_the_store_or_computes_without_a_trace(model, photos, expected, tmp_path, monkeypatch):
    found, is_read = find_features(model, make_sequence(photos), str(tmp_path / "store"))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert is_read.all()
    assert not (tmp_path / "store").exists()
    for mirrored in (False, True):
        stored, _ = get_features(model, make_sequence(photos), str(tmp_path / "store"), mirrored)
        with monkeypatch.context() as patch:
            patch.setattr(feature_store, "compute_features", None)
            found, is_read = find_features(model, make_sequence(photos), str(tmp_path / "store"), mirrored)
        np.testing.assert_array_equal(found, stored)
        assert is_read.all()


def compute_in_chunks(paths, folder, dies):
    """Computes features in chunks of 8, and prints the number of chunks and the sum; dies after the third chunk."""
    keras.utils.set_random_seed(1)
    model, add, chunks = build(), FeatureStore.add, []
    feature_store.CHUNK = 8

    def add_and_die(self, *facts):
        chunks.append(add(self, *facts))
        if len(chunks) == 3 and dies:
            os.kill(os.getpid(), signal.SIGKILL)

    FeatureStore.add = add_and_die
    features, _ = get_features(model, make_sequence((paths, np.zeros(36, int))), folder)
    print(len(chunks), float(features.sum()))


@pytest.mark.slow
def test_a_killed_process_leaves_the_features_that_it_has_written(photos, tmp_path):
    def run(folder, dies):
        process = LoadedProcess(tmp_path / "process", compute_in_chunks, photos[0], str(folder), dies)
        output, errors = process.communicate()
        assert process.returncode == (-signal.SIGKILL if dies else 0), errors
        return [float(word) for word in output.splitlines()[-1].split()] if output else None

    assert run(tmp_path / "killed", True) is None
    # Of 12, 8, 8 and 8 images the last 8 were left, in one chunk.
    (chunks, total), (all_chunks, expected) = run(tmp_path / "killed", False), run(tmp_path / "whole", False)
    assert (chunks, all_chunks) == (1, 4)
    assert total == pytest.approx(expected, rel=1e-5)
