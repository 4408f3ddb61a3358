"""The parts of a model: backbones, heads, losses and optimizers; and the model files in every format.

Start with the registries `backbones.py` and `heads.py`; `model.py` in the root combines them.
"""
