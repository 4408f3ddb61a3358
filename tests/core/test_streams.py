"""Failing output does not end a program: unknown characters are escaped, and lost output is ignored."""

import io
import os
import pty
import re
import signal
import subprocess
import sys

import pandas as pd
import pytest
from config_files import PROJECT
from small_runs import options_of, start, tables  # noqa: F401  # noqa: F401

import split_train_test
from finetune.core.files import write_json
from finetune.core.scripts import LastingStream, protecting_output
from finetune.core.texts import choose_keras_verbosity, show_progress
from split_train_test import SplitConfigs

posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no such terminals and signals")

# A script that prints more than a pipe holds, writes its result to a file, and prints again.
SCRIPT = f"""\
import contextlib, os, sys
sys.path.insert(1, {str(PROJECT)!r})
from configs import Configs
from finetune.core.scripts import run_script

def main(configs: Configs):
    first = open("first", "wb", buffering=0)
    for line in range(20_000):
        print("line", line)
    print("on stderr", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        os.write(2, b"of a library's C++")
    first.write(b"result")
    print("end")

run_script(main)
"""


@pytest.fixture
def command(tmp_path):
    (tmp_path / "tiny.py").write_text(SCRIPT)
    return [sys.executable, str(tmp_path / "tiny.py")]


def test_characters_that_the_output_lacks_are_escaped():
    output = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(output, encoding="cp1252", newline=""))
    print("été", "蚂蚁", "蜜蜂🐝", "━━", "\udcff", file=stream, flush=True)
    assert output.getvalue() == b"\xe9t\xe9 \\u8682\\u8681 \\u871c\\u8702\\U0001f41d == \\udcff\n"


class Broken(io.StringIO):
    """A closed window, which raises errors of its own."""

    def write(self, text):
        raise RuntimeError("the window is closed")

    flush = isatty = write


def test_missing_closed_and_broken_streams_show_nothing(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed, Broken()):
        lasting = LastingStream(stream)
        assert lasting.write("text") == 4
        print("text", file=lasting, flush=True)
        assert not lasting.isatty()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert choose_keras_verbosity() == 2
    with show_progress(2, "Predicting") as shown:
        shown.update()


def test_streams_are_restored(monkeypatch, capsys):
    @protecting_output()
    def main():
        print("seen")
        sys.stdout.flush()

    main()
    assert capsys.readouterr().out == "seen\n"
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", Broken())
    before = sys.stderr
    main()
    assert sys.stdout is None
    assert sys.stderr is before


# Programs


@posix
@pytest.mark.parametrize("redirection", ["| head -2 >shown", "2>&-", "<&- >&- 2>&-", ">/dev/full"])
def test_lost_output_does_no_harm(tmp_path, command, redirection):
    line = f"set -o pipefail; {sys.executable} tiny.py {redirection}"
    result = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr
    # Nothing else is in the file, although its descriptor may be that of a standard stream.
    assert (tmp_path / "first").read_bytes() == b"result"
    assert b"Traceback" not in result.stderr
    assert b"BrokenPipe" not in result.stderr
    if "head" in redirection:
        assert (tmp_path / "shown").read_text() == "line 0\nline 1\n"


@posix
def test_closed_terminal_of_a_disowned_program_does_no_harm(tmp_path, command):
    ours, theirs = pty.openpty()
    disown = f"import os, signal; os.setsid(); signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv({command[0]!r}"
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    program = subprocess.Popen([sys.executable, "-c", f"{disown}, {command!r})"], cwd=tmp_path, **streams)
    os.close(theirs)
    assert os.read(ours, 4) == b"line"
    os.close(ours)
    assert program.wait(300) == 0
    assert (tmp_path / "first").read_bytes() == b"result"


# Scripts


