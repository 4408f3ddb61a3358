"""Settings of the processes that run tests, and where their shared fixtures are."""

import os

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each test process has one core.
    for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(name, "1")

# Their asserts say what they compared, as those of test files do.
pytest.register_assert_rewrite("shared_fixtures", "small_runs")


def pytest_configure(config: pytest.Config) -> None:
    """Loads the shared fixtures, which import TensorFlow, but not in a process that only hands tests to others."""
    hands_on = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not hands_on or config.option.collectonly:
        config.pluginmanager.import_plugin("shared_fixtures")
