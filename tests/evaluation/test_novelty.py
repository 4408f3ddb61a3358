"""The reference of training features, and how familiar an image looks."""

import zipfile

import numpy as np
import pytest
from scipy import special

from finetune.core.options import UserError
from finetune.evaluation import novelty
from finetune.evaluation.novelty import Reference, find_reference, get_certainty, name_model_digest, to_unit_length


def make_reference(photos=6, channels=4, seed=0):
    features = to_unit_length(np.random.default_rng(seed).normal(size=(photos, channels)))
    return Reference(features, [f"{row}.jpg" for row in range(photos)], ["cat"] * photos, "digest")


def test_neighbours_are_those_of_all_pairs_in_blocks_too(monkeypatch):
    reference, images = make_reference(30), to_unit_length(np.random.default_rng(1).normal(size=(11, 4)))
    cosines = images.astype(float) @ reference.features.astype(float).T
    expected = np.argsort(-cosines, axis=1)[:, :3]
    for block in (2**24, 60):
        monkeypatch.setattr(novelty, "BLOCK", block)
        found = reference.find_neighbours(images, 3)
        np.testing.assert_array_equal(found.positions, expected)
        np.testing.assert_allclose(found.similarities, np.take_along_axis(cosines, expected, 1), atol=1e-6)
    assert make_reference(2).find_neighbours(images, 5).positions.shape == (11, 2)
    assert reference.find_neighbours(images[:0], 3).similarities.shape == (0, 3)


def test_features_get_length_1_and_zeros_stay():
    found = to_unit_length(np.array([[3.0, 4.0], [0.0, 0.0], [1e5, 0.0]]))
    np.testing.assert_allclose(found, [[0.6, 0.8], [0, 0], [1, 0]], atol=1e-3)
    assert found.dtype == np.float16


def test_a_reference_is_random_photos_within_the_limit(monkeypatch):
    monkeypatch.setattr(novelty, "LARGEST_REFERENCE", 80)
    features = to_unit_length(np.random.default_rng(0).normal(size=(50, 4)))
    names = [str(row) for row in range(50)]
    chosen = Reference.choose(features, names, names, "digest", seed=1)
    assert chosen.features.nbytes == 80
    rows = [*map(int, chosen.paths)]
    assert rows == sorted(set(rows))
    np.testing.assert_array_equal(chosen.features, features[rows])
    assert chosen.labels == chosen.paths
    assert Reference.choose(features, names, names, "digest", seed=2).paths != chosen.paths


def test_a_stored_reference_is_the_same_and_belongs_to_its_model(tmp_path, capsys):
    model = tmp_path / "best_model.keras"
    model.write_bytes(b"model")
    reference = make_reference()._replace(model=name_model_digest(str(model)), labels=["a$b", "", "ü"] * 2)
    reference.write(str(tmp_path))
    found = find_reference(str(tmp_path / "other"), str(model), needed=True)
    np.testing.assert_array_equal(found.features, reference.features)
    assert found[1:] == reference[1:]
    assert found.digest() == reference.digest() != make_reference(seed=1).digest()
    assert capsys.readouterr().out == ""
    model.write_bytes(b"another")
    assert find_reference(str(tmp_path), str(model), needed=False) is None
    assert "another model" in capsys.readouterr().out


@pytest.mark.parametrize("needed", [False, True])
def test_without_a_reference_a_rule_that_needs_it_is_told(needed, tmp_path, capsys):
    assert find_reference(str(tmp_path), str(tmp_path / "best_model.keras"), needed) is None
    assert ("no photo is called unknown" in capsys.readouterr().out) == needed


@pytest.mark.parametrize("damage", ["cut", "text", "pickle", "lengths", "infinite", "huge"])
def test_a_damaged_reference_is_a_users_mistake(damage, tmp_path):
    path = tmp_path / "reference.npz"
    reference = make_reference()
    if damage == "lengths":
        reference = reference._replace(paths=reference.paths[1:])
    if damage == "infinite":
        reference = reference._replace(features=np.full((6, 4), np.inf, np.float16))
    reference.write(str(tmp_path))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    if damage == "text":
        path.write_text("not a reference")
    if damage == "pickle":
        np.savez(path, **(reference._asdict() | {"paths": np.array([object()] * 6)}))
    if damage == "huge":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("features.npy", bytes(novelty.LARGEST_FILE + 1))
    with pytest.raises(UserError, match=r"reference\.npz is damaged"):
        Reference.read(str(path))


def test_certainty_is_the_logit_of_the_highest_probability():
    logits = np.array([[2.0, 1.0, -1.0], [30.0, 0.0, 0.0]])
    expected = logits[:, 0] - np.log(np.exp(logits[:, 1:]).sum(axis=1))
    softmax = special.softmax(logits, axis=1)
    np.testing.assert_allclose(get_certainty(softmax, False), expected)
    # In float32, 1 less the second image's probability is 0.
    np.testing.assert_allclose(get_certainty(softmax.astype(np.float32), False), expected, rtol=1e-5)
    np.testing.assert_allclose(get_certainty(special.expit(logits), True), logits[:, 0], rtol=0.6)
    np.testing.assert_allclose(get_certainty(special.expit(logits[:1]), True), [2.0])
    assert np.isfinite(get_certainty(np.array([[1.0, 0.0], [0.0, 0.0]], np.float32), False)).all()