def run(script, *arguments, cwd, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LC_", "LANG"))}
    command = [sys.executable, str(PROJECT / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, timeout=300, env=clean | environment)


ASCII_NAMES = {"LC_ALL": "C", "PYTHONUTF8": "0"}


@posix
@pytest.mark.slow
@pytest.mark.parametrize("environment", [ASCII_NAMES, {"PYTHONIOENCODING": "cp1252"}])
def test_names_of_all_scripts_work_in_any_environment(photo_folder, tmp_path, environment):
    names = {"blue": "蚂蚁", "green": "蜜蜂🐝", "red": "été"}
    for colour, name in names.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "photos" / name / f"фото {number}.jpg").symlink_to(photo_folder / colour / f"{number:02d}.jpg")
    made = run(
        "make_csv_from_folders.py", "--folder_path", "photos", "--write_path", "é.csv", cwd=tmp_path, **environment
    )
    assert (made.returncode, made.stderr) == (0, b"")
    split = run(
        "split_train_test.py", "--csv_path", "é.csv", "--test_split_fraction", 0.25, cwd=tmp_path, **environment
    )
    assert (split.returncode, split.stderr) == (0, b"")
    training, testing = (pd.read_csv(tmp_path / f"{name}_set.csv") for name in ("training", "testing"))
    assert sorted(training["class"]) == sorted([*names.values()] * 3)
    assert sorted(testing["class"]) == sorted(names.values())
    assert all((tmp_path / path).exists() for path in (*training["path"], *testing["path"]))
    expected = "蚂蚁" if environment is ASCII_NAMES else r"\u8682\u8681"
    assert expected.encode() in split.stdout


@posix
def test_python_option_for_ascii_names_causes_no_endless_restarts(tmp_path, command):
    line = [command[0], "-X", "utf8=0", command[1]]
    result = subprocess.run(
        line, cwd=tmp_path, capture_output=True, timeout=300, env={"LC_ALL": "C", "PYTHONUTF8": "0"}
    )
    assert (result.returncode, (tmp_path / "first").read_bytes()) == (0, b"result")


@posix
@pytest.mark.slow
def test_warning_about_ascii_names_in_own_code(tmp_path):
    (tmp_path / "photos" / "été").mkdir(parents=True)
    (tmp_path / "photos" / "été" / "1.jpg").touch()
    (tmp_path / "own.py").write_text(
        f"import sys\nsys.path.insert(1, {str(PROJECT)!r})\nfrom make_csv_from_folders import FolderConfigs, main\n"
        "main(FolderConfigs(folder_path='photos'))\n"
    )
    command = [sys.executable, "own.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=ASCII_NAMES, timeout=300)
    first, *_, last = result.stderr.splitlines()
    assert all("ASCII" in line and "PYTHONUTF8=1" in line for line in (first, last))
    assert first.startswith("Warning: ")


def test_tables_are_written_before_anything_is_printed(photo_folder, tmp_path, monkeypatch):
    rows = [(str(path), path.parent.name) for path in sorted(photo_folder.glob("*/*.jpg"))]
    pd.DataFrame(rows, columns=["path", "class"]).to_csv(tmp_path / "all.csv", index=False)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", interrupt)
    with pytest.raises(KeyboardInterrupt):
        split_train_test.main(SplitConfigs(csv_path=str(tmp_path / "all.csv")))
    assert {path.name for path in tmp_path.iterdir()} == {"all.csv", "training_set.csv", "testing_set.csv"}


# Real runs


@pytest.mark.slow
def test_run_of_own_code_needs_no_working_streams(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken())
    monkeypatch.setattr(sys, "stderr", None)
    results = start(**options_of(tables, tmp_path / "run", num_epochs=2))
    assert sys.stderr is None
    assert results["epoch"] == 2
    assert pd.read_csv(tmp_path / "run" / "training_log.csv")["epoch"].tolist() == [1, 2]


@posix
@pytest.mark.slow
def test_run_whose_terminal_closes_ends_with_a_checkpoint(tables, tmp_path):
    options = options_of(tables, tmp_path / "run", num_epochs=1000, generator_workers=1)
    write_json(str(tmp_path / "small.json"), options)
    command = [sys.executable, str(PROJECT / "train.py"), "--configs", str(tmp_path / "small.json")]
    ours, theirs = pty.openpty()
    lead = "import fcntl, os, signal, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    # The tests may run with nohup.
    lead += f"signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execv({command[0]!r}"
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    training = subprocess.Popen([sys.executable, "-c", f"{lead}, {command!r})"], **streams)
    os.close(theirs)
    shown = b""
    while b"Epoch 2/1000" not in shown:
        shown += os.read(ours, 65536)
    os.close(ours)
    assert shown.startswith(b"Running on ")
    assert "━".encode() in shown
    assert (b"\b" in shown) or (b"\r" in shown.replace(b"\r\n", b""))
    assert b"InitializeLog" not in shown
    assert training.wait(300) == 128 + signal.SIGHUP
    assert (tmp_path / "run" / "latest_model.keras").exists()
    log = pd.read_csv(tmp_path / "run" / "training_log.csv")
    assert log["epoch"].tolist() == [*range(1, len(log) + 1)]


NOTICE = "I0000 00:00:1795772722.382590   28722 port.cc:153] oneDNN custom operations are on.\n"


def run_code(tmp_path, code, *flags, library="", is_script=True, **environment):
    """Runs code in a script's main, or alone, beside a library that writes to stderr as C++ code does."""
    (tmp_path / "library.py").write_text(f"import os, warnings\nos.write(2, {NOTICE!r}.encode())\n{library}\n")
    start = f"import os, sys, warnings\nsys.path.insert(1, {str(PROJECT)!r})\nfrom finetune.core.scripts import *\n"
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
    assert len([line for line in shown.splitlines() if line.startswith("9/9 - ")]) == 2
    assert "image_classifier" in shown
