"""Processes that start with TensorFlow loaded, which takes most of the time of a short run."""

import atexit
import multiprocessing
import os
import sys
import traceback

LOADED = multiprocessing.get_context("forkserver")
LOADED.set_forkserver_preload(["finetune.training.training", "finetune.reporting.model_card"])


def _run(target, arguments, paths, environment):
    """Calls a function as a script's interpreter would: outputs, exit status, and functions of `atexit`."""
    for descriptor, path in enumerate(paths, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.update(environment)
    status = 0
    try:
        target(*arguments)
    except SystemExit as end:
        status = end.code or 0
    except BaseException as error:
        sys.last_type, status = type(error), 130 if isinstance(error, KeyboardInterrupt) else 1
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    atexit._run_exitfuncs()
    os._exit(status)


class LoadedProcess:
    """A process that calls a function of a module, with the interface of `subprocess.Popen`.

    Args:
        path: of its outputs, without their endings.
        target: the function.
        arguments: of the function.
        environment: variables to set.
    """

    def __init__(self, path, target, *arguments, **environment):
        self.paths = [f"{path}.out", f"{path}.err"]
        self.process = LOADED.Process(target=_run, args=(target, arguments, self.paths, environment))
        self.process.start()
        self.pid, self.kill, self.terminate = self.process.pid, self.process.kill, self.process.terminate
        # At its end, Python would wait for a process that a failed test has left.
        atexit.register(self.kill)

    def poll(self):
        return self.process.exitcode

    @property
    def returncode(self):
        return self.process.exitcode

    def communicate(self, timeout=300):
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"{self.paths[0]}: still running after {timeout} s"
        return [open(path).read() for path in self.paths]
