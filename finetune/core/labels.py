"""Unicode clean-up of labels, so that labels that look the same are equal."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from finetune.core.texts import join_names, show_count

LABEL_SEPARATOR = "$"
# Control characters and the code points that Unicode calls default ignorable and that no script needs: soft hyphen,
# zero-width spaces, directional marks, fillers, emoji presentation selectors.
INVISIBLE = re.compile(
    "[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe0e\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e001f\U000e0080-\U000e00ff\U000e01f0-\U000e0fff]"
)
# Joiners, variation selectors and the letters of a region's flag: each changes the look of some characters only.
CONDITIONAL = re.compile("[\u200c\u200d]+|[\u180b-\u180f\ufe00-\ufe0d\U000e0100-\U000e01ef]+|[\U000e0020-\U000e007f]+")
JOINER, NON_JOINER = "\u200d", "\u200c"
VIRAMA = 9
EMOJI_CATEGORIES = ("So", "Sk", "Sm")
CURSIVE_SCRIPTS = ("ARABIC", "SYRIAC", "MONGOLIAN", "NKO", "MANDAIC", "ADLAM", "HANIFI", "PHAGS-PA", "SOGDIAN")
VARIED_SCRIPTS = ("MONGOLIAN", "CJK", "MYANMAR", "PHAGS-PA", "MANICHAEAN", "KHITAN")
# Arabic letters that never join the next letter (Unicode's ArabicShaping.txt).
RIGHT_JOINING = re.compile(
    "[\u0622-\u0625\u0627\u0629\u062f-\u0632\u0648\u0671-\u0673\u0675-\u0677\u0688-\u0699\u06c0\u06c3-\u06cb\u06cd"
    "\u06cf\u06d2\u06d3\u06d5\u06ee\u06ef]"
)


@functools.lru_cache(maxsize=100_000)
def clean_label(label: str) -> str:
    """Returns a label in NFC without invisible characters, but with joiners and selectors that change how it looks."""
    if label.isascii() and not INVISIBLE.search(label):
        return label
    text = unicodedata.normalize("NFC", INVISIBLE.sub("", label))
    # Removing a character gives others new neighbours.
    while (shorter := unicodedata.normalize("NFC", CONDITIONAL.sub(_keep_needed, text))) != text:
        text = shorter
    return text


def _keep_needed(match: re.Match[str]) -> str:
    """Returns the first of some invisible characters if it changes how its neighbours look; else nothing."""
    found, before, after = match[0], match.string[: match.start()], match.string[match.end() :]
    previous = before[-1:]
    if found[0] in (JOINER, NON_JOINER):
        return found[0] if _needs_joiner(found[0], before, after) else ""
    if "\U000e0020" <= found[0] <= "\U000e007f":
        return found if _category(previous) == "So" else ""
    is_letter = _category(previous) == "Lo" and _has_script(previous, VARIED_SCRIPTS)
    return found[0] if is_letter or _category(previous) == "Sm" else ""


def _needs_joiner(joiner: str, before: str, after: str) -> bool:
    """Returns whether a joiner changes how its neighbours look (Unicode Standard, section 23.2)."""
    if any(unicodedata.combining(mark) == VIRAMA for mark in before[-1:] + after[:1]):
        return joiner == JOINER or bool(after.strip())
    left = next((one for one in reversed(before) if _category(one) != "Mn"), "")
    right = next((one for one in after if _category(one) != "Mn"), "")
    if joiner == JOINER and _category(left) in EMOJI_CATEGORIES and _category(right) in EMOJI_CATEGORIES:
        return True
    joins_right = _is_cursive(left) and not RIGHT_JOINING.match(left)
    # Between two letters that join anyway, only the non-joiner has an effect.
    return joins_right and _is_cursive(right) if joiner == NON_JOINER else joins_right != _is_cursive(right)


def _is_cursive(character: str) -> bool:
    return _category(character)[:1] == "L" and _has_script(character, CURSIVE_SCRIPTS)


def _category(character: str) -> str:
    return unicodedata.category(character) if character else ""


def _has_script(character: str, scripts: tuple[str, ...]) -> bool:
    return bool(character) and unicodedata.name(character, "").startswith(scripts)


def clean_labels(labels: Sequence[str], source: str) -> list[str]:
    """Cleans labels with `clean_label`, and prints the changed ones in one line.

    Args:
        labels: one per image, with one or several class names.
        source: the file or folder that contains them, for the line.
    """
    cleaned = [clean_label(label) for label in labels]
    differing = (label for label, other in zip(labels, cleaned, strict=True) if label != other)
    names = (name for label in differing for name in label.split(LABEL_SEPARATOR))
    if changed := Counter(name for name in names if name != clean_label(name)):
        shown = [
            f"'{show_difference(name)}' ({show_count(count, 'image')}) as '{clean_label(name)}'"
            for name, count in changed.most_common()
        ]
        _print_once(f"{source}: read the label {join_names(shown)}, without invisible characters, in Unicode's NFC.")
    return cleaned


@functools.cache
def _print_once(line: str) -> None:
    # A script reads a table several times.
    print(line)


def look_the_same(first: object, second: object) -> bool:
    """Returns whether two values are equal; lists of names are cleaned first."""
    if first == second or not (isinstance(first, list) and isinstance(second, list)):
        return first == second
    plain = [[clean_label(one) if isinstance(one, str) else one for one in names] for names in (first, second)]
    return plain[0] == plain[1]


def show_difference(label: str) -> str:
    """Returns a label with escapes for the characters that `clean_label` removes."""
    kept = {*clean_label(label)}
    return "".join(one if one in kept else one.encode("unicode_escape").decode() for one in label)
