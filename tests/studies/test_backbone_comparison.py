"""Comparing backbones by a probe: images drawn, metrics, suggestion, picture, and what is left out."""

import shutil

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from PIL import Image
from sklearn.metrics import average_precision_score

import compare_backbones
import train
from compare_backbones import CompareConfigs
from configs import Configs
from finetune.core.options import UserError
from finetune.models.backbones import BACKBONES
from finetune.studies import backbone_comparison
from finetune.studies.backbone_comparison import Candidate, Probed, count_passes, draw_images, find_front, judge, rank
from finetune.studies.backbone_report import (
    describe_suggestion,
    draw_front,
    format_ranking,
    measure_overlap,
    name_points,
    print_ranking,
)
from finetune.training import feature_store, probe
from model import ModelFactory

# Backbones cut to their first layers, with random weights.
MODEL = {
    "use_imagenet_weights": False,
    "pop_conv_layers": 75,
    "batch_size": 4,
    "generator_workers": 2,
    "augmentation_strength": "none",
}
SMALL = MODEL | {"backbones": ["MobileNet"], "image_sizes": [32, 48]}


@pytest.fixture(scope="module")
def table(photo_folder, tmp_path_factory):
    """A table of 36 photos of three classes."""
    rows = [(str(path), path.parent.name) for path in sorted(photo_folder.glob("*/*.jpg"))]
    path = tmp_path_factory.mktemp("table") / "training_set.csv"
    pd.DataFrame(rows, columns=["path", "class"]).to_csv(path, index=False)
    return path


def compare(table, folder, **options):
    paths = {"write_path": str(folder / "found.csv"), "image_cache_path": str(folder / "store")}
    return compare_backbones.main(CompareConfigs(**SMALL | paths | {"train_csv": str(table)} | options).validate())


# The whole script


@pytest.fixture(scope="module")
def first(table, tmp_path_factory):
    """A comparison with mirror images, and its folder."""
    folder = tmp_path_factory.mktemp("first")
    return compare(table, folder, augmentation_strength="photo"), folder


@pytest.mark.slow
def test_ranking_and_picture_are_written(first):
    results, folder = first
    columns = ["backbone", "height", "width", "accuracy", "low", "high", "images", "images_per_second"]
    columns += ["training_seconds", "parameters", "multiply_adds", "speed_noise", "megabytes"]
    columns += ["balanced_accuracy", "balanced_rank", "largest_share", "behind_best", "standard_error"]
    columns += ["suggested", "measured_fastest", "not_told_apart", "on_front"]
    written = pd.read_csv(folder / "found.csv")
    assert [*written] == columns
    pd.testing.assert_frame_equal(written, results["ranking"], check_dtype=False)
    assert sorted(written["height"]) == [32, 48]
    assert written["accuracy"].is_monotonic_decreasing
    # The photos' classes are their colours.
    assert written["accuracy"].min() > 0.9
    assert ((written["low"] <= written["accuracy"]) & (written["accuracy"] <= written["high"])).all()
    assert (written["images"] == 36).all()
    assert written["suggested"].sum() == 1
    with Image.open(folder / "found.png") as picture:
        assert picture.size == (1290, 840)
    assert sorted(path.name for path in folder.iterdir()) == ["found.csv", "found.png", "store"]
    row = written.iloc[0]
    configs = Configs(visual_model_name="MobileNet", classes=["a", "b", "c"], image_target_size=(32, 32, 3), **MODEL)
    model = ModelFactory().get_model(configs)
    assert row["parameters"] == model.count_params()
    assert row["megabytes"] == pytest.approx(sum(weight.nbytes for weight in model.get_weights()) / 1e6)
    # 100 epochs of 36 images: a pass forward, and one backward at twice the cost.
    assert row["training_seconds"] == pytest.approx(100 * 36 * 3 / row["images_per_second"])


@pytest.mark.slow
def test_second_comparison_reuses_stored_features(first, table, tmp_path, monkeypatch, capsys):
    results, folder = first
    computed = []
    monkeypatch.setattr(feature_store, "select_rows", lambda *_: computed.append(1))
    again = compare(table, tmp_path, augmentation_strength="photo", image_cache_path=str(folder / "store"))
    assert computed == []
    fixed = ["height", "accuracy", "low", "high", "balanced_accuracy", "parameters", "multiply_adds"]
    tables = [one["ranking"][fixed].sort_values("height", ignore_index=True) for one in (results, again)]
    pd.testing.assert_frame_equal(*tables)
    assert (again["ranking"]["images_per_second"] > 0).all()
    assert "36 of the 36 images" in capsys.readouterr().out


