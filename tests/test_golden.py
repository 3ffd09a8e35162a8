"""The golden net as a test; golden.py says what it holds, and conftest.py starts it."""


def test_every_preset_computes_the_numbers_that_it_did(golden_net):
    said, _ = golden_net.communicate()
    assert golden_net.returncode == 0, said[-8000:]
