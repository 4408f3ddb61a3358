"""Grad-CAM pictures, and the page that shows them."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import unicodedata
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import matplotlib
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from finetune.core.files import atomic_path, write_text
from finetune.data.images import place_image, resize_image
from finetune.evaluation.abstention import UNKNOWN, UNSURE
from finetune.evaluation.evaluation import Answers
from finetune.evaluation.explaining import Explained
from finetune.reporting.summaries import render_page

WRITABLE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
WRITERS = 2
PANELS_A_ROW = 6
# The widest row of panels in pixels: WebP allows 16,383, and several such pictures must fit into memory.
WIDEST = 10_000
# In pixels: a caption of less width has room for a few letters only.
LEAST_SIDE = 160
# Characters that Windows forbids in file names, and names that it reserves for devices.
FORBIDDEN = frozenset('<>:"/\\|?*')
RESERVED = frozenset({"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(10))})
# In bytes: systems allow 255 for a name, and a temporary file or a number needs some of them.
LONGEST_STEM = 200
FONT_PATH = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
INDEX_FILE = "index.html"
ANSWERED = "answered"


@functools.cache
def colour_table(colormap: str) -> np.ndarray:
    """Returns the RGB of each of 256 values, uint8 `(256, 3)`, of a colormap by OpenCV's name in lower case.

    OpenCV rebuilds this table in every call, which takes longer than the rest of a picture.
    """
    code = getattr(cv2, f"COLORMAP_{colormap.upper()}")
    return cv2.applyColorMap(np.arange(256, dtype=np.uint8), code)[:, 0, ::-1].copy()


def place_heatmap(
    heatmap: np.ndarray, photo_size: Sequence[int], image_size: Sequence[int] = (), resize_mode: str = "stretch"
) -> np.ndarray:
    """Resizes a heatmap of the network's input to the photo that the input was made from.

    Args:
        heatmap: `(h, w)` in `[0, 1]`, of any size.
        photo_size: `(height, width)`.
        image_size: `(height, width)` of the network's input; unused if photos are stretched.
        resize_mode: how the photo was resized to it.

    Returns:
        float32 `(height, width)` in `[0, 1]`; NaN in parts of the photo that the network did not see.
    """
    heatmap = heatmap.astype(np.float32)
    if resize_mode == "stretch":
        return cv2.resize(heatmap, photo_size[::-1])
    seen, filled = place_image(photo_size, image_size, resize_mode)
    placed = np.full(photo_size, np.nan, np.float32)
    placed[seen] = cv2.resize(cv2.resize(heatmap, image_size[::-1])[filled], placed[seen].shape[::-1])
    return placed


def overlay_heatmap(
    image: np.ndarray,
    heatmap: np.ndarray,
    opacity: float = 0.4,
    colormap: str = "jet",
    image_size: Sequence[int] = (),
    resize_mode: str = "stretch",
) -> np.ndarray:
    """Colours the part of a photo that the network saw by a heatmap.

    Args:
        image: uint8 RGB `(height, width, 3)`.
        heatmap: `(h, w)` in `[0, 1]`, of any size.
        opacity: of the colours, in `[0, 1]`.
        colormap: OpenCV's name, in lower case; jet is blue at 0 and red at 1.
        image_size: as `place_heatmap` takes it.
        resize_mode: as `place_heatmap` takes it.
    """
    placed = place_heatmap(heatmap, image.shape[:2], image_size, resize_mode)
    colours = colour_table(colormap)[np.uint8(255 * np.clip(np.nan_to_num(placed), 0, 1))]
    coloured = cv2.addWeighted(colours, opacity, image, 1 - opacity, 0)
    return np.where(np.isnan(placed)[..., None], image, coloured)


def write_caption(image: np.ndarray, caption: str) -> np.ndarray:
    """Adds a line of text in a bar below a uint8 RGB image.

    The caption is shortened to fit. Characters that DejaVu Sans lacks are shown as a box, control characters as `?`.
    """
    bar, width = max(18, image.shape[1] // 12), image.shape[1]
    font = load_font(round(bar * 0.7))
    # File names of some systems store an accent apart from its letter; the font has both as one character.
    text = unicodedata.normalize("NFC", caption)
    text = "".join(character if character.isprintable() else "?" for character in text[:width])
    while len(text) > 1 and font.getlength(text) > width - 4:
        text = text[:-1]
    canvas = PIL.Image.new("L", (width, bar), 255)
    PIL.ImageDraw.Draw(canvas).text((2, bar // 2), text, fill=0, font=font, anchor="lm")
    return np.concatenate([image, np.repeat(np.asarray(canvas)[..., None], 3, axis=2)])


@functools.cache
def load_font(size: int) -> PIL.ImageFont.FreeTypeFont:
    """Returns matplotlib's DejaVu Sans at a size in pixels."""
    return PIL.ImageFont.truetype(FONT_PATH, size)


