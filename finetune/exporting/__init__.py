"""Exporting models to other formats, and checking that their answers stay the same.

Start with `exports.py`; `parity.py` compares the answers. The formats are those of `finetune/models/formats.py`.
"""
