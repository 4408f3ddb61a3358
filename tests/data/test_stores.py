"""Images that URLs name."""

import io
import os

import numpy as np
import pytest

from finetune.data.stores import PartlyFetched, is_url, join_path


@pytest.mark.parametrize("knows_parts", [False, True])
def test_a_partly_fetched_file_reads_as_the_whole(knows_parts):
    data, fetched = np.random.default_rng(0).bytes(700_000), []

    def fetch(start, end):
        fetched.append((start, end))
        return data[start:end] if knows_parts else data

    rng, whole = np.random.default_rng(1), io.BytesIO(data)
    with io.BufferedReader(PartlyFetched(fetch, len(data))) as file:
        for _ in range(300):
            offset, whence = int(rng.integers(-300_000, 800_000)), int(rng.integers(3))
            if [0, whole.tell(), len(data)][whence] + offset >= 0:
                assert file.seek(offset, whence) == whole.seek(offset, whence)
            number = int(rng.choice([0, 1, 30, 5000, 200_000, -1], p=[0.1, 0.2, 0.3, 0.2, 0.18, 0.02]))
            assert file.read(number) == whole.read(number)
    assert len(fetched) < 20 if knows_parts else len(fetched) == 1


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        *[(url, True) for url in ("s3://bucket/a.jpg", "memory://a", "https://host/a?b=c", "git+ssh://host/a")],
        *[(path, False) for path in ("a.jpg", "C:\\a.jpg", "C://a.jpg", "/a:b/c.jpg", "./s3://b/a.jpg", "s3:/a", "")],
    ],
)
def test_a_protocol_of_two_letters_or_more_makes_a_url(path, expected):
    assert is_url(path) is expected


@pytest.mark.parametrize(
    ("directory", "path", "expected"),
    [
        ("", "a.jpg", "a.jpg"),
        ("", "s3://bucket/a.jpg", "s3://bucket/a.jpg"),
        ("photos", "s3://bucket/../a.jpg", "s3://bucket/../a.jpg"),
        ("s3://bucket", "gs://other/a.jpg", "gs://other/a.jpg"),
        ("s3://bucket", "a.jpg", "s3://bucket/a.jpg"),
        ("s3://bucket/photos/", "./cat/a.jpg", "s3://bucket/photos/cat/a.jpg"),
        ("s3://bucket/photos", "../a.jpg", "s3://bucket/a.jpg"),
        ("memory://", "x/a.jpg", "memory://x/a.jpg"),
        ("file:///photos", "a.jpg", "file:///photos/a.jpg"),
        ("photos", "a.jpg", os.path.join("photos", "a.jpg")),
        ("s3://bucket", os.path.abspath("a.jpg"), os.path.abspath("a.jpg")),
    ],
)
def test_a_path_is_joined_to_a_folder_or_a_url(directory, path, expected):
    assert join_path(directory, path) == expected
