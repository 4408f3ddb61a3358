"""Text output and progress, in a terminal and elsewhere."""

import os
import pty
import subprocess
import sys
import termios

import pytest
from config_files import PROJECT

from finetune.core import texts as progress
from finetune.core.texts import ProgressLines, begin_line, choose_keras_verbosity, show, show_count, show_progress

CODE = (
    f"import sys; sys.path.insert(0, {str(PROJECT)!r})\n"
    "from finetune.core.texts import begin_line, choose_keras_verbosity, show_progress\n"
    "with show_progress(4, 'Checking images') as shown:\n"
    "    [shown.update() for _ in range(4)]\n"
    "print(repr(begin_line()), choose_keras_verbosity())\n"
)
COMMAND = [sys.executable, "-c", CODE]


def run_in_terminal(command, stdout=None, **environment):
    """Returns the exit status and the terminal output of a program; stdout may be a file."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    environment = {"TERM": "xterm"} | environment
    streams = {"stdin": theirs, "stdout": stdout or theirs, "stderr": theirs}
    process = subprocess.Popen(command, **streams, env=os.environ | environment)
    os.close(theirs)
    shown = b""
    # Linux reports the end of a terminal as an error.
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:
        pass
    os.close(ours)
    return process.wait(), shown.decode()


def test_terminal_has_a_bar():
    status, shown = run_in_terminal(COMMAND)
    assert status == 0
    assert "\rChecking images" in shown
    assert "4/4" in shown
    assert shown.endswith("'\\n' 1\r\n")


def test_dumb_terminal_has_no_bar():
    assert run_in_terminal(COMMAND, TERM="dumb") == (0, "'' 2\r\n")


def test_pipe_shows_no_short_tasks():
    result = subprocess.run(COMMAND, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "'' 2\n", "")


def test_streams_are_checked_separately(tmp_path):
    with open(tmp_path / "log", "wb") as log:
        status, shown = run_in_terminal(COMMAND, stdout=log)
    assert (status, "4/4" in shown) == (0, True)
    assert (tmp_path / "log").read_bytes() == b"'' 2\n"


def test_long_task_prints_a_line_per_minute(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with show_progress(500, "Predicting", initial=100) as shown:
        assert isinstance(shown, ProgressLines)
        for _ in range(4):
            now[0] += 31
            shown.update(100)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "Predicting: 300 of 500 after 1 min 2 s\nPredicting: 500 of 500 after 2 min 4 s\n"


def test_nothing_is_shown_without_a_title():
    status, shown = run_in_terminal([sys.executable, "-c", CODE.replace("Checking images", "")])
    assert (status, shown) == (0, "'\\n' 1\r\n")


@pytest.mark.parametrize(("is_terminal", "begin", "verbosity"), [(True, "\n", 1), (False, "", 2)])
def test_keras_settings_depend_on_the_terminal(monkeypatch, is_terminal, begin, verbosity):
    monkeypatch.setattr(progress, "draws_bars", lambda stream: is_terminal)
    assert (begin_line(), choose_keras_verbosity()) == (begin, verbosity)


def test_hidden_characters_are_escaped():
    assert show("é 花 👩‍🚀") == "é 花 👩‍🚀"
    assert show("\t\x7f\u2066") == "\\t\\x7f\\u2066"


def test_counts_have_plurals():
    assert [show_count(number, "image") for number in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
