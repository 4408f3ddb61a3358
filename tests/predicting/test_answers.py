"""Photos in a folder per answer."""

import os

import numpy as np
import pandas as pd
import pytest

from configs import Configs
from finetune.core.options import UserError
from finetune.evaluation.abstention import Abstention
from finetune.evaluation.decision import Decision
from finetune.predicting.answers import (
    check_rule,
    check_sort_into,
    insert_answers,
    name_answers,
    name_copies,
    name_folders,
    name_refusals,
    sort_photos,
)


@pytest.fixture
def photos(tmp_path):
    """Three files of different content, two of them with one name."""
    paths = [tmp_path / "in" / name for name in ("a/1.jpg", "b/1.jpg", "2.jpg")]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]))
    return [str(path) for path in paths]


@pytest.mark.parametrize("links", [False, True])
def test_each_photo_is_in_the_folder_of_each_of_its_answers(photos, links, tmp_path):
    folder = tmp_path / "sorted"
    for path in photos:
        os.chmod(path, 0o444)
    assert sort_photos(str(folder), photos, [["cat"], ["cat", "dog"], []], links) == 2
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.jpg")}
    assert found == {"cat/a/1.jpg": b"\0", "cat/b/1.jpg": b"\1", "dog/b/1.jpg": b"\1"}
    assert (folder / "cat" / "a" / "1.jpg").is_symlink() == links
    assert [*tmp_path.glob(".*")] == []


def test_urls_are_copied_and_photos_never_replace_each_other(store, tmp_path):
    urls = ["memory://one/1.jpg", "memory://two/1.jpg"]
    for number, url in enumerate(urls):
        store.put(url, bytes([number]))
    sort_photos(str(tmp_path / "sorted"), urls, [["cat"], ["cat"]], links=True)
    found = sorted(path.read_bytes() for path in (tmp_path / "sorted" / "cat").iterdir())
    assert found == [b"\0", b"\1"]
    assert name_copies(["/x/1.jpg", *urls]) == ["1.jpg", "1 2.jpg", "1 3.jpg"]


def test_answers_become_names_that_stay_below_the_folder_and_differ():
    names = name_folders(["../up", "..", "a/b", "a:b", "Cat", "cat"])
    assert len({name.casefold() for name in names.values()}) == len(names)
    assert not any(os.sep in name or name in ("", ".", "..") for name in names.values())


def test_a_photo_that_is_gone_leaves_no_half_sorted_folder(photos, tmp_path):
    os.remove(photos[1])
    with pytest.raises(UserError, match="sort_into"):
        sort_photos(str(tmp_path / "sorted"), photos, [["cat"]] * 3, links=False)
    assert not (tmp_path / "sorted").exists()


def test_a_folder_with_files_a_file_or_one_in_the_input_is_refused(photos, tmp_path):
    given = str(tmp_path / "in")
    check_sort_into(str(tmp_path / "new"), given)
    (tmp_path / "empty").mkdir()
    check_sort_into(str(tmp_path / "empty"), given)
    for folder in (given, f"{given}/sorted", photos[0]):
        with pytest.raises(UserError, match="sort_into"):
            check_sort_into(folder, given)


def test_answers_are_a_class_unsure_or_unknown_with_the_reason():
    # Certainties are the logits of 0.9, 0.6, 0.9 and 0.9; similarities differ by tenths. Scales of 0 and 1 leave them.
    rule = Abstention(0.05, [0.8], 0.01, 1.0, [0.0, 1.0, 0.0, 1.0], 100)
    decision = Decision(["cat", "dog"], False, abstention=rule)
    raw = np.array([[0.9, 0.1], [0.4, 0.6], [0.1, 0.9], [0.9, 0.1]], np.float32)
    found = name_answers(decision, raw, np.array([0.5, 0.7, -1.3, 0.5], np.float32), {3})
    assert found.names == [["cat"], ["unsure"], ["unknown"], []]
    assert [bool(reason) for reason in found.reasons] == [False, True, True, False]
    assert "0.600 of dog is below 0.800" in found.reasons[1]
    # log(9) - 1.3.
    assert "0.90 is below 1.00" in found.reasons[2]
    np.testing.assert_allclose(found.similarities, [0.5, 0.7, -1.3, np.nan], rtol=1e-6)
    table = pd.DataFrame({"path": [*"abcd"], "predicted": 1, "probability": 1, "error": ""})
    columns = [*insert_answers(table, found)]
    assert columns == ["path", "predicted", "probability", "answer", "reason", "similarity", "error"]


def test_without_a_rule_every_image_is_answered_and_without_similarities_none_is_unknown():
    raw = np.array([[0.5, 0.5], [0.4, 0.6]], np.float32)
    nothing = np.full(2, np.nan, np.float32)
    assert name_answers(Decision(["cat", "dog"], False), raw, nothing, ()).names == [["cat"], ["dog"]]
    rule = Abstention(0.0, None, 0.01, 1.0, [0.0, 1.0, 0.0, 1.0], 100)
    decision = Decision(["cat", "dog"], False, abstention=rule)
    assert name_answers(decision, raw, nothing, ()).names == [["cat"], ["dog"]]


def test_each_label_has_its_threshold_and_an_image_without_labels_is_answered():
    # Without the rule, labels are given from 0.5; the third is never promised.
    rule = Abstention(0.1, [0.9, 0.6, None], 0.0, None, None, 100)
    decision = Decision(["ant", "bee", "cow"], True, abstention=rule)
    raw = np.array([[0.95, 0.7, 0.9], [0.8, 0.1, 0.1], [0.1, 0.1, 0.99], [0.1, 0.2, 0.3]], np.float32)
    found = name_answers(decision, raw, np.zeros(4, np.float32), ())
    assert found.names == [["ant", "bee"], ["unsure"], ["unsure"], []]
    assert "0.800 of ant is below 0.900" in found.reasons[1]
    assert "cannot be promised for cow" in found.reasons[2]


def make_configs(**options):
    configs = Configs(**options)
    configs.given = {*options}
    return configs


def test_a_promise_that_was_not_fitted_is_refused_and_averaging_is_told(capsys):
    decision = Decision(["cat", "dog"], False, abstention=Abstention(0.05, [0.8], 0.01, images=100))
    for configs in (make_configs(), make_configs(max_error=0.05, unknown_rate=0.01)):
        check_rule(decision, configs, "none")
    assert capsys.readouterr().out == ""
    for name, value in (("max_error", 0.02), ("unknown_rate", 0.0)):
        with pytest.raises(UserError, match=rf"{name}: expected 0\.0.*test\.py --{name}"):
            check_rule(decision, make_configs(**{name: value}), "none")
    with pytest.raises(UserError, match="max_error: expected 0,"):
        check_rule(Decision(["cat", "dog"], False), make_configs(max_error=0.02), "none")
    check_rule(decision, make_configs(), "flip")
    assert "flip" in capsys.readouterr().out


def test_classes_called_unsure_or_unknown_are_told_from_refusals():
    assert name_refusals(["cat", "unknown"]) == ("unsure", "(unknown)")
