"""Photos in a folder per answer."""

import os

import pytest

from finetune.core.options import UserError
from finetune.predicting.answers import check_sort_into, name_copies, name_folders, sort_photos


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