@pytest.mark.slow
def test_train_reuses_the_stored_features_and_starts_from_the_same_head(first, table, tmp_path, monkeypatch, capsys):
    _, folder = first
    options = MODEL | {"visual_model_name": "MobileNet", "image_target_size": (32, 32, 3), "num_epochs": 1}
    options |= {"head_initialization": "linear_probe", "conv_layers_to_train": 0, "show_model_summary": False}
    options |= {"train_csv": str(table), "test_csv": str(table), "augmentation_strength": "photo"}
    options |= {"allow_duplicates": True}
    lines, computed, compute = [], [], probe.compute_features

    def compute_features(*facts, **named):
        computed.append(1)
        return compute(*facts, **named)

    monkeypatch.setattr(feature_store, "compute_features", compute_features)
    for store in (folder / "store", tmp_path / "empty"):
        run = str(tmp_path / store.name / "run")
        train.main(Configs(**options, image_cache_path=str(store), save_model_path=run).validate())
        lines += [line for line in capsys.readouterr().out.splitlines() if "The head starts from" in line]
        assert len(computed) == (0 if store == folder / "store" else 2)
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_what_cannot_be_built_is_left_out_and_named(table, tmp_path, capsys, monkeypatch):
    build = ModelFactory.get_model

    def get_model(self, configs):
        if configs.visual_model_name == "ResNet50":
            raise UserError("The ImageNet weights of ResNet50 are not here and could not be downloaded. " + "Why " * 99)
        return build(self, configs)

    monkeypatch.setattr(ModelFactory, "get_model", get_model)
    results = compare(table, tmp_path, backbones=["ResNet50", "MobileNet"], image_sizes=[32, 8])
    assert results["ranking"][["backbone", "height"]].to_numpy().tolist() == [["MobileNet", 32]]
    assert [*results["left_out"]] == ["ResNet50 at 32", "ResNet50 at 8", "MobileNet at 8"]
    printed = capsys.readouterr().out
    assert "Left out: ResNet50 at 32, ResNet50 at 8: The ImageNet weights of ResNet50 are not here" in printed
    assert max(map(len, printed.splitlines())) < 220
    assert "MobileNet at 8: image_target_size: MobileNet needs at least 32 pixels" in printed
    assert "Suggestion: MobileNet at 32, the only one that could be compared." in printed
    assert "Its options: --visual_model_name MobileNet --image_target_size 32 32 3\n" in printed


def test_nothing_is_written_if_no_backbone_is_left(table, tmp_path):
    with pytest.raises(UserError, match="None of the backbones .* Xception at 32: .*71 pixels"):
        compare(table, tmp_path, backbones=["Xception", "InceptionV3"], image_sizes=[32])
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("feature", "images", "message"),
    [
        (np.nan, 36, "MobileNet at 32: its features are not finite"),
        (0.5, 8, r"training_set.csv: .*at least 10 .* Received: 8\."),
    ],
)
def test_too_few_images_and_features_that_are_not_finite_are_refused(
    feature, images, message, table, tmp_path, monkeypatch
):
    features = np.full((36, 8), feature), np.arange(36) < images
    monkeypatch.setattr(backbone_comparison, "get_features", lambda *_: features)
    monkeypatch.setattr(ModelFactory, "get_model", lambda *_: None)
    with pytest.raises(UserError, match=message):
        compare(table, tmp_path, image_sizes=[32])


