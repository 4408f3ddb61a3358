"""Exporting models to other formats, and checking that their answers stay the same.

Start with `exports.py`; `parity.py` compares an artefact with its original.
"""
