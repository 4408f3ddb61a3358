"""Exporting models to other formats, and checking that their answers stay the same.

All of it is in `exports.py`; the formats are those of `finetune/models/formats.py`.
"""
