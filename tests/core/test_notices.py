"""What of the libraries' own output is shown."""

import io
import os
import re
import subprocess
import sys

import pytest
from config_files import PROJECT
from small_runs import options_of, tables  # noqa: F401
from terminals import run_in_terminal

from finetune.core.files import write_json
from finetune.core.notices import leave_out_notices

NOTICES = """\
WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
I0000 00:00:1795772722.382590   28722 port.cc:153] oneDNN custom operations are on.
I1127 09:45:22.382590   28722 cudart_stub.cc:31] Could not find cuda drivers on your machine, GPU will not be used.
W0000 00:00:1795772722.382590   28722 gpu_device.cc:2341] Cannot dlopen some GPU libraries.
To enable the following instructions: AVX2 FMA, in other operations, rebuild TensorFlow
2026-11-27 09:45:22.123456: I tensorflow/core/util/port.cc:113] oneDNN custom operations are on.
E0000 00:00:1795772738.93 28722 cuda_platform.cc:52] failed call to cuInit: INTERNAL: CUDA error: Failed call to \
cuInit: UNKNOWN ERROR (303)
INFO: Created TensorFlow Lite XNNPACK delegate for CPU.
"""
ERRORS = """\
E0000 00:00:1795772738.93 28722 cuda_platform.cc:52] failed call to cuInit: INTERNAL: CUDA error: Failed call to \
cuInit: UNKNOWN ERROR (803)
F0000 00:00:1795772738.93 28722 cpu_feature_guard.cc:47] The TensorFlow library was compiled to use AVX instructions
2026-11-27 09:45:22.123456: E tensorflow/core/util/port.cc:113] It is broken.
Traceback (most recent call last):
Error: Index 5 is out of range.
Segmentation fault
"""
ESCAPE = "\x1b"


def run_code(tmp_path, code, *flags, **environment):
    """Runs code as the main of a script, with a library called tensorflow beside it that `library.py` holds."""
    script = tmp_path / "tiny.py"
    script.write_text(
        f'"""A tiny script."""\nimport os, sys, warnings\nsys.path.insert(1, {str(PROJECT)!r})\n'
        "from configs import Configs\nfrom finetune.core.notices import hiding_notices\n"
        f"from finetune.core.options import UserError, run_script\n\ndef main(configs: Configs):\n    {code}\n\n"
        "run_script(main)\n",
        encoding="utf-8",
    )
    clean = {name: value for name, value in os.environ.items() if name not in ("TF_CPP_MIN_LOG_LEVEL", "PYTHONPATH")}
    command = [sys.executable, str(script), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=clean | environment)


def add_library(tmp_path, code):
    (tmp_path / "tensorflow.py").write_text(f"import os, warnings\nfor line in {NOTICES.splitlines()!r}:\n    ")
    with open(tmp_path / "tensorflow.py", "a") as file:
        file.write(f"os.write(2, line.encode() + b'\\n')\n{code}\n")


@pytest.mark.parametrize(
    ("text", "left"), [(NOTICES, ""), (ERRORS, ERRORS), (NOTICES + ERRORS + "cut", ERRORS + "cut")]
)
def test_notices_are_left_out_and_errors_are_not(text, left):
    target = io.BytesIO()
    leave_out_notices(io.BytesIO(text.encode()), target)
    assert target.getvalue().decode() == left


def test_loading_is_quiet_and_what_is_written_later_is_not_touched(tmp_path):
    add_library(tmp_path, "os.write(2, b'Real error\\n')")
    result = run_code(tmp_path, "import tensorflow; os.write(2, b'I0000 00:00:1 later\\n')")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "Real error\nI0000 00:00:1 later\n")


def test_verbose_shows_all(tmp_path):
    add_library(tmp_path, "warnings.warn('old')")
    result = run_code(tmp_path, "import tensorflow", "--verbose", "true")
    assert result.stderr.startswith(NOTICES)
    assert "UserWarning: old" in result.stderr


