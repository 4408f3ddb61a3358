"""Configs files, and scripts that read them."""

import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parent.parent


def run_python(*arguments, cwd=PROJECT):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)
