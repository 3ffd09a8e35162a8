"""The golden net as a test; golden.py says what it holds."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(3600)
def test_every_preset_computes_the_numbers_that_it_did():
    golden = [sys.executable, Path(__file__).with_name("golden.py"), "--places", "1"]
    ended = subprocess.run(golden, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert ended.returncode == 0, ended.stdout[-8000:]
