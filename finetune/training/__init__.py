"""A run: its folder, phases, training loop, callbacks, checkpoints, resuming, and several devices and hosts.

Start with `training.py`, whose steps `train.py` calls in their order.
"""
