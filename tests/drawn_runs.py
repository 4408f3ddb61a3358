"""Runs whose test images are explained."""

SIZE, CLASS_NAMES = 32, ["blue", "green", "red"]
