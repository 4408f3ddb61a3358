"""Configs files, and scripts that read them."""

import runpy
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parent.parent
# By script the class of its options.
SCRIPT_CONFIGS = runpy.run_path(str(PROJECT / "docs" / "make_options.py"))["SCRIPTS"]


def run_python(*arguments, cwd=PROJECT):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)
