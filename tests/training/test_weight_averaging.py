"""The model that is kept between a run's start and its last epoch."""

import json
import re
import shutil

import keras
import numpy as np
import pandas as pd
import pytest
from small_runs import assert_same_run, options_of, start, stop_at, tables  # noqa: F401

from finetune.core.options import UserError
from finetune.evaluation.paired_comparison import get_log_losses
from finetune.models.model_files import strip_views
from finetune.training.training_state import read_state
from finetune.training.weight_averaging import SHARES, choose_weights, mix_weights
from generator import AugmentedImageSequence

OPTIONS = {"head_initialization": "linear_probe", "model_selection": "interpolate", "num_epochs": 2}
# Two features, two classes; the second one is the truth where their sum is positive, but for one image of ten.
FEATURES = np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32)
TRUTH = (FEATURES.sum(axis=1) > 0).astype(int)
TRUTH[::10] = 1 - TRUTH[::10]


class Validated:
    """Measures a model on the features, as the callback does on images."""

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
    """Builds a model that finds the second class the more probable, the further features lie in a direction."""
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


def test_the_average_of_the_lowest_loss_is_kept(capsys):
    kept = choose_between([2.0, 0.0], [0.0, 2.0])
    assert kept.share == 0.5
    np.testing.assert_allclose(kept.weights[0], [[-1, 1], [-1, 1]])
    assert kept.logs == {"val_accuracy": pytest.approx(0.9)}
    assert "Kept the weights 50% of the way to the fine-tuned model's" in capsys.readouterr().out


def test_the_last_epoch_is_kept_where_no_average_is_better():
    kept = choose_between([1.0, -0.5], [1.0, 1.0])
    assert (kept.share, kept.logs) == (1, {"val_accuracy": 0.9})


def test_the_start_is_kept_where_nothing_is_clearly_better(capsys):
    kept = choose_between([1.0, 1.0], [-1.0, -3.0])
    assert (kept.share, kept.logs) == (0, {"val_accuracy": pytest.approx(0.9)})
    np.testing.assert_array_equal(kept.weights[0], [[-1, 1], [-1, 1]])
    assert "Kept the start:" in capsys.readouterr().out
    # The same answers, twice as sure of themselves.
    assert choose_between([1.0, 1.0], [2.0, 2.0]).share == 0
    assert "Kept the start, the simpler model" in capsys.readouterr().out


def test_of_averages_that_the_images_do_not_tell_apart_the_one_nearest_to_the_start_is_kept(capsys):
    model = build_line([1.0, 1.0])
    validation = Validated(model)
    # The last epoch, measured first, is better by 0.002 than the averages, standard error 0.2 / sqrt(199): too little.
    last = 0.998 + np.tile([0.2, -0.2], 100)
    seen = iter([last, *(np.full(200, loss) for loss in (1.1, 1.0, 1.0))])
    validation.get_losses = lambda: next(seen)
    kept = choose_weights(model, build_line([2.0, 0.0]).get_weights(), validation, {})
    assert kept.share == 0.25
    printed = capsys.readouterr().out
    assert (
        "Kept the weights 25% of the way to the fine-tuned model's: the log loss is lower than the start's" in printed
    )
    assert (
        "the fine-tuned model, which would not be clearly better (log loss lower by 0.0020, standard error 0.0142)."
        in printed
    )


def test_the_head_of_an_average_is_its_share_of_the_way_to_the_refitted_one(capsys):
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
    what = "Kept the weights 50% of the way to the fine-tuned model's, with a head 50% of the way to the refitted one: "
    assert what in printed
    # The heads that are fitted at 25 and 100 % tell nothing. Of the first a quarter counts, of the last all: a half is
    # the probability of each class.
    quarter = get_log_losses(TRUTH, build_line([0.75 * 1.5, 0.75 * 0.5])(FEATURES).numpy()).mean()
    assert re.search(rf"refitted head \(100%\): 0% 0\.\d+; 25% {quarter:.4f}; 50% 0\.\d+; 100% 0\.6931\.", printed)


def test_the_start_keeps_its_head_and_is_kept_with_it_where_the_others_are_no_better():
    model, first = build_line([0.0, 2.0]), build_line([1.0, 1.0]).get_weights()
    kept = choose_weights(model, first, Validated(model), {}, lambda: model.set_weights([np.zeros((2, 2))]))
    assert (kept.share, kept.is_refitted) == (0, False)
    np.testing.assert_array_equal(kept.weights[0], first[0])


def test_an_image_that_has_become_unreadable_is_left_out(capsys):
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
    assert "on 199 validation images" in capsys.readouterr().out


def test_there_must_be_a_start_worth_keeping(tables, tmp_path):
    with pytest.raises(UserError, match="model_selection interpolate: expected a start that is worth keeping"):
        start(**options_of(tables, tmp_path / "run", model_selection="interpolate"))
    assert not (tmp_path / "run").exists()


def load(folder, name):
    return strip_views(keras.models.load_model(folder / f"{name}_model.keras"))


