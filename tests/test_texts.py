"""Texts show what cannot be seen."""

from finetune.texts import show, show_count


def test_hidden_characters_are_written_out():
    assert show("é 花 👩‍🚀") == "é 花 👩‍🚀"
    assert show("\t\x7f\u2066") == "\\t\\x7f\\u2066"


def test_one_thing_is_no_plural():
    assert [show_count(number, "image") for number in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