@pytest.mark.slow
def test_an_unreadable_image_is_an_error_or_left_out_for_all(table, tmp_path, capsys):
    rows = pd.read_csv(table)
    for row, path in enumerate(rows["path"]):
        rows.loc[row, "path"] = shutil.copy(path, tmp_path / f"{row}.jpg").name
    content = (tmp_path / "5.jpg").read_bytes()
    # It has an end marker and a sound header, so only decoding finds the damage.
    (tmp_path / "5.jpg").write_bytes(content[: len(content) // 2] + b"\xff\xd9")
    rows.to_csv(tmp_path / "damaged.csv", index=False)
    with pytest.raises(UserError, match="5.jpg"):
        compare(tmp_path / "damaged.csv", tmp_path, image_directory=str(tmp_path))
    assert not (tmp_path / "found.csv").exists()
    options = {"image_directory": str(tmp_path), "skip_bad_images": True}
    assert compare(tmp_path / "damaged.csv", tmp_path, **options)["ranking"]["images"].tolist() == [35, 35]
    printed = capsys.readouterr().out
    assert printed.count("Left out 1 image that could not be read: ") == 1
    assert "5.jpg" in printed


@pytest.mark.slow
def test_several_labels_of_images_in_a_store_are_ranked_by_mean_average_precision(
    multilabel_csv, tmp_path, monkeypatch, store
):
    answers, cross_validate = [], backbone_comparison.cross_validate

    def note(views, labels, *facts, **named):
        answers.append((labels, cross_validate(views, labels, *facts, **named)))
        return answers[-1][1]

    monkeypatch.setattr(backbone_comparison, "cross_validate", note)
    rows = pd.read_csv(multilabel_csv)
    for path in rows["path"]:
        store.put(f"memory://bucket/{path}", (multilabel_csv.parent / path).read_bytes())
    # Shuffled labels cannot be predicted.
    rows.assign(**{"class": rows["class"].sample(frac=1, random_state=1).to_numpy()}).to_csv(
        tmp_path / "wrong.csv", index=False
    )
    options = {"image_directory": "memory://bucket", "multi_label_classification": True, "image_sizes": [32]}
    ranking = compare(tmp_path / "wrong.csv", tmp_path, **options)["ranking"]
    labels, probabilities = answers[0]
    expected = average_precision_score(labels, probabilities, average="macro")
    assert ranking["mean_average_precision"].tolist() == pytest.approx([expected])
    assert ranking["low"][0] < expected <= ranking["high"][0] <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbones": []}, "backbones: .*, or all"),
        ({"image_sizes": [224, 0]}, "image_sizes: .* from 1 to 16384.*224, 0"),
        ({"max_images": 9}, "max_images: .* at least 10.* Received: 9"),
        ({"backbones": ["MobileNet", "MobilNetV2"]}, r"backbones: .*MobileNetV2\?"),
        # These once were the reason why every backbone was left out.
        ({"loss": "foo"}, "loss: .*foo"),
        ({"optimizer_type": "foo"}, "optimizer_type: .*foo"),
        ({"head": "foo"}, "head: .*foo"),
        ({"write_path": None}, "write_path: .*training_set.csv"),
    ],
)
def test_wrong_options_are_refused_at_the_start_in_one_line(options, message, table, tmp_path, monkeypatch):
    monkeypatch.setattr(backbone_comparison, "draw_images", lambda *_: pytest.fail("too late"))
    with pytest.raises(UserError, match=message) as raised:
        compare(table, tmp_path, **{name: str(table) if value is None else value for name, value in options.items()})
    assert len(str(raised.value).splitlines()) == 1


def test_all_and_repeated_names_and_the_image_size_without_sizes(table, tmp_path, monkeypatch):
    asked = []

    def probe_backbones(configs, names, sizes, *_):
        # A size for tests alone has no influence.
        assert not configs.eval_image_size
        asked.append(([*names], sizes))
        raise UserError("enough")

    monkeypatch.setattr(backbone_comparison, "probe_backbones", probe_backbones)
    for options in (
        {"backbones": ["VGG16", "all"], "image_sizes": [64, 32, 64], "eval_image_size": [40, 40]},
        {"backbones": ["VGG16", "MobileNet", "VGG16"], "image_sizes": [], "image_target_size": (32, 48, 3)},
    ):
        with pytest.raises(UserError, match="enough"):
            compare(table, tmp_path, **options)
    assert asked[0] == ([*BACKBONES], [(64, 64), (32, 32)])
    assert asked[1] == (["VGG16", "MobileNet"], [(32, 48)])


# The images


@pytest.fixture
def many(tmp_path):
    """A table of 300 rows of three classes, 200, 80 and 20, whose photos do not exist."""
    names = np.repeat(["blue", "green", "red"], [200, 80, 20])
    rows = [(f"{name}/{number:03d}.jpg", name) for number, name in enumerate(names)]
    pd.DataFrame(rows, columns=["path", "class"]).to_csv(tmp_path / "many.csv", index=False)
    return tmp_path / "many.csv", names


def draw(table, monkeypatch, most, multi_label=False, **options):
    """Returns the rows drawn; with `image_directory` it looks at the images."""
    if "image_directory" not in options:
        monkeypatch.setattr(backbone_comparison, "check_images", lambda *facts, **named: [])
    configs = CompareConfigs(train_csv=str(table), multi_label_classification=multi_label, **options)
    left_out, number = draw_images(configs, most)
    return np.setdiff1d(np.arange(number), np.array(sorted(left_out), int) - 2), number


