"""The logs of a run."""

import json

from finetune.training.run import Progress, write_logs


def test_a_run_without_a_defined_auroc_writes_its_logs(tmp_path):
    write_logs(str(tmp_path), "val_auroc", Progress.read(None))
    assert not list(tmp_path.iterdir())
    progress = Progress(best_epoch=2, best_aurocs={"a": None, "b": 0.5}, log=[{"epoch": 0}], input_waits=[0.0])
    write_logs(str(tmp_path), "val_auroc", progress)
    lines = (tmp_path / "best_auroc.log").read_text("utf-8").splitlines()
    assert lines == ["epoch 2", "mean undefined", "a undefined", "b 0.5000"]
    statistics = json.loads((tmp_path / ".training_stats.json").read_text())
    assert (statistics["best"], statistics["best_auroc_by_class"]) == (None, progress.best_aurocs)
    assert "kept_share" not in statistics
    assert (tmp_path / "training_log.csv").read_text("utf-8").splitlines() == ["epoch", "0"]
