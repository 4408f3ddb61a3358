"""Texts show what cannot be seen."""

from finetune.texts import show


def test_hidden_characters_are_written_out():
    assert show("é 花 👩‍🚀") == "é 花 👩‍🚀"
    assert show("\t\x7f\u2066") == "\\t\\x7f\\u2066"
