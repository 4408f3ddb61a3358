"""Checks of pages, by their source and in a real browser."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess

import pytest


def check_policy(source, images):
    """Checks that a page may load nothing but images of these origins and run only its own script."""
    without_images = re.sub(r"base64,[\w+/=]+", "", source)
    assert not re.search(r"https?:|@import|url\(|<(link|iframe|object|embed|base|form)\b", without_images)
    script = re.findall(r"<script>(.*?)</script>", source, re.S)[-1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src {images}; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert policy in source


def browse(page, *flags):
    """Opens a page in headless Chromium; returns its document after loading and what it wrote to the console."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no Chromium on the path to open the page in")
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={page.parent / 'profile'}", *flags, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def probe(page, folder, script, *flags):
    """Opens a copy of a page with a script added; returns the JSON that the script leaves in the title."""
    # Lazy images would load after the script.
    source = page.read_text(encoding="utf-8").replace(' loading="lazy"', "")
    loosened = re.sub(r"script-src [^;]+", "script-src 'unsafe-inline'", source, count=1)
    (folder / "probed.html").write_text(loosened.replace("</body>", script), encoding="utf-8")
    document, console = browse(folder / "probed.html", *flags)
    assert console == []
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", document, re.DOTALL)[1]))
    assert "error" not in found
    return found