def test_images_are_drawn_with_their_share_of_every_class(many, monkeypatch):
    table, names = many
    rows, number = draw(table, monkeypatch, 30)
    assert number == 300
    counts = pd.Series(names[rows]).value_counts()
    assert counts.to_dict() == {"blue": 20, "green": 8, "red": 2}
    assert draw(table, monkeypatch, 30)[0].tolist() == rows.tolist()
    assert draw(table, monkeypatch, 30, random_seed=1)[0].tolist() != rows.tolist()
    assert len(draw(table, monkeypatch, 17)[0]) <= 17
    assert draw(table, monkeypatch, 300)[0].tolist() == list(range(300))
    assert draw(table, monkeypatch, 2000)[0].tolist() == list(range(300))


def test_images_of_several_labels_are_drawn_with_their_share_of_every_class(tmp_path, monkeypatch):
    labels = ["cat"] * 120 + ["cat$dog"] * 60 + ["dog$bird"] * 20
    pd.DataFrame({"path": [f"{row}.jpg" for row in range(200)], "class": labels}).to_csv(
        tmp_path / "m.csv", index=False
    )
    rows, _ = draw(tmp_path / "m.csv", monkeypatch, 100, multi_label=True)
    parts = [set(labels[row].split("$")) for row in rows]
    assert len(rows) <= 100
    for name, expected in (("cat", 90), ("dog", 40), ("bird", 10)):
        assert abs(sum(name in part for part in parts) - expected) <= 1, name


def test_only_drawn_images_are_checked(many, photo_folder, tmp_path, monkeypatch):
    table, _ = many
    rows, _ = draw(table, monkeypatch, 30)
    monkeypatch.undo()
    paths = pd.read_csv(table)["path"]
    for row in rows[:-1]:
        target = tmp_path / paths[row]
        target.parent.mkdir(exist_ok=True)
        shutil.copy(photo_folder / "red" / "00.jpg", target)
    # The error names the line of the table, not the place among the images drawn.
    message = rf"many.csv: row {rows[-1] + 2}: .*{paths[rows[-1]]} "
    with pytest.raises(UserError, match=message):
        draw(table, monkeypatch, 30, image_directory=str(tmp_path))
    found, _ = draw(table, monkeypatch, 30, image_directory=str(tmp_path), skip_bad_images=True)
    assert found.tolist() == rows[:-1].tolist()


# Metrics


def answer(labels, right):
    """Returns probabilities `(images, 3)` that are right for the first `right` images, and wrong for the others."""
    chosen = np.where(np.arange(len(labels)) < right, labels, (labels + 1) % 3)
    return np.eye(3)[chosen] * 0.7 + 0.1


def probed_of(**candidates):
    """Makes 200 images and candidates from the number that each is right of, and its speed."""
    labels = np.random.default_rng(0).integers(0, 3, 200)
    rows = [
        Candidate(name, (224, 224), answer(labels, right), float(speed), 1000.0, 2_000_000)
        for name, (right, speed) in candidates.items()
    ]
    return Probed(rows, labels)


def rank_three(probed):
    return rank(probed, ["a", "b", "c"], False, seed=0)


def test_the_fastest_not_significantly_worse_than_the_best_is_suggested():
    # Right on the same images except for the last few: 4 of 200 differ by 0.02, standard error 0.0099, which is
    # significant; 3 of 200 differ by 0.015 with a standard error of 0.0086, which is not.
    ranking = rank_three(probed_of(fast=(180, 90), good=(181, 20), best=(184, 10), fastest=(100, 200)))
    assert ranking["backbone"].tolist() == ["best", "good", "fast", "fastest"]
    assert ranking["accuracy"].tolist() == [0.92, 0.905, 0.9, 0.5]
    assert ranking["behind_best"].tolist() == pytest.approx([0, 0.015, 0.02, 0.42])
    deviations = [np.std([1] * number + [0] * (200 - number), ddof=1) for number in (0, 3, 4, 84)]
    assert ranking["standard_error"].tolist() == pytest.approx([one / 200**0.5 for one in deviations])
    assert ranking["suggested"].tolist() == [False, True, False, False]
    # From the suggested one 1 of 200 differs.
    assert ranking["not_told_apart"].tolist() == [True, False, True, False]
    assert ranking["on_front"].all()
    assert ranking["megabytes"].tolist() == [8.0] * 4
    line = describe_suggestion(ranking)
    assert line.startswith("Suggestion: good at 224, the fastest")
    assert "by 1.5 points (95 % interval -0.2 to 3.2)" in line
    assert line.endswith("200 images: best at 224, fast at 224.")