@pytest.mark.slow
@pytest.mark.parametrize(("share", "is_refitted"), [(0.0, False), (0.5, True), (1.0, True)])
def test_the_run_keeps_what_was_chosen(share, is_refitted, tables, tmp_path, monkeypatch, capsys):
    first, choose = [], choose_weights

    def choose_that(model, weights, validation, logs, refit):
        first.extend(weights)
        # What is to be kept has lower losses than it has. The last epoch with its own head is measured first.
        added = iter([50.0, *(50.0 * (one != share) for one in (*SHARES, 1.0))])
        measure = validation.get_losses
        monkeypatch.setattr(validation, "get_losses", lambda: measure() + next(added))
        return choose(model, weights, validation, logs, refit)

    monkeypatch.setattr("finetune.training.model_selection.choose_weights", choose_that)
    found = start(**options_of(tables, tmp_path / "run", **OPTIONS))
    assert "Warning: the linear probe is fitted to a backbone of random weights" in capsys.readouterr().out
    best, latest = load(tmp_path / "run", "best").get_weights(), load(tmp_path / "run", "latest").get_weights()
    head = 2 * is_refitted
    for one, start_weight, end in list(zip(best, first, latest, strict=True))[: len(best) - head]:
        np.testing.assert_allclose(one, (1 - share) * start_weight + share * end, rtol=1e-6, atol=1e-7)
    statistics = json.loads((tmp_path / "run" / ".training_stats.json").read_text())
    assert (statistics["kept_share"], statistics["has_refitted_head"]) == (share, is_refitted)
    assert found["best_epoch"] == (2 if share else 0)
    card = (tmp_path / "run" / "MODEL_CARD.md").read_text()
    assert (", with a refitted head" in card) == (share == 1)
    assert (", with a head 50% of the way to the refitted one" in card) == (share == 0.5)
    if is_refitted:
        model = keras.models.load_model(tmp_path / "run" / "best_model.keras")
        # The fitted head, of which the kept one is the share, and the average of both heads the rest.
        fitted = [
            (kept - (1 - share) * ((1 - share) * one + share * end)) / share
            for kept, one, end in zip(best[-head:], first[-head:], latest[-head:], strict=True)
        ]
        strip_views(model).set_weights([*best[:-head], *fitted])
        # A regression whose intercepts are free gives its images the frequencies of their classes on average.
        table = pd.read_csv(tables[0])
        labels = table["class"].astype("category").cat.codes.to_numpy()
        sequence = AugmentedImageSequence(table["path"].to_numpy(), labels, image_size=(32, 32), batch_size=27)
        images = sequence[0][0]
        found = strip_views(model).predict(np.concatenate([images, images[:, :, ::-1]]))
        np.testing.assert_allclose(found.mean(axis=0), np.bincount(labels) / len(labels), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_stopped_run_chooses_the_same(epoch, tables, tmp_path, stop_at, monkeypatch):
    start(**options_of(tables, tmp_path / "run", **OPTIONS))
    state = read_state(str(tmp_path / "run" / "latest_model.keras"))
    assert state["kept_share"] in (*SHARES, 1)
    assert state["has_refitted_head"] == (state["kept_share"] > 0)
    # Within an epoch, whose first steps another process then has done.
    stop_at(epoch, 3)
    with pytest.raises(SystemExit):
        start(**options_of(tables, tmp_path / "stopped", **OPTIONS))
    monkeypatch.undo()
    # Killed between the model that is kept and the last epoch's, a run has another one under that name.
    shutil.copy(tmp_path / "run" / "best_model.keras", tmp_path / "stopped")
    start(**options_of(tables, tmp_path / "stopped", load_model_path=str(tmp_path / "stopped"), **OPTIONS))
    stopped = read_state(str(tmp_path / "stopped" / "latest_model.keras"))
    assert all(stopped[name] == state[name] for name in ("kept_share", "has_refitted_head"))
    # A model with a refitted head carries no state.
    assert_same_run(tmp_path / "run", tmp_path / "stopped", ["latest_model.keras"])
    for one, other in zip(*(load(tmp_path / name, "best").get_weights() for name in ("run", "stopped")), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_run_that_has_chosen_goes_on_and_chooses_again(tables, tmp_path):
    start(**options_of(tables, tmp_path / "run", **OPTIONS | {"num_epochs": 1}))
    found = start(**options_of(tables, tmp_path / "run", load_model_path=str(tmp_path / "run"), **OPTIONS))
    assert found["epoch"] == 2
    assert found["best_epoch"] in (0, 2)
    # Without what it has started from it cannot choose, and says so before it changes anything.
    (tmp_path / "run" / "start_model.keras").unlink()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    options = OPTIONS | {"load_model_path": str(tmp_path / "run"), "num_epochs": 3}
    with pytest.raises(UserError, match="start_model.keras, the weights that this run has started from"):
        start(**options_of(tables, tmp_path / "run", **options))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
