"""Trains a classifier on the images of train_csv; all it writes goes to save_model_path.

With load_model_path it continues a run, and ends with the model that the run would have given without a stop.
"""

from __future__ import annotations

import time

from configs import Configs
from finetune.core.options import run_script, script


@script
def main(configs: Configs) -> dict:
    """Trains, alone or with the other processes of TF_CONFIG; returns the last epoch's figures and the best."""
    from finetune.core.devices import choose_devices, start_strategy
    from finetune.data.data_check import check_sets, list_sets, settle_sets
    from finetune.models.losses import get_losses
    from finetune.reporting.label_page import write_contradictions
    from finetune.reporting.log_figures import report_learning_rate
    from finetune.reporting.model_card import write_model_card
    from finetune.training import training
    from finetune.training.phases import get_phases
    from finetune.training.resuming import find_start, report_end
    from finetune.training.workers import join_team, select_common, take_slurm_step

    started = time.monotonic()
    if configs.distribution_strategy == "multi_worker":
        take_slurm_step()
    source = configs.load_model_path or configs.save_model_path
    with join_team(configs.distribution_strategy, configs.to_dict(), source) as team:
        choose_devices(configs.gpu_percentage, configs.distribution_strategy)
        strategy = team.connect(start_strategy(configs.distribution_strategy))
        model_path, state, configs = find_start(configs, team.is_chief)
        team.folder = configs.save_model_path
        team.agree(select_common(configs.to_dict(), state))
        if ended := report_end(state, configs):
            return ended
        configs = settle_sets(configs)
        bad_rows = check_sets(list_sets(configs), configs, team.is_chief, write_contradictions)
        configs = training.settle(configs, team)
        shares = training.get_shares(configs, strategy.num_replicas_in_sync, team)
        images = training.get_images(configs, bad_rows, shares)
        training.agree_on_start(team, images, model_path, state)
        losses = get_losses(configs, images.training.labels)
        with strategy.scope():
            start = training.get_model(configs, images.training, model_path, state, team)
        configs = training.settle_epochs(
            configs, started, strategy, start.classifier, images, losses.training, team, state
        )
        phases = get_phases(configs, strategy.num_replicas_in_sync)
        if configs.find_learning_rate:
            model, tried, loss = start.classifier, images.training, losses.training
            found = training.try_learning_rates(phases[0], configs, strategy, model, tried, loss)
            return report_learning_rate(configs.save_model_path, found, team.is_chief)
        training.check_room(configs, start.classifier, phases[-1], state, team)
        with training.open_run(configs, images, team) as interruption:
            last = training.train_phases(phases, configs, strategy, start, images, losses, interruption, team, state)
        results = training.report_best(last, configs.save_model_path)
        write_model_card(configs.save_model_path) if team.is_chief else None
        return results


if __name__ == "__main__":
    run_script(main)
