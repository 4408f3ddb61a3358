"""The model that a run keeps: its start, an average, or its last epoch."""

import json
import re
import shutil

import keras
import numpy as np
import pandas as pd
import pytest
from small_runs import assert_same_run, options_of, start, stop_at, tables  # noqa: F401

from finetune.core.options import UserError
from finetune.evaluation.intervals import get_log_losses
from finetune.models.model_files import strip_views
from finetune.training.checkpoints import SHARES, choose_weights, mix_weights
from finetune.training.resuming import read_state
from generator import AugmentedImageSequence

OPTIONS = {"head_initialization": "linear_probe", "model_selection": "interpolate", "num_epochs": 2}
# Two features and two classes; the second class is true if their sum is positive, except for one image of ten.
FEATURES = np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32)
TRUTH = (FEATURES.sum(axis=1) > 0).astype(int)
TRUTH[::10] = 1 - TRUTH[::10]


class Validated:
    """Measures a model on the features, as `Validation` does on images."""

    aurocs = groups = None

    def __init__(self, model):
        self.model = model
        self.on_epoch_end(0, {})

    def on_epoch_end(self, epoch, logs):
        self.probabilities = self.model(FEATURES).numpy()
        logs["val_accuracy"] = float((self.probabilities.argmax(axis=1) == TRUTH).mean())

    def get_losses(self):
        return get_log_losses(TRUTH, self.probabilities)

    def get_groups(self):
        return self.groups


