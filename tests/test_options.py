"""How options are declared and told."""

from config_files import PROJECT, run_python


def run_tiny_script(tmp_path, body):
    script = tmp_path / "tiny.py"
    script.write_text(
        f'"""A tiny script."""\nimport os, signal, sys\nsys.path.insert(0, {str(PROJECT)!r})\n'
        "from configs import Configs\nfrom finetune.options import UserError, run_script\n\n"
        f"def main(configs: Configs):\n    {body}\n\nrun_script(main)\n",
        encoding="utf-8",
    )
    return run_python(str(script), cwd=tmp_path)


def test_mistake_ends_in_its_message_alone_and_status_2(tmp_path):
    result = run_tiny_script(tmp_path, 'raise UserError("x is wrong. Mend it.")')
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "Error: x is wrong. Mend it.\n")


def test_bug_keeps_its_traceback(tmp_path):
    result = run_tiny_script(tmp_path, "return 1 / 0")
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback")
    assert "ZeroDivisionError" in result.stderr


def test_interrupt_ends_in_130_without_a_traceback(tmp_path):
    # A shell starts its background jobs with the signal ignored, and the tests may run in one.
    heeding = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    result = run_tiny_script(tmp_path, f"{heeding}; os.kill(os.getpid(), signal.SIGINT)")
    assert result.returncode == 130
    assert "Traceback" not in result.stderr


def test_interrupt_within_an_import_ends_in_one_line_whatever_the_library_makes_of_it(tmp_path):
    (tmp_path / "slow_library.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException as error:\n    raise ImportError('the library failed') from error\n"
    )
    # A shell starts its background jobs with the signal ignored, and the tests may run in one.
    heeding = "from finetune.options import interrupt; signal.signal(signal.SIGINT, interrupt)"
    result = run_tiny_script(tmp_path, f"{heeding}; import slow_library")
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "Interrupted.\n")


def test_script_that_succeeds_ends_in_0(tmp_path):
    result = run_tiny_script(tmp_path, "print(configs.batch_size)")
    assert (result.returncode, result.stdout, result.stderr) == (0, "16\n", "")