def test_a_significantly_better_one_is_suggested_however_slow():
    ranking = rank_three(probed_of(fast=(100, 90), best=(190, 10)))
    line = describe_suggestion(ranking)
    assert line.startswith("Suggestion: best at 224, the best.")
    assert "fast at 224, is behind by 45.0 points (95 % interval 38.1 to 51.9)" in line


def test_speeds_that_contradict_the_computation_do_not_choose():
    labels = np.random.default_rng(0).integers(0, 3, 200)
    candidates = [
        Candidate("MobileNet", (size, size), answer(labels, right), speed, 1000.0, 2_000_000, multiply_adds)
        for size, right, speed, multiply_adds in ((144, 180, 23.6, 234_000_000), (224, 181, 29.7, 567_000_000))
    ]
    ranking = rank_three(Probed(candidates, labels))
    assert ranking["height"].tolist() == [224, 144]
    assert ranking["suggested"].tolist() == [False, True]
    assert ranking["measured_fastest"].tolist() == [True, False]
    first, second = describe_suggestion(ranking).splitlines()
    assert first.startswith("Suggestion: MobileNet at 144, by its computation")
    assert all(words in second for words in ("29.7 images/s", "23.6", "0.57 and 0.23 billion multiply-adds"))


def test_of_equal_metrics_the_faster_comes_first():
    ranking = rank_three(probed_of(slow=(150, 9), fast=(150, 10)))
    assert ranking["backbone"].tolist() == ["fast", "slow"]
    assert ranking["suggested"].tolist() == [True, False]
    assert ranking["on_front"].tolist() == [True, False]


def test_an_image_that_one_candidate_could_not_read_counts_for_none():
    probed = probed_of(one=(150, 9), other=(160, 10))
    probed.candidates[0].probabilities[199] = np.nan
    probed.candidates[1].probabilities[0] = np.nan
    ranking = rank_three(probed)
    assert ranking["images"].tolist() == [198, 198]
    # Both were right on image 0 and wrong on image 199.
    assert ranking["accuracy"].tolist() == pytest.approx([159 / 198, 149 / 198])


def test_of_imbalanced_classes_the_order_by_balanced_accuracy_is_shown_too(capsys):
    labels = np.repeat([0, 1, 2], [71, 20, 9])
    candidates = []
    for name, numbers in {"even": (60, 16, 8), "common": (71, 10, 6)}.items():
        is_right = np.concatenate([np.arange(count) < right for count, right in zip((71, 20, 9), numbers, strict=True)])
        chosen = np.eye(3)[np.where(is_right, labels, (labels + 1) % 3)] * 0.7 + 0.1
        candidates.append(Candidate(name, (224, 224), chosen, 10.0, 1000.0, 2_000_000))
    ranking = rank_three(Probed(candidates, labels))
    assert ranking["backbone"].tolist() == ["common", "even"]
    assert ranking["accuracy"].tolist() == [0.87, 0.84]
    assert ranking["balanced_accuracy"].tolist() == pytest.approx(
        [(1 + 10 / 20 + 6 / 9) / 3, (60 / 71 + 16 / 20 + 8 / 9) / 3]
    )
    assert ranking["balanced_rank"].tolist() == [2, 1]
    assert ranking["largest_share"].tolist() == [0.71, 0.71]
    print_ranking(ranking, {}, 100)
    printed = capsys.readouterr().out
    assert "balanced accuracy" in printed.splitlines()[1]
    assert "0.870  0.800 to 0.930              0.722" in printed
    assert "71% of the images" in printed
    assert "even at 224 (0.845), common at 224 (0.722)." in printed


def test_copies_of_images_in_groups_make_no_difference_significant():
    probed = probed_of(fast=(180, 90), best=(184, 10))
    alone = rank_three(probed)
    assert "groups" not in alone
    copied = [one._replace(probabilities=one.probabilities.repeat(4, axis=0)) for one in probed.candidates]
    labels, groups = probed.labels.repeat(4), np.arange(200).repeat(4)
    ranking = rank_three(Probed(copied, labels, groups))
    assert ranking[["images", "groups"]].to_numpy().tolist() == [[800, 200]] * 2
    names = ["accuracy", "behind_best", "standard_error", "low", "high"]
    assert ranking[names].to_numpy() == pytest.approx(alone[names].to_numpy())
    assert ranking["suggested"].tolist() == alone["suggested"].tolist() == [True, False]
    assert rank_three(Probed(copied, labels))["suggested"].tolist() == [True, False]


