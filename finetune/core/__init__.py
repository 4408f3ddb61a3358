"""The ground that everything stands on: options, files, text, output and hardware.

Start with `options.py`: how an option is declared and a script is run. Nothing here knows of images or models.
"""
