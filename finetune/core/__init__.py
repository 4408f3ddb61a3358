"""The foundation of all other packages: options, scripts, files, text output and devices.

Start with `options.py`, which declares options, and `scripts.py`, which runs scripts. Nothing here depends on images
or models.
"""