def test_a_class_of_one_group_is_not_compared_on():
    probed = probed_of(one=(150, 9))
    groups = np.where(probed.labels == 2, 200, np.arange(200) // 2)
    ranking = rank_three(probed._replace(groups=np.unique(groups, return_inverse=True)[1]))
    kept = probed.labels < 2
    assert ranking["images"].tolist() == [kept.sum()]
    assert ranking["accuracy"].tolist() == pytest.approx([kept[:150].sum() / kept.sum()])


def test_the_front_is_what_none_beats_in_both():
    values, speeds = np.array([0.9, 0.8, 0.8, 0.7, 0.9, 0.6]), np.array([10, 20, 15, 20, 10, 90])
    assert find_front(values, speeds).tolist() == [True, True, False, False, True, True]


def test_a_frozen_backbone_costs_less(monkeypatch):
    monkeypatch.setattr(backbone_comparison, "has_fixed_features", lambda model: model == "frozen")
    assert [count_passes("frozen", changes, 30) for changes in (True, False)] == [30, 1]
    assert [count_passes("trained", changes, 30) for changes in (True, False)] == [90, 90]


# What is shown


def make_ranking(number, sizes=(224,)):
    """Returns a random ranking whose points are as crowded as real ones."""
    rng, names = np.random.default_rng(3), compare_backbones.USUAL_BACKBONES[:number]
    rows = [(name, size, size) for name in names for size in sizes]
    table = pd.DataFrame(rows, columns=["backbone", "height", "width"])
    speeds = np.exp(rng.normal(3.4, 0.6, len(table)))
    values = 0.93 - 0.02 * np.log(speeds) + rng.normal(0, 0.015, len(table))
    table = table.assign(speed_noise=1.0, multiply_adds=0)
    table = table.assign(accuracy=values, low=values - 0.02, high=values + 0.02, images=500, images_per_second=speeds)
    table = table.assign(training_seconds=9000.0, parameters=3_200_000, megabytes=12.8)
    table = table.sort_values("accuracy", ascending=False, ignore_index=True)
    return judge(table, "accuracy", (rng.random((1, 500)) < table["accuracy"].to_numpy()[:, None]).astype(float))


@pytest.mark.parametrize(("number", "sizes"), [(1, (224,)), (12, (224, 320))])
def test_labels_in_the_picture_cover_no_other_and_no_point_and_stay_inside(number, sizes):
    ranking = make_ranking(number, sizes)
    figure = draw_front(ranking)
    axes = figure.axes[0]
    figure.draw_without_rendering()
    # Without their leader lines.
    boxes = {text.get_text(): Text.get_window_extent(text).extents for text in axes.texts}
    assert set(boxes) == set(name_points(ranking))
    frame = axes.get_window_extent().extents
    points = axes.transData.transform(ranking[["images_per_second", "accuracy"]].to_numpy())
    dots = np.concatenate([points - 4, points + 4], axis=1)
    for name, box in boxes.items():
        others = np.array([other for key, other in boxes.items() if key != name]).reshape(-1, 4)
        area = np.prod(box[2:] - box[:2])
        assert measure_overlap(box, np.concatenate([others, dots]), frame) < 0.05 * area, name


def test_an_overlap_is_the_area_shared_and_twice_that_outside():
    frame = np.array([0, 0, 10, 10])
    others = np.array([[2, 2, 4, 4], [8, 8, 9, 9]])
    assert measure_overlap(np.array([3, 3, 6, 5]), others, frame) == 1
    assert measure_overlap(np.array([9, 2, 12, 3]), others, frame) == 4


def test_names_in_the_picture_have_sizes_where_these_differ():
    assert "MobileNet" in name_points(make_ranking(4))
    assert {"MobileNet 224", "MobileNet 320"} <= {*name_points(make_ranking(4, (224, 320)))}


def test_the_table_has_a_line_for_each_and_notes():
    ranking = rank_three(probed_of(fast=(180, 90), good=(181, 20), best=(184, 10)))
    lines = format_ranking(ranking).splitlines()
    assert lines[0].split() == ["size", "accuracy", "95", "%", "interval", "images/s", "training", "parameters", "MB"]
    assert lines[2].split()[:3] == ["good", "224", "0.905"]
    assert lines[2].endswith("20.0  16 min 40 s       2.0 M  8.0  suggested")
    assert lines[1].endswith("not significantly different")