def build_line(direction):
    """Builds a model whose probability of the second class grows in a direction of the features."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, "softmax", use_bias=False)])
    model.set_weights([np.array([-np.array(direction), direction]).T])
    return model


def choose_between(first, last):
    model = build_line(last)
    kept = choose_weights(model, build_line(first).get_weights(), Validated(model), {"val_accuracy": 0.9})
    np.testing.assert_array_equal(model.get_weights()[0], build_line(last).get_weights()[0])
    return kept


def test_weights_are_mixed_by_their_share():
    first, last = [np.array([0.0, 4.0]), np.array(1.0)], [np.array([2.0, 0.0]), np.array(2.0)]
    mixed = mix_weights(first, last, 0.25)
    np.testing.assert_allclose(mixed[0], [0.5, 3.0])
    np.testing.assert_allclose(mixed[1], 1.25)


@pytest.mark.parametrize(
    ("first", "last", "share"),
    [
        ([2.0, 0.0], [0.0, 2.0], 0.5),
        ([1.0, -0.5], [1.0, 1.0], 1),
        ([1.0, 1.0], [-1.0, -3.0], 0),
        # The same predictions, but more confident: not clearly better.
        ([1.0, 1.0], [2.0, 2.0], 0),
    ],
)
def test_the_model_of_the_lowest_loss_is_kept(capsys, first, last, share):
    kept = choose_between(first, last)
    assert (kept.share, kept.is_refitted, kept.logs) == (share, False, {"val_accuracy": pytest.approx(0.9)})
    np.testing.assert_allclose(kept.weights[0], [[-1, 1], [-1, 1]])
    assert {0: "Kept the start", 0.5: "50%", 1: "Kept"}[share] in capsys.readouterr().out


def test_of_averages_that_are_not_significantly_different_the_one_nearest_to_the_start_is_kept(capsys):
    model = build_line([1.0, 1.0])
    validation = Validated(model)
    # The last epoch, measured first, is better by 0.002 than the averages, standard error 0.2 / sqrt(199): too little.
    last = 0.998 + np.tile([0.2, -0.2], 100)
    seen = iter([last, *(np.full(200, loss) for loss in (1.1, 1.0, 1.0))])
    validation.get_losses = lambda: next(seen)
    kept = choose_weights(model, build_line([2.0, 0.0]).get_weights(), validation, {})
    assert kept.share == 0.25
    printed = capsys.readouterr().out
    for value in ("25%", "0.0020", "0.0142"):
        assert value in printed


def test_the_head_of_an_average_is_interpolated_towards_the_refitted_one(capsys):
    model, first = build_line([0.0, 2.0]), build_line([2.0, 0.0]).get_weights()
    seen = []

    def refit():
        seen.append(model.get_weights()[0][:, 1].tolist())
        model.set_weights([np.array([[-1.0, 1.0], [-1.0, 1.0]]) * (len(seen) == 2)])

    kept = choose_weights(model, first, Validated(model), {"val_accuracy": 0.9}, refit)
    assert seen == [[1.5, 0.5], [1.0, 1.0], [0.0, 2.0]]
    assert (kept.share, kept.is_refitted, kept.logs) == (0.5, True, {"val_accuracy": pytest.approx(0.9)})
    np.testing.assert_array_equal(kept.weights[0], [[-1, 1], [-1, 1]])
    np.testing.assert_array_equal(model.get_weights()[0], build_line([0.0, 2.0]).get_weights()[0])
    printed = capsys.readouterr().out
    # The refitted heads at 25 and 100 % are zero. The first counts a quarter, the last fully: it gives each class 1/2.
    quarter = get_log_losses(TRUTH, build_line([0.75 * 1.5, 0.75 * 0.5])(FEATURES).numpy()).mean()
    assert re.search(rf"refitted head \(100%\): 0% 0\.\d+; 25% {quarter:.4f}; 50% 0\.\d+; 100% 0\.6931\.", printed)


def test_the_start_keeps_its_head_and_is_kept_if_the_others_are_no_better():
    model, first = build_line([0.0, 2.0]), build_line([1.0, 1.0]).get_weights()
    kept = choose_weights(model, first, Validated(model), {}, lambda: model.set_weights([np.zeros((2, 2))]))
    assert (kept.share, kept.is_refitted) == (0, False)
    np.testing.assert_array_equal(kept.weights[0], first[0])


def test_an_image_that_becomes_unreadable_is_left_out(capsys):
    model = build_line([0.0, 2.0])
    validation = Validated(model)
    measure, passes = validation.get_losses, iter(range(5))

    def lose_one_after_the_first_pass():
        losses = measure()
        losses[: next(passes) > 0] = np.nan
        return losses

    validation.get_losses = lose_one_after_the_first_pass
    kept = choose_weights(model, build_line([2.0, 0.0]).get_weights(), validation, {"val_accuracy": 0.9})
    assert kept.share == 0.5
    assert "199 validation images" in capsys.readouterr().out


def test_there_must_be_a_start_worth_keeping(tables, tmp_path):
    with pytest.raises(UserError, match="model_selection interpolate: expected head_initialization"):
        start(**options_of(tables, tmp_path / "run", model_selection="interpolate"))
    assert not (tmp_path / "run").exists()


def load(folder, name):
    return strip_views(keras.models.load_model(folder / f"{name}_model.keras"))


@pytest.mark.slow
@pytest.mark.parametrize(("share", "is_refitted"), [(0.0, False), (0.5, True)])
def test_the_run_keeps_what_was_chosen(share, is_refitted, tables, tmp_path, monkeypatch, capsys):
    first, choose = [], choose_weights

    def choose_that(model, weights, validation, logs, refit):
        first.extend(weights)
        # All models but the one to keep get higher losses. The last epoch with its own head is measured first.
        added = iter([50.0, *(50.0 * (one != share) for one in (*SHARES, 1.0))])
        measure = validation.get_losses
        monkeypatch.setattr(validation, "get_losses", lambda: measure() + next(added))
        return choose(model, weights, validation, logs, refit)

    monkeypatch.setattr("finetune.training.checkpoints.choose_weights", choose_that)
    found = start(**options_of(tables, tmp_path / "run", **OPTIONS))
    assert "Warning: the linear probe" in capsys.readouterr().out
    best, latest = load(tmp_path / "run", "best").get_weights(), load(tmp_path / "run", "latest").get_weights()
    head = 2 * is_refitted
    for one, start_weight, end in list(zip(best, first, latest, strict=True))[: len(best) - head]:
        np.testing.assert_allclose(one, (1 - share) * start_weight + share * end, rtol=1e-6, atol=1e-7)
    statistics = json.loads((tmp_path / "run" / ".training_stats.json").read_text())
    assert (statistics["kept_share"], statistics["has_refitted_head"]) == (share, is_refitted)
    assert found["best_epoch"] == (2 if share else 0)
    card = (tmp_path / "run" / "MODEL_CARD.md").read_text()
    assert ("refitted" in card) == is_refitted
    if is_refitted:
        model = keras.models.load_model(tmp_path / "run" / "best_model.keras")
        # The refitted head, solved from the interpolation.
        fitted = [
            (kept - (1 - share) * ((1 - share) * one + share * end)) / share
            for kept, one, end in zip(best[-head:], first[-head:], latest[-head:], strict=True)
        ]
        strip_views(model).set_weights([*best[:-head], *fitted])
        # On average, a regression with free intercepts predicts the frequencies of the classes.
        table = pd.read_csv(tables[0])
        labels = table["class"].astype("category").cat.codes.to_numpy()
        sequence = AugmentedImageSequence(table["path"].to_numpy(), labels, image_size=(32, 32), batch_size=27)
        images = sequence[0][0]
        found = strip_views(model).predict(np.concatenate([images, images[:, :, ::-1]]))
        np.testing.assert_allclose(found.mean(axis=0), np.bincount(labels) / len(labels), atol=1e-4)


@pytest.mark.slow
def test_a_stopped_run_chooses_the_same(tables, tmp_path, stop_at):
    start(**options_of(tables, tmp_path / "run", **OPTIONS))
    state = read_state(str(tmp_path / "run" / "latest_model.keras"))
    assert state["kept_share"] in (*SHARES, 1)
    assert state["has_refitted_head"] == (state["kept_share"] > 0)
    options = options_of(tables, tmp_path / "stopped", **OPTIONS)
    for epoch in (0, 1):
        assert stop_at(epoch, 3, **options) == 143
        options |= {"load_model_path": str(tmp_path / "stopped")}
    # A run that is killed before the last checkpoint has already written its choice.
    # The best model so far may be one file with the start, which must stay as it is.
    (tmp_path / "stopped" / "best_model.keras").unlink()
    shutil.copy(tmp_path / "run" / "best_model.keras", tmp_path / "stopped")
    start(**options)
    stopped = read_state(str(tmp_path / "stopped" / "latest_model.keras"))
    assert all(stopped[name] == state[name] for name in ("kept_share", "has_refitted_head"))
    assert_same_run(tmp_path / "run", tmp_path / "stopped", ["latest_model.keras"])
    for one, other in zip(*(load(tmp_path / name, "best").get_weights() for name in ("run", "stopped")), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_continued_run_chooses_again(tables, tmp_path):
    start(**options_of(tables, tmp_path / "run", **OPTIONS | {"num_epochs": 1}))
    found = start(**options_of(tables, tmp_path / "run", load_model_path=str(tmp_path / "run"), **OPTIONS))
    assert found["epoch"] == 2
    assert found["best_epoch"] in (0, 2)
    # Without the start's weights it cannot choose, and stops before it changes anything.
    (tmp_path / "run" / "start_model.keras").unlink()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    options = OPTIONS | {"load_model_path": str(tmp_path / "run"), "num_epochs": 3}
    with pytest.raises(UserError, match="start_model.keras"):
        start(**options_of(tables, tmp_path / "run", **options))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
