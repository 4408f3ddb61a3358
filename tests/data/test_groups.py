"""Groups of photos: how a table names them, and folds that keep them whole."""

import numpy as np
import pandas as pd
import pytest

from finetune.core.options import UserError
from finetune.data.groups import (
    count_groups_of_classes,
    deal_groups,
    describe_groups,
    describe_shared,
    find_lone_classes,
    find_shared,
    number_groups,
    pick_groups,
    read_group_names,
    read_groups,
    refuse_lone_classes,
    warn_of_shared_groups,
)


def test_equal_values_are_one_group_and_an_empty_one_is_its_own():
    groups = number_groups(["b", " a ", "a", "", "b\t", " ", "c"])
    assert len(groups) == 7
    assert sorted(set(groups.tolist())) == [0, 1, 2, 3, 4]
    together = {frozenset(np.flatnonzero(groups == number).tolist()) for number in groups}
    assert together == {frozenset(rows) for rows in ([0, 4], [1, 2], [3], [5], [6])}
    assert describe_groups(groups) == " in 5 groups"
    assert describe_groups(number_groups(["x", "x"])) == " in 1 group"


def test_the_column_of_labels_names_no_groups():
    table = pd.DataFrame({"path": ["1", "2", "3"], "group": ["a", "a", "b"]})
    assert read_groups(table, "class").tolist() == [0, 0, 1]
    assert read_groups(table, "group") is None
    assert read_groups(table[["path"]], "class") is None


def test_groups_of_several_tables_are_the_same_by_name():
    tables = [pd.DataFrame({"group": names}) for names in (["a", "", " b"], ["b ", "", "c", "a"])]
    names = [read_group_names(table, "class") for table in tables]
    assert find_shared(names[1], names[:1]).tolist() == [0, 3]
    assert find_shared(names[1], []).size == 0
    assert find_shared(read_group_names(tables[0], "group"), names).size == 0
    test, validation = (
        describe_shared(name, {"images": 4, "images_of_known_groups": 2}) for name in ("test", "validation")
    )
    assert test.startswith("2 of the 4 images of the test set belong to groups that the model was trained on or select")
    assert validation.startswith("2 of the 4 images of the validation set belong to groups that the model was trained")
    assert describe_shared("test", {"images": 4}) == ""


def test_groups_in_training_and_another_set_are_told(tmp_path, capsys):
    names = {"training": ["a", "a", "", "c"], "validation": ["a", " c", "c ", "d", ""], "test": ["e", ""]}
    paths = {name: str(tmp_path / f"{name}.csv") for name in names}
    for name, groups in names.items():
        table = pd.DataFrame({"path": [f"{name}{row}.jpg" for row in range(len(groups))], "class": "x"})
        table.assign(group=groups).to_csv(paths[name], index=False)
    warn_of_shared_groups(paths, "class")
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == 1
    assert f"3 of the 5 images of {paths['validation']} belong to 2 groups of {paths['training']}" in shown
    warn_of_shared_groups(paths, "group")
    assert capsys.readouterr().out == ""


def test_images_that_are_each_a_group_of_their_own_have_none():
    assert number_groups(["a", "b", "", ""]) is None
    assert describe_groups(None) == ""
    groups = number_groups(["a", "a", "b"])
    assert pick_groups(groups, np.array([0, 2])) is None
    assert pick_groups(groups, np.array([True, True, False])).tolist() == [0, 0]
    assert pick_groups(None, np.array([0])) is None


def test_classes_of_one_group_are_found():
    labels, groups = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 0, 0, 2, 1])
    assert count_groups_of_classes(labels, groups, 4).tolist() == [2, 1, 2, 0]
    assert find_lone_classes(labels, groups, 4).tolist() == [1]
    assert find_lone_classes(labels, None, 4).tolist() == []
    several = np.array([[1, 0], [1, 1], [0, 1]])
    assert find_lone_classes(several, np.array([0, 1, 1]), 2).tolist() == [1]


@pytest.mark.parametrize("groups", [np.zeros(4, int), np.array([0, 0, 1, 1])])
def test_classes_that_all_lie_in_one_group_are_refused(groups):
    with pytest.raises(UserError, match=r"t.csv: .*two groups.*4 images in . groups? of the column 'group'"):
        refuse_lone_classes(np.array([0, 0, 1, 1]), groups, 2, "t.csv")
    refuse_lone_classes(np.array([0, 0, 1, 1]), None, 2, "t.csv")


def grouped_labels(seed, number=300, most=12):
    """Returns labels of 4 classes, the last one rare, and groups of 1 to `most` images that share a class mostly."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, most + 1, number)
    groups = np.repeat(np.arange(number), sizes)
    of_group = rng.choice(4, number, p=[0.6, 0.25, 0.12, 0.03])
    labels = np.where(rng.random(len(groups)) < 0.9, of_group[groups], rng.integers(0, 3, len(groups)))
    return labels, groups


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("multi_label", [False, True])
def test_folds_keep_groups_whole_and_have_their_share_of_every_class(seed, multi_label):
    labels, groups = grouped_labels(seed)
    given = labels
    if multi_label:
        given = np.eye(4, dtype=np.uint8)[labels] | (np.random.default_rng(seed).random((len(labels), 4)) < 0.1)
    folds = deal_groups(given, groups, 4, 5, seed)
    assert np.array_equal(np.sort(np.concatenate(folds)), np.arange(len(labels)))
    for first in range(5):
        for second in range(first):
            assert not set(groups[folds[first]]) & set(groups[folds[second]])
    counts = np.array([(np.eye(4)[labels] if not multi_label else given)[fold].sum(axis=0) for fold in folds])
    assert [len(fold) for fold in folds] == pytest.approx([len(labels) / 5] * 5, rel=0.05)
    # A group of the rare class is a large part of it.
    assert np.abs(counts - counts.mean(axis=0)).max(axis=0) == pytest.approx(0, abs=12)
    again = deal_groups(given, groups, 4, 5, seed)
    assert all(np.array_equal(*pair) for pair in zip(folds, again, strict=True))


def test_a_class_of_two_groups_lies_in_two_folds_whatever_else_these_have():
    # Of the rare class's two groups both have much of the common class.
    rng = np.random.default_rng(0)
    for seed in range(20):
        sizes = rng.integers(1, 60, 9)
        groups = np.repeat(np.arange(9), sizes)
        labels = np.zeros(len(groups), int)
        labels[np.flatnonzero(groups == 2)[0]] = 1
        labels[np.flatnonzero(groups == 7)[0]] = 1
        folds = deal_groups(labels, groups, 2, 3, seed)
        assert sum((labels[fold] == 1).any() for fold in folds) == 2


def test_a_giant_group_is_a_fold_of_its_own_and_few_groups_make_few_folds():
    groups = np.array([0] * 80 + [1, 2, 3, 4] * 5)
    labels = np.tile([0, 1], 50)
    folds = deal_groups(labels, groups, 2, 3, 0)
    assert sorted(map(len, folds)) == [10, 10, 80]
    assert [len(fold) for fold in deal_groups(labels[:4], np.array([0, 0, 1, 1]), 2, 5, 0)] == [2, 2]