def test_own_settings_of_the_user_win(tmp_path):
    add_library(tmp_path, "warnings.warn('old')")
    assert run_code(tmp_path, "import tensorflow").stderr == ""
    assert run_code(tmp_path, "import tensorflow", TF_CPP_MIN_LOG_LEVEL="0").stderr == NOTICES
    assert "UserWarning: old" in run_code(tmp_path, "import tensorflow", PYTHONWARNINGS="default").stderr


def test_warning_that_is_made_an_error_stays_one(tmp_path):
    code = "warnings.simplefilter('error', ResourceWarning); warnings.warn('a'); warnings.warn('b', ResourceWarning)"
    add_library(tmp_path, "")
    before = f"import warnings\n{code.split(';')[0]}"
    (tmp_path / "early.py").write_text(before)
    result = run_code(tmp_path, code.split("; ", 1)[1])
    assert result.stderr == ""
    script = (tmp_path / "tiny.py").read_text().replace("import os, sys", "import early, os, sys")
    (tmp_path / "tiny.py").write_text(script)
    failed = subprocess.run([sys.executable, str(tmp_path / "tiny.py")], capture_output=True, text=True)
    assert failed.stderr.endswith("ResourceWarning: b\n")
    assert failed.returncode == 1


@pytest.mark.parametrize("code", ["import tensorflow", "\n    with hiding_notices():\n        import tensorflow"])
def test_crash_while_loading_tells_its_last_words(tmp_path, code):
    add_library(tmp_path, "os.write(2, b'F0000 00:00:1 The CPU has no AVX.\\n'); os.abort()")
    result = run_code(tmp_path, code)
    assert result.returncode == -6
    assert result.stderr == "F0000 00:00:1 The CPU has no AVX.\n"


def test_failed_import_keeps_its_traceback(tmp_path):
    add_library(tmp_path, "raise ImportError('libfoo.so is missing')")
    result = run_code(tmp_path, "import tensorflow")
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback")
    assert result.stderr.endswith("ImportError: libfoo.so is missing\n")


def test_program_that_was_started_meanwhile_holds_nothing_up(tmp_path):
    add_library(tmp_path, "import subprocess; subprocess.Popen(['sleep', '1'])")
    result = run_code(
        tmp_path, "import finetune.core.notices as n; n.PATIENCE = 0.1; import tensorflow; print('on', flush=1)"
    )
    assert (result.returncode, result.stdout) == (0, "on\n")


def test_missing_library_is_told_as_ever(tmp_path):
    result = run_code(tmp_path, "sys.path[:] = [sys.path[1]]; sys.path_importer_cache.clear(); import tensorflow")
    assert "ModuleNotFoundError" in result.stderr


def test_program_that_is_no_script_is_left_alone(tmp_path):
    add_library(tmp_path, "")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(PROJECT)!r}]; import finetune.core.options, tensorflow"
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stderr == NOTICES


# Real runs


def command_of(tables, folder, **options):
    write_json(str(folder / "small.json"), options_of(tables, folder / "run", num_epochs=2, **options))
    return [sys.executable, str(PROJECT / "train.py"), "--configs", str(folder / "small.json")]


@pytest.mark.slow
def test_run_into_a_pipe_is_a_line_an_epoch_and_nothing_else(tables, tmp_path):
    command = command_of(tables, tmp_path, show_model_summary=True)
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    result = subprocess.run(command, capture_output=True, timeout=300, env=environment)
    assert (result.returncode, result.stderr) == (0, b"")
    shown = result.stdout.decode()
    assert {ESCAPE, "\r", "\b"}.isdisjoint(shown)
    assert re.fullmatch(r"Running on .+\.", shown.splitlines()[0])
    assert len([line for line in shown.splitlines() if line.startswith("7/7 - ")]) == 2
    assert "image_classifier" in shown


@pytest.mark.slow
def test_run_in_a_terminal_draws_a_bar(tables, tmp_path):
    status, shown = run_in_terminal(command_of(tables, tmp_path))
    assert status == 0, shown
    assert re.search(r"Running on .+\.", shown.splitlines()[0])
    assert "7/7" in shown
    assert "━" in shown
    assert ("\b" in shown) or ("\r" in shown)
    assert "InitializeLog" not in shown
