"""Measures side by side, in one run: loading, generators, training and inference steps.

    python tests/benchmark.py [--image-size 256 256] [--batch-size 8] [--repeats 5] [--device gpu]

    python tests/benchmark.py --exports    # the bundled model in Keras and in other programs

Every figure is a median. Where PyTorch is installed, the network stands here a second time, in
plain PyTorch: the weights are copied over, the outputs compared, and the steps timed side by side.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1]))

import keras
import numpy as np
from PIL import Image, ImageFilter

import segment

# Heights and widths as they occur in the ISIC archive.
SIZES = ((767, 1022), (1536, 2048), (2016, 3024), (2848, 4288), (4439, 6688))


def median_time(function: Callable[[], Any], repeats: int) -> float:
    """Seconds, after one call that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def line(what: str, ours: float, theirs: float, other: str, count: int = 1) -> None:
    print(
        f"{what:42}{count / ours:9.1f}/s{count / theirs:11.1f}/s{theirs / ours:9.2f} x  ({other})",
        flush=True,
    )


def photographs(folder: Path, each: int) -> segment.Pairs:
    """JPEGs with the detail of skin and masks of an ellipse, `each` of every size."""
    rng = np.random.default_rng(0)
    images, masks = [], []
    for i, (height, width) in enumerate(SIZES * each):
        coarse = Image.fromarray(rng.integers(90, 230, (48, 64, 3), np.uint8))
        skin = coarse.resize((width, height), Image.Resampling.BICUBIC)
        grain = rng.integers(0, 24, (height, width, 1), np.uint8)
        y, x = np.ogrid[:height, :width]
        mask = (y / height - 0.5) ** 2 + (x / width - 0.5) ** 2 < 0.06
        images.append(str(folder / f"{i}.jpg"))
        masks.append(str(folder / f"{i}.png"))
        Image.fromarray(np.asarray(skin) + grain).save(images[-1], quality=92)
        Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MinFilter(3)).save(
            masks[-1]
        )
    return images, masks


