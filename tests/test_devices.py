"""Training and prediction on two devices, simulated on one processor in a process of its own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import MakePairs

import driver_train_save_evaluate
import segment

TINY = """
import sys
sys.path.insert(0, "tests")
import networks, segment
segment.create_model = networks.tiny_network
"""
TRAIN = """
import json
import keras
if keras.backend.backend() == "tensorflow":
    from tensorflow import config
    two = [config.LogicalDeviceConfiguration()] * 2
    config.set_logical_device_configuration(config.list_physical_devices("CPU")[0], two)
images, masks = segment.find_image_pairs(*sys.argv[1:3])
outcomes = []
for devices in (1, 2):
    keras.utils.set_random_seed(0)
    with segment.data_parallel(devices):
        model = segment.create_model((16, 16), num_filters=2, dropout=0)
        shape = {"image_size": (16, 16), "batch_size": 4, "whole_batches": True}
        train = segment.create_generator(images[:9], masks[:9], shuffle=True, **shape)
        val = segment.create_generator(images[9:], masks[9:], **shape)
        history = segment.train_model(model, train, val, 2, verbose=0).history
        lesion = segment.predict(model, val, mirror=False, one_region=False, verbose=0)
        threshold = segment.choose_threshold(val, lesion)
        segment.save_model(model, sys.argv[3])
    outcomes.append([history, lesion.ravel().tolist(), threshold])
print(json.dumps(outcomes))
"""


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_two_devices_train_and_predict_like_one(
    make_pairs: MakePairs, tmp_path: Path, backend: str
) -> None:
    pytest.importorskip(backend)
    images, masks = make_pairs(15)
    folders = [str(Path(paths[0]).parent) for paths in (images, masks)]
    two = "--xla_force_host_platform_device_count=2"
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    done = subprocess.run(
        [sys.executable, "-c", TINY + TRAIN, *folders, str(tmp_path / "two.keras")],
        env={**os.environ, "KERAS_BACKEND": backend, "XLA_FLAGS": f"{two} {quick}"},
        cwd=Path(__file__).parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, both = json.loads(done.stdout.splitlines()[-1])
    assert len(one[0]["val_loss"]) == 2
    for name, curve in one[0].items():
        # Rounding may move a few pixels across the threshold of 0.5.
        rounding = 1e-4 if name.endswith(("loss", "rate")) else 5e-3
        assert both[0][name] == pytest.approx(curve, abs=rounding), name
    assert len(one[1]) == 6 * 16 * 16  # the second batch is shorter, and padded
    assert both[1] == pytest.approx(one[1], abs=1e-3)
    assert both[2] == one[2]
    assert segment.load_model(tmp_path / "two.keras").input_shape == (None, 16, 16, 3)


def test_two_hosts_train_like_one_and_write_to_folders_of_their_own(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    pytest.importorskip("jax")
    images, masks = make_pairs(17)  # 8 to train, 8 to validate, 1 to test on
    folders = ["--image-dir", str(Path(images[0]).parent), "--mask-dir", str(Path(masks[0]).parent)]
    size = ["--image-size", "16", "16", "--batch-size", "4", "--epochs", "2", "--val-split", "0.5"]
    size += ["--num-imgs", "0"]
    code = "import driver_train_save_evaluate as driver; sys.exit(driver.main(sys.argv[1:]))"
    command = [sys.executable, "-c", TINY + code, *folders, *size]

    def start(name: str, *options: str, **settings: str) -> "subprocess.Popen[str]":
        quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        return subprocess.Popen(
            [*command, "--output", str(tmp_path / name), *options],
            env={**os.environ, "KERAS_BACKEND": "jax", "XLA_FLAGS": quick, **settings},
            cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {
        "KERAS_DISTRIBUTION_JOB_ADDRESSES": f"127.0.0.1:{port}",
        "KERAS_DISTRIBUTION_NUM_PROCESSES": "2",
    }
    hosts = [
        start(f"host{i}", "--devices", "2", KERAS_DISTRIBUTION_PROCESS_ID=str(i), **together)
        for i in (0, 1)
    ]
    for process in (*hosts, start("alone")):
        error = process.communicate()[1]
        assert process.returncode == 0, error
    assert sorted(path.name for path in (tmp_path / "host1").iterdir()) == ["host1"]
    alone, both = (
        np.genfromtxt(tmp_path / name / "training.csv", delimiter=",", names=True)
        for name in ("alone", "host0")
    )
    assert len(both) == 2
    for name in ("loss", "val_loss", "dice_coefficient"):
        assert both[name] == pytest.approx(alone[name], abs=1e-3), name
    assert (tmp_path / "host0" / "scores.csv").read_text().count("\n") == 2


def test_hosts_that_cannot_connect_are_an_error() -> None:
    settings = {"KERAS_DISTRIBUTION_NUM_PROCESSES": "two", "KERAS_BACKEND": "jax"}
    done = subprocess.run(
        [sys.executable, "-c", "import segment; segment.data_parallel(2)"],
        env={**os.environ, **settings}, cwd=Path(__file__).parents[1], capture_output=True,
        text=True,
    )  # fmt: skip
    assert "SegmentError: The hosts cannot connect (invalid literal" in done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_DISTRIBUTION_NUM_PROCESSES", "2")
        with pytest.raises(segment.SegmentError, match="Several hosts need JAX, but this is tens"):
            segment.data_parallel(2)


def test_requesting_too_many_devices_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(segment.SegmentError, match="64 devices were requested"):
        segment.data_parallel(64)
    assert driver_train_save_evaluate.main(["--devices", "64", "--batch-size", "64"]) == 2
    assert "64 devices were requested" in capsys.readouterr().err


def test_a_batch_that_the_devices_do_not_divide_is_an_error(
    capsys: pytest.CaptureFixture[str], make_pairs: MakePairs
) -> None:
    with pytest.raises(SystemExit):
        driver_train_save_evaluate.main(["--devices", "2", "--batch-size", "3"])
    assert "--batch-size 3 cannot be shared among 2 devices" in capsys.readouterr().err
    with pytest.raises(segment.SegmentError, match="2 images do not fill a batch of 8"):
        segment.create_generator(*make_pairs(2), whole_batches=True)


def test_one_device_changes_nothing() -> None:
    with segment.data_parallel(1) as scope:
        assert scope is None


def test_only_further_hosts_write_to_a_subfolder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_DISTRIBUTION_PROCESS_ID", "1")
    options = driver_train_save_evaluate.parse_options(["--output", "here"])
    assert (options.output, options.save) == ("here", None)
    monkeypatch.setenv("KERAS_DISTRIBUTION_NUM_PROCESSES", "2")
    options = driver_train_save_evaluate.parse_options(["--output", "here", "--save", "a.keras"])
    assert (options.output, options.save) == (str(Path("here") / "host1"), None)
