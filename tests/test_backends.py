"""The tests of model, Dice and saving on JAX and, if it is installed, PyTorch."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = ("test_model.py", "test_dice.py", "test_saving.py")
# Without tests that are slow or independent of the backend.
SLOW = "new_process or invalid_values or fused_norms"
SAME = "graph or published or 3188435 or three_tenths or each_channel"  # of the same big network
QUICK = f"not ({SLOW} or {SAME})"
CHOSEN = {"jax": f"{QUICK} and not overfit", "torch": QUICK}  # test_devices.py trains on JAX


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_model_dice_and_saving_pass_on_other_backends(backend: str) -> None:
    if not importlib.util.find_spec(backend):
        pytest.skip(f"{backend} is not installed")
    options = ("-q", "-p", "no:cacheprovider", "-n", "0")
    command = [sys.executable, "-m", "pytest", *options, *FILES, "-k", CHOSEN[backend]]
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = {**os.environ, "KERAS_BACKEND": backend, "XLA_FLAGS": quick}
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " skipped" not in done.stdout
