"""Trains a model on the images of train_csv and writes everything to save_model_path.

With load_model_path it continues a run, and ends with the same model as without the interruption.
"""

from __future__ import annotations

import time

from configs import Configs
from finetune.core.scripts import run_script, script


@script
def main(configs: Configs) -> dict:
    """Trains, alone or with the other workers of TF_CONFIG; returns the metrics of the last and the best epoch."""
    from finetune.core.devices import choose_devices, start_strategy
    from finetune.data.data_check import check_sets, list_sets
    from finetune.data.inspection import resolve_pixel_range
    from finetune.reporting.figures import report_learning_rate
    from finetune.reporting.label_page import write_contradictions
    from finetune.reporting.model_card import write_model_card
    from finetune.training.resuming import find_start, report_end, restore_logs
    from finetune.training.run import get_phases
    from finetune.training.time_budget import resolve_epochs
    from finetune.training.training import (
        check_room,
        find_learning_rate,
        open_run,
        prepare_run,
        report_best,
        train_phases,
    )
    from finetune.training.workers import join_team, select_common, take_slurm_step

    started = time.monotonic()
    take_slurm_step(configs.distribution_strategy)
    source = configs.load_model_path or configs.save_model_path
    with join_team(configs.distribution_strategy, configs.to_dict(), source) as team:
        choose_devices(configs.gpu_percentage, configs.distribution_strategy)
        strategy = team.connect(start_strategy(configs.distribution_strategy))
        model_path, state, configs = find_start(configs, team.is_chief)
        team.folder = configs.save_model_path
        team.check_workers_match(select_common(configs.to_dict(), state))
        if ended := report_end(state, configs):
            if team.is_chief and restore_logs(state, configs):
                write_model_card(configs.save_model_path)
            return ended
        csv_paths = list_sets(configs)
        configs = resolve_pixel_range(configs, [*csv_paths.values()])
        bad_rows = check_sets(csv_paths, configs, team.is_chief, write_contradictions)
        run = prepare_run(configs, team, strategy, bad_rows, model_path, state)
        resolve_epochs(run, started)
        phases = get_phases(run.configs, strategy.num_replicas_in_sync)
        if configs.find_learning_rate:
            found = find_learning_rate(run, phases[0])
            return report_learning_rate(configs.save_model_path, found, team.is_chief)
        check_room(run, phases[-1])
        with open_run(run):
            progress = train_phases(run, phases)
        results = report_best(progress, run.configs)
        write_model_card(configs.save_model_path) if team.is_chief else None
        return results


if __name__ == "__main__":
    run_script(main)
