"""Which messages of the libraries are shown."""

import os
import re
import subprocess
import sys

import pytest
from config_files import PROJECT
from small_runs import options_of, tables  # noqa: F401

from finetune.core.files import write_json

NOTICE = "I0000 00:00:1795772722.382590   28722 port.cc:153] oneDNN custom operations are on.\n"


def run_code(tmp_path, code, *flags, library="", is_script=True, **environment):
    """Runs code in a script's main, or alone, beside a library that writes to stderr as C++ code does."""
    (tmp_path / "library.py").write_text(f"import os, warnings\nos.write(2, {NOTICE!r}.encode())\n{library}\n")
    start = f"import os, sys, warnings\nsys.path.insert(1, {str(PROJECT)!r})\nfrom finetune.core.quiet import *\n"
    if is_script:
        start += "from configs import Configs\nfrom finetune.core.scripts import run_script\n"
        code = f"def main(configs: Configs):\n    {code}\n\nrun_script(main)"
    (tmp_path / "tiny.py").write_text(f'"""A tiny script."""\n{start}{code}\n')
    clean = {name: value for name, value in os.environ.items() if name not in ("TF_CPP_MIN_LOG_LEVEL", "PYTHONPATH")}
    command = [sys.executable, str(tmp_path / "tiny.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=clean | environment)


LOADING = "with hiding_stderr(): import library"


def test_loading_is_quiet_and_later_output_is_shown(tmp_path):
    result = run_code(tmp_path, f"\n    {LOADING}\n    os.write(2, b'later\\n')", library="warnings.warn('old')")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "later\n")


@pytest.mark.parametrize(
    ("flags", "environment", "shown"),
    [
        (("--verbose", "true"), {}, (NOTICE, "UserWarning: old")),
        ((), {"TF_CPP_MIN_LOG_LEVEL": "0"}, (NOTICE,)),
        ((), {"PYTHONWARNINGS": "default"}, ("UserWarning: old",)),
    ],
)
def test_what_the_user_asks_for_is_shown(tmp_path, flags, environment, shown):
    result = run_code(tmp_path, "import library", *flags, library="warnings.warn('old')", **environment)
    loaded = run_code(tmp_path, f"\n    {LOADING}", *flags, library="warnings.warn('old')", **environment)
    assert all(text in result.stderr for text in shown)
    assert NOTICE not in shown or NOTICE in loaded.stderr


def test_program_other_than_a_script_is_left_alone(tmp_path):
    assert run_code(tmp_path, LOADING, is_script=False).stderr == NOTICE


def test_warning_turned_into_an_error_stays_one(tmp_path):
    code = "warnings.simplefilter('error', ResourceWarning)\nsilence_libraries(False)\nwarnings.warn('a')\n"
    result = run_code(tmp_path, code + "warnings.warn('b', ResourceWarning)", is_script=False)
    assert result.returncode == 1
    assert result.stderr.endswith("ResourceWarning: b\n")
    assert "UserWarning" not in result.stderr


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        ("raise ImportError('libfoo.so is missing')", 1, (NOTICE, "Traceback", "ImportError: libfoo.so is missing")),
        ("os.abort()", -6, ("Fatal Python error: Aborted", "library.py")),
        ("os.kill(os.getpid(), 2)", 130, ("Interrupted.\n",)),
    ],
)
def test_failed_loading_says_why(tmp_path, fault, status, words):
    # Background jobs of a shell ignore SIGINT, and the tests may run in one.
    heeding = "import signal; from finetune.core.scripts import interrupt; signal.signal(signal.SIGINT, interrupt)"
    result = run_code(tmp_path, f"{heeding}\n    {LOADING}", library=fault)
    assert result.returncode == status
    assert all(text in result.stderr for text in words)


@pytest.mark.slow
def test_run_into_a_pipe_prints_a_line_per_epoch(tables, tmp_path):
    options = options_of(tables, tmp_path / "run", num_epochs=2, show_model_summary=True)
    write_json(str(tmp_path / "small.json"), options)
    command = [sys.executable, str(PROJECT / "train.py"), "--configs", str(tmp_path / "small.json")]
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    result = subprocess.run(command, capture_output=True, timeout=300, env=environment)
    assert (result.returncode, result.stderr) == (0, b"")
    shown = result.stdout.decode()
    assert {"\x1b", "\r", "\b"}.isdisjoint(shown)
    assert re.fullmatch(r"Running on .+\.", shown.splitlines()[0])
    assert len([line for line in shown.splitlines() if line.startswith("7/7 - ")]) == 2
    assert "image_classifier" in shown
