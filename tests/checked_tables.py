"""Tables of small photos, and what the data check finds in them."""

import os

import pytest
from corpus import build_corpus, encode, photo

from configs import Configs
from finetune.data.data_check import check_data
from finetune.data.stores import is_url
from finetune.data.tables import ImageTable

# What full checking finds in each file of the corpus; quick checking does not see into the pixels of `DEEP`.
EXPECTED = {
    "missing": ["missing"],
    "folder": ["missing"],
    "empty": ["empty"],
    **{name: ["not_an_image"] for name in ("text", "html", "git_lfs", "noise")},
    **{name: ["unreadable"] for name in ("header_only_png", "jpeg_start_only", "damaged_png")},
    **{name: ["truncated"] for name in ("truncated_gif", "truncated_tiff")},
    **{name: ["truncated"] for name in ("truncated_jpeg", "truncated_progressive", "zero_filled_jpeg")},
    **{name: ["truncated"] for name in ("truncated_png", "truncated_webp", "truncated_bmp")},
    **{name: ["too_many_pixels"] for name in ("bomb_png", "bomb_jpeg", "bomb_gif", "bomb_bmp")},
    **{name: ["wrong_extension"] for name in ("png_named_jpg", "jpeg_named_png")},
    **{name: ["rotated"] for name in ("rotated_jpeg", "rotated_png", "rotated_tiff", "rotated_webp")},
    **{name: ["animated"] for name in ("animated_gif", "animated_webp", "animated_png", "pages_tiff")},
    **{name: ["deep"] for name in ("deep_png", "deep_grey_png")},
    "deep_alpha_png": ["deep", "alpha"],
    **{name: ["cmyk"] for name in ("cmyk_jpeg", "cmyk_tiff")},
    **{name: ["alpha"] for name in ("alpha_png", "alpha_webp", "grey_alpha_png")},
    **{name: ["unreadable"] for name in ("cut_with_mark_jpeg", "zeroed_jpeg", "random_jpeg", "missing_part_jpeg")},
    **{name: ["unsupported"] for name in ("deep_jpeg", "vector")},
    "wave": ["not_an_image"],
    "alpha_gif": ["alpha"],
    "twelve_bits_png": ["deep", "nearly_uniform"],
    "palette_png": ["palette"],
    "palette_alpha_png": ["palette", "alpha"],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build_corpus(tmp_path_factory.mktemp("corpus"))


def table_of(rows, set_name="training", folder=""):
    """Makes a table of (path, label) rows."""
    paths, labels = zip(*rows, strict=True)
    files = [os.path.normpath(os.path.join(folder, path)) if path.strip() else "" for path in paths]
    files = [path if is_url(path) else file for path, file in zip(paths, files, strict=True)]
    return ImageTable(set_name, f"{set_name}.csv", list(paths), files, list(labels))


def check(*tables, multi_label=False, mode="quick", **options):
    """Returns what checking tables finds; no image is too small, unless a size is given."""
    configs = Configs(**{"image_target_size": (1, 1, 3)} | options)
    return check_data(tables, configs, multi_label, mode).findings


def write_photo(path, seed, **options):
    path.write_bytes(encode("JPEG", photo(seed), **options))
    return str(path)
