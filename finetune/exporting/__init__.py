"""Writing models in other formats, and proving that they still answer the same.

Start with `exports.py`, the registry of formats; `parity.py` compares an export with its model.
"""
