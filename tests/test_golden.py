"""The golden net as a test; golden.py says what it holds."""

import subprocess
import sys

from helpers import ROOT


def test_every_preset_computes_the_numbers_that_it_did():
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "golden.py"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
