"""The options of each script, and running Python."""

import runpy
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parent.parent
# The class of options of each script.
SCRIPT_CONFIGS = runpy.run_path(str(PROJECT / "docs" / "make_options.py"))["SCRIPTS"]


def run_python(*arguments, cwd=PROJECT):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)