def measure_loading(options: argparse.Namespace) -> None:
    height, width = options.image_size
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        images, masks = photographs(Path(folder), 2)

        def plain() -> None:
            for image, mask in zip(images, masks, strict=True):
                np.asarray(Image.open(image).convert("RGB").resize((width, height)))
                np.asarray(Image.open(mask).convert("L").resize((width, height)))

        def ours() -> None:
            for image, mask in zip(images, masks, strict=True):
                segment.load_input_image(image, options.image_size)
                segment.load_segmented_image(mask, options.image_size)

        repeats = max(1, options.repeats // 2)
        seconds, theirs = median_time(ours, repeats), median_time(plain, repeats)
        line("JPEG and mask to the frame, one thread", seconds, theirs, "plain Pillow", len(images))

        def epoch(**how: Any) -> Callable[[], Any]:
            batches = segment.create_generator(
                images * 8, masks * 8, image_size=options.image_size, **how
            )
            return lambda: list(pool.map(batches.__getitem__, range(len(batches))))

        again = median_time(epoch(cache=segment.PairCache(0)), 1)
        for what, how in (("", {}), (", augmented", {"augment": True, "shuffle": True})):
            cached = median_time(epoch(**how), options.repeats)
            line(f"epoch from memory{what}", cached, again, "decoding each time", 8 * len(images))


def measure_memory(count: int) -> None:
    """Peak of a process that checks, caches and trains on so many pairs of JPEGs and masks."""
    with tempfile.TemporaryDirectory() as folder:
        images, masks = photographs(Path(folder), 1)
        for i in range(count):
            for path in (images[i % 2], masks[i % 2]):  # the smaller sizes
                os.link(path, Path(folder) / f"more-{i}{Path(path).suffix}")
        pairs = [[f"{folder}/more-{i}.{kind}" for i in range(count)] for kind in ("jpg", "png")]
        cache, size = segment.PairCache(0, f"{folder}/cache"), (96, 128)
        batches = segment.create_generator(
            *pairs, image_size=size, batch_size=16, shuffle=True, augment=True, cache=cache
        )
        began = time.perf_counter()
        segment.check_pairs(*pairs, image_sizes=[(192, 256)], cache=cache)  # as augmented
        checked = time.perf_counter() - began
        model = segment.create_model(size, num_filters=2)
        segment.train_model(model, batches, None, 1, verbose=0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{count} pairs: checked and decoded in {checked:.0f} s; peak {peak:.3f} GiB")


def torch_unet(filters: int = 16) -> Any:
    """The network of `segment.create_model`, written once more; NCHW, images in 0..255."""
    import torch
    from torch import nn

    class Block(nn.Module):  # norm, leaky ReLU and the convolution before or after them
        def __init__(self, into: int, out: int, kernel: int = 3, stride: int = 1) -> None:
            super().__init__()
            self.conv = nn.Conv2d(into, out, kernel, stride, (kernel - stride) // 2)
            self.stride = stride

        def forward(self, x: Any) -> Any:
            # TensorFlow pads an even picture below and on the right where it strides by two.
            return self.conv(nn.functional.pad(x, (0, 1, 0, 1)) if self.stride == 2 else x)

    def norm(channels: int) -> Any:
        return nn.Sequential(nn.InstanceNorm2d(channels, eps=1e-5, affine=True), nn.LeakyReLU(0.01))

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = [filters * 2**level for level in range(5)]
            before = [3, *widths[:-1]]
            self.down = nn.ModuleList(
                Block(before[i], n, 3, 1 if i == 0 else 2) for i, n in enumerate(widths)
            )
            self.context = nn.ModuleList(
                nn.Sequential(norm(n), Block(n, n), nn.Dropout2d(0.3), norm(n), Block(n, n))
                for n in widths
            )
            self.out = norm(widths[4])
            self.up = nn.ModuleList(
                nn.Sequential(nn.Upsample(scale_factor=2), Block(2 * n, n), norm(n))
                for n in widths[3::-1]
            )
            self.local = nn.ModuleList(
                nn.Sequential(Block(2 * n, 2 * n), norm(2 * n), Block(2 * n, n, 1), norm(n))
                for n in widths[3:0:-1]
            )
            self.final = nn.Sequential(Block(2 * filters, 2 * filters), norm(2 * filters))
            self.lesion = nn.ModuleList(Block(n, 1, 1) for n in (widths[2], widths[1], 2 * filters))

        def forward(self, x: Any) -> Any:
            x, skips, lesion = x / 255, [], torch.zeros(())
            for down, context in zip(self.down, self.context, strict=True):
                x = down(x)
                x = x + context(x)
                skips.append(x)
            x = self.out(x)
            for i, up in enumerate(self.up):
                x = torch.cat([up(x), skips[3 - i]], 1)
                x = self.local[i](x) if i < 3 else self.final(x)
                if i > 0:
                    lesion = self.lesion[i - 1](x) + lesion
                    if i < 3:
                        lesion = nn.functional.interpolate(lesion, scale_factor=2.0)
            return torch.sigmoid(lesion)

    return UNet()


def copy_weights(model: keras.Model, network: Any) -> None:
    """From Keras to PyTorch; both hold a convolution's or a norm's two tensors side by side."""
    import torch

    order = [f"level{level}_conv" for level in range(1, 6)]
    for level in range(1, 6):
        for half in (1, 2):
            order += [f"level{level}_context{half}_norm", f"level{level}_context{half}_conv"]
    order += ["level5_out_norm"]
    for level in (4, 3, 2, 1):
        order += [f"level{level}_up_conv", f"level{level}_up_norm"]
    for level in (4, 3, 2):
        for half in (1, 2):
            order += [f"level{level}_local{half}_conv", f"level{level}_local{half}_norm"]
    order += ["level1_final_conv", "level1_final_norm"]
    order += [f"level{level}_lesion_conv" for level in (3, 2, 1)]
    weights = [weight for name in order for weight in model.get_layer(name).get_weights()]
    with torch.no_grad():
        for target, weight in zip(network.parameters(), weights, strict=True):
            target.copy_(torch.tensor(weight.transpose(3, 2, 0, 1) if weight.ndim == 4 else weight))


def torch_tensor(array: np.ndarray, device: str) -> Any:
    import torch

    return torch.tensor(np.float32(array), device=device).permute(0, 3, 1, 2)


def torch_step(
    network: Any, x: np.ndarray, y: np.ndarray, bfloat16: bool, device: str
) -> Callable[[], Any]:
    """A training step of PyTorch, channels last in bfloat16, with the loss of the project."""
    import torch

    images, truth = torch_tensor(x, device), torch_tensor(y, device)
    if bfloat16:
        network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            p = network(images).float()
        overlap = (2 * (truth * p).sum((1, 2, 3)) + 1) / ((truth + p).sum((1, 2, 3)) + 1)
        loss = (1 - overlap).mean() + torch.nn.functional.binary_cross_entropy(p, truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def torch_prediction(
    network: Any, x: np.ndarray, bfloat16: bool, device: str
) -> Callable[[], np.ndarray]:
    import torch

    images = torch_tensor(x, device)

    def predict() -> np.ndarray:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            return network(images).float().permute(0, 2, 3, 1).cpu().numpy()  # type: ignore[no-any-return]

    return predict


def measure_network(options: argparse.Namespace, bfloat16: bool, peak: float) -> None:
    height, width = options.image_size
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (options.batch_size, height, width, 3), np.uint8)
    y = rng.integers(0, 2, (options.batch_size, height, width, 1), np.uint8)
    dtype = "bfloat16" if bfloat16 else "float32"
    model = segment.create_model(options.image_size, bfloat16=bfloat16)
    model.compile(keras.optimizers.Adam(1e-3), loss=segment.dice_cross_entropy_loss)
    with segment._fused_norms(model):  # as train_model and predict do
        ours = median_time(lambda: model.predict_on_batch(x), options.repeats)
        step = median_time(lambda: model.train_on_batch(x, y), options.repeats)
        lesions = model.predict_on_batch(x)
    # 5.57 billion multiplications and additions at 256 x 256, three times that with gradients.
    work = 2 * 3 * 5.57e9 * height * width / 256**2 * options.batch_size
    print(
        f"{dtype}: {step:.3f} s a step of {options.batch_size}, {work / step / 1e9:.0f} GFLOP/s, "
        f"{work / step / peak:.0%} of the matrix product"
    )
    for compiled in (False, *([True] if options.compile else [])):
        try:
            import torch
        except ImportError:
            print("PyTorch is not installed: no comparison")
            return
        device = "cuda" if options.device == "gpu" else "cpu"
        network = torch_unet().to(device)
        copy_weights(model, network)
        run = torch.compile(network) if compiled else network
        other = "torch.compile" if compiled else "PyTorch"
        network.eval()
        predicted = torch_prediction(run, x, bfloat16, device)
        off = np.abs(predicted() - lesions)
        theirs = median_time(predicted, options.repeats)
        line(f"inference, {dtype}", ours, theirs, other, options.batch_size)
        print(f"{'':42}outputs differ by {off.max():.1e} at most, {off.mean():.1e} on average")
        network.train()
        theirs = median_time(torch_step(run, x, y, bfloat16, device), options.repeats)
        line(f"training step, {dtype}", step, theirs, other, options.batch_size)


def measure_peak(options: argparse.Namespace, dtype: str) -> float:
    """Operations a second of a matrix product, the most that a network could reach."""
    size = 8192 if options.device == "gpu" else 2048
    a = keras.ops.cast(keras.random.normal((size, size)), dtype)
    peak = 2 * size**3 / median_time(lambda: float(keras.ops.matmul(a, a)[0, 0]), options.repeats)
    print(f"matrix product, {dtype}: {peak / 1e9:.0f} GFLOP/s")
    return peak


# How a new process makes `run`, which maps uint8 images to probabilities.
KERAS = """
import keras, segment
segment._reuse_freed_memory()
model = segment.load_model(sys.argv[1], bfloat16={})
run = lambda images: segment._predict_batch([model], images, False)
"""
PROGRAMS = {
    "Keras, float32": (".keras", KERAS.format(False)),
    "Keras, bfloat16": (".keras", KERAS.format(True)),
    "ONNX Runtime": (".onnx", """
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
run = lambda images: session.run(None, {"image": images})[0]
"""),
    "LiteRT": (".tflite", """
import os, tensorflow
network = tensorflow.lite.Interpreter(sys.argv[1], num_threads=os.cpu_count())
runner = network.get_signature_runner()
run = lambda images: runner(image=images)
"""),
    "SavedModel": ("", """
import tensorflow
network = tensorflow.saved_model.load(sys.argv[1])
run = lambda images: network.serve(images).numpy()
"""),
}  # fmt: skip
MEASURED = """
import statistics, sys, time
import numpy as np
{}
images = np.random.default_rng(0).integers(0, 256, (8, *map(int, sys.argv[2:4]), 3), np.uint8)
run(images[:1])
started = time.time() - float(sys.argv[4])
run(images)
times = []
for _ in range(int(sys.argv[5])):
    began = time.perf_counter()
    run(images)
    times.append(time.perf_counter() - began)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
memory = int(peak.split()[1]) / 2**10
print(f"{{started:7.1f}} s{{8 / statistics.median(times):11.1f}}/s{{memory:9.0f}} MiB")
"""


def measure_exports(repeats: int) -> None:
    """Each program in a process of its own: from its start to the first image, and then."""
    height, width = segment.load_model().input_shape[1:3]
    model = segment.create_model((height, width))
    segment.load_weights(model, segment.PRETRAINED)
    print(f"{height} x {width}{'first image':>20}{'batches of 8':>13}{'memory':>13}{'file':>13}")
    with tempfile.TemporaryDirectory() as folder:
        for name, (suffix, code) in PROGRAMS.items():
            path = Path(folder, "model" + suffix)
            if suffix == ".keras":
                segment.save_model(model, path)
            elif not path.exists():
                segment.export_model(model, path)
            options = [str(path), str(height), str(width), str(time.time()), str(repeats)]
            done = subprocess.run(
                [sys.executable, "-c", MEASURED.format(code), *options],
                cwd=segment.PRETRAINED.parent, capture_output=True, text=True, check=True,
            )  # fmt: skip
            files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
            size = sum(file.stat().st_size for file in files) / 2**20
            print(f"{name:18}{done.stdout.rstrip()}{size:9.1f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image-size", nargs=2, type=int, default=(256, 256))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compare with torch.compile as well")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--memory", type=int, metavar="N", help="instead: train on N pairs")
    parser.add_argument("--exports", action="store_true", help="instead: export the network")
    options = parser.parse_args()
    if options.exports:
        measure_exports(options.repeats)
        return
    if options.memory:
        measure_memory(options.memory)
        return
    options.image_size = tuple(options.image_size)
    with keras.device(f"{options.device}:0"):
        device = segment.describe_device()
        if options.device == "gpu" and device.lower().startswith("cpu"):
            parser.error(f"--device gpu: the backend computes on {device}")
        print(f"{device}, {os.cpu_count()} cores, {options.image_size}")
        print(f"{'':42}{'here':>11}{'there':>13}")
        measure_loading(options)
        for bfloat16 in (False, True):
            dtype = "bfloat16" if bfloat16 else "float32"
            measure_network(options, bfloat16, measure_peak(options, dtype))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of this run: {peak:.2f} GiB")


if __name__ == "__main__":
    main()
