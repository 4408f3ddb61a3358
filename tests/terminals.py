"""Running a program in a terminal."""

import os
import pty
import subprocess
import termios


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