def read_photo(path: str, longest_side: int, read: Callable[..., np.ndarray]) -> np.ndarray:
    """Reads a photo as uint8 RGB, shrunk to `longest_side` or enlarged to `LEAST_SIDE`, with its aspect ratio."""
    image = read(path, (longest_side, longest_side))
    longest = max(image.shape[:2])
    scale = min(max(longest, LEAST_SIDE), longest_side) / longest
    return resize_image(image, [max(1, round(side * scale)) for side in image.shape[:2]])


def draw_all(
    batches: Iterable[Explained], draw: Callable[[Explained], int], report: Callable[[int], object]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Writes the pictures of explained batches in threads, while the network runs.

    Args:
        batches: in order.
        draw: writes the pictures of a batch and returns how many, as `draw_batch` does.
        report: called with the number of pictures just written.

    Returns:
        The batches' probabilities, `(images, classes)`, and similarities, `(images,)` or None.
    """
    pending, probabilities, similarities = deque(), [], []
    with ThreadPoolExecutor(WRITERS) as pool:
        for batch in batches:
            probabilities.append(batch.probabilities)
            similarities.append(batch.similarities)
            pending.append(pool.submit(draw, batch))
            # A bounded backlog, so that memory does not grow if the network is faster than the disk.
            while len(pending) > WRITERS:
                report(pending.popleft().result())
        while pending:
            report(pending.popleft().result())
    return np.concatenate(probabilities), None if similarities[0] is None else np.concatenate(similarities)


def draw_batch(
    batch: Explained,
    files: Sequence[tuple[str, str]],
    class_names: Sequence[str],
    overlay: Callable[[np.ndarray, np.ndarray], np.ndarray],
    longest_side: int,
    read: Callable[..., np.ndarray],
) -> int:
    """Writes the pictures of a batch, each the photo next to its maps; returns how many.

    Args:
        batch: explained.
        files: the paths of each image and of its picture, for all images.
        class_names: in the model's order.
        overlay: colours a photo by a heatmap.
        longest_side: of a photo in its picture, in pixels; less if a row of panels would be wider than `WIDEST`.
        read: reads a photo, as `read_image` does.

    Raises:
        UserError: a photo can no longer be read, or a picture not be written.
    """
    for row, place in enumerate(batch.positions):
        (source, target), label = files[place], batch.labels[row]
        pairs = np.flatnonzero(batch.rows == row)
        widest = WIDEST // count_columns(1 + len(pairs))
        image = read_photo(source, min(longest_side, widest), read)
        true_positions = np.flatnonzero(label) if label.ndim else [label]
        panels = [(image, "true: " + ", ".join(class_names[position] for position in true_positions))]
        for pair in pairs:
            position = batch.class_indices[pair]
            # The number comes first, since a long name is cut.
            caption = f"{batch.probabilities[row, position]:.2f} {class_names[position]}"
            panels.append((overlay(image, batch.heatmaps[pair]), caption))
        if len(panels) == 1:
            panels.append((image, "no label above its threshold"))
        write_image(target, arrange(panels))
    return len(batch.positions)


def arrange(panels: Sequence[tuple[np.ndarray, str]]) -> np.ndarray:
    """Returns images with their captions in rows of cells of one size, uint8 RGB."""
    height = max(image.shape[0] for image, _ in panels)
    width = max(LEAST_SIDE, *(image.shape[1] for image, _ in panels))
    pictures = []
    for image, caption in panels:
        rest = width - image.shape[1]
        borders = (0, height - image.shape[0], rest // 2, rest - rest // 2)
        padded = cv2.copyMakeBorder(image, *borders, cv2.BORDER_CONSTANT, value=(255, 255, 255))
        pictures.append(write_caption(padded, caption))
    columns = count_columns(len(pictures))
    pictures += [np.full_like(pictures[0], 255)] * (-len(pictures) % columns)
    starts = range(0, len(pictures), columns)
    return np.concatenate([np.concatenate(pictures[start : start + columns], axis=1) for start in starts])


def count_columns(number: int) -> int:
    """Returns the number of panels in a row."""
    return min(number, max(PANELS_A_ROW, math.isqrt(number)))


def name_outputs(paths: list[str]) -> list[str]:
    """Returns a unique file name for each image: its path or URL below the common folder, joined by hyphens.

    Every system can write the names: forbidden characters become underscores, a long name is cut and ends in a digest,
    and a repeated name gets a number.
    """
    # The protocol of a URL becomes a folder.
    absolute = [os.path.abspath(path.replace("://", os.sep, 1)) for path in paths]
    common = os.path.commonpath([os.path.dirname(path) for path in absolute])
    names, taken = [], set()
    for path in absolute:
        stem, suffix = os.path.splitext(os.path.relpath(path, common).replace(os.sep, "-"))
        if suffix.lower() not in WRITABLE_SUFFIXES:
            stem, suffix = stem + suffix, ".png"
        stem = make_writable(stem)
        name, number = stem + suffix, 2
        # Some file systems ignore case.
        while name.casefold() in taken:
            name, number = f"{stem}_{number}{suffix}", number + 1
        taken.add(name.casefold())
        names.append(name)
    return names


def make_writable(stem: str) -> str:
    """Returns a file name without its ending that every system can write: not hidden, not reserved, not too long."""
    safe = "".join("_" if character in FORBIDDEN or not character.isprintable() else character for character in stem)
    if safe.startswith(".") or safe.split(".")[0].upper() in RESERVED:
        safe = f"_{safe}"
    if len(safe.encode()) <= LONGEST_STEM:
        return safe
    digest = hashlib.sha256(stem.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"{safe.encode()[: LONGEST_STEM - 17].decode(errors='ignore')}~{digest}"


def write_image(path: str, image: np.ndarray) -> None:
    """Writes a uint8 RGB image in the format of the path's ending."""
    with atomic_path(path) as temporary:
        encoded = cv2.imencode(os.path.splitext(path)[1], cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1]
        encoded.tofile(temporary)


def write_page(folder: str, pictures: Sequence[str], answers: Answers, title: str, summary: str) -> str:
    """Writes the page of a folder's pictures, atomically; it loads only these.

    Args:
        folder: of the pictures.
        pictures: their paths.
        answers: for their images.
        title: of the page.
        summary: the faithfulness of the maps, in sentences.

    Returns:
        The page's path.
    """
    cards, decision = _make_cards(pictures, answers), answers.decision
    path = os.path.join(folder, INDEX_FILE)
    page = render_page(
        "activations",
        ["report", "activations"],
        title=title,
        summary=summary,
        cards=cards,
        names=decision.class_names,
        multi_label=decision.multi_label,
        # The classes that occur; -1 means no label.
        choices={
            key: sorted({position for card in cards for position in card[key] or [-1]}) for key in ("true", "predicted")
        },
        given=_list_given(answers),
    )
    write_text(path, page)
    return path


def _list_given(answers: Answers) -> list[str]:
    """Returns the ways of answering between which the decision's rule tells; none without such a rule."""
    rule = answers.decision.abstention
    is_compared = answers.decision.calls_unknown and answers.similarities is not None
    refusals = [UNSURE] * (rule is not None and rule.thresholds is not None) + [UNKNOWN] * is_compared
    return [ANSWERED, *refusals] if refusals else []


def _make_cards(pictures: Sequence[str], answers: Answers) -> list[dict[str, Any]]:
    """Returns the page's cards; `true` and `predicted` are positions of classes, `given` is whether it is answered."""
    images, y_true, probabilities, decision, similarities = answers
    chosen, found = decision.choose(probabilities), decision.decide(probabilities, similarities)
    given = np.select([found.is_unknown, found.is_unsure], [UNKNOWN, UNSURE], ANSWERED).tolist()
    truth = y_true.astype(bool) if y_true.ndim == 2 else np.arange(chosen.shape[1]) == y_true[:, None]
    return [
        {
            "picture": urllib.parse.quote(os.path.basename(picture)),
            "path": image,
            "true": true.nonzero()[0].tolist(),
            "predicted": predicted.nonzero()[0].tolist(),
            "is_right": bool((true == predicted).all()),
            "confidence": confidence,
            "given": answer,
        }
        for picture, image, true, predicted, confidence, answer in zip(
            pictures, images, truth, chosen, decision.measure_confidence(probabilities).tolist(), given, strict=True
        )
    ]
