"""Draws the embedded sample: synthetic pictures that look like dermoscopy, and their masks.

    python tests/make_sample.py

writes 64 pairs to images/sample. No patient is shown: every picture is drawn from its seed, and its
id has eight digits where real ISIC ids have seven. A lesion ends where its soft border is halfway
between pigment and skin; it is one region without holes by construction, since every point of it
sees the lesion's centre.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

OUTPUT = Path(__file__).parents[1] / "images" / "sample"
SIZES = (  # (height, width), as varied as those of ISIC
    (192, 256), (192, 256), (240, 320), (170, 256), (223, 256), (256, 192), (225, 300), (240, 240),
)  # fmt: skip
SKIN = ((232, 190, 170), (224, 172, 150), (214, 160, 128), (236, 205, 192), (190, 136, 106))
PIGMENT = ((120, 72, 46), (96, 54, 38), (146, 94, 66), (70, 44, 40), (158, 92, 82))

Floats = NDArray[np.floating[Any]]
Size = tuple[int, int]


# ----------------------------------------------------------------------------------------------
# Skin
# ----------------------------------------------------------------------------------------------


def smooth_noise(size: Size, cells: int, rng: np.random.Generator) -> Floats:
    """Noise of about -1 to 1, `float (height, width)`, with `cells` bumps along the longer side."""
    height, width = (max(2, round(cells * side / max(size))) for side in size)
    coarse = Image.fromarray(rng.normal(0, 0.5, (height, width)).astype(np.float32))
    return np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC), float)


def draw_skin(size: Size, rng: np.random.Generator) -> Floats:
    """Mottled skin under a light that comes from one side, `float (height, width, 3)`."""
    tone = np.array(SKIN[rng.integers(len(SKIN))]) + rng.normal(0, 6, 3)
    y, x = (grid / max(size) for grid in np.mgrid[: size[0], : size[1]])
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0.05, 0.25)
    light = 1 + strength * ((x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle))
    mottling = 5 * smooth_noise(size, 6, rng) + 4 * smooth_noise(size, 40, rng)
    redness = 6 * smooth_noise(size, 10, rng)[..., None] * [0.2, -1, -0.8]
    return np.asarray(tone * light[..., None] + mottling[..., None] + redness)


# ----------------------------------------------------------------------------------------------
# Lesion
# ----------------------------------------------------------------------------------------------


def depth_inside(size: Size, rng: np.random.Generator) -> Floats:
    """How far each pixel lies inside the lesion's outline, in pixels; negative outside."""
    area = math.exp(rng.uniform(math.log(0.03), math.log(0.5))) * size[0] * size[1]
    center = rng.normal(0.5, 0.12, 2).clip(0.15, 0.85) * size
    y, x = np.mgrid[: size[0], : size[1]] - center.reshape(2, 1, 1)
    stretch, turn = rng.uniform(1, 1.45), rng.uniform(0, math.pi)
    u = (x * math.cos(turn) + y * math.sin(turn)) / math.sqrt(stretch)
    v = (y * math.cos(turn) - x * math.sin(turn)) * math.sqrt(stretch)
    angle, outline = np.arctan2(v, u), np.ones(size)
    for waves in range(2, 13):
        outline += rng.normal(0, 0.16 / waves) * np.cos(waves * angle + rng.uniform(0, 6.3))
    return np.asarray(math.sqrt(area / math.pi) * outline.clip(0.3) - np.hypot(u, v))


def draw_pigment(size: Size, depth: Floats, rng: np.random.Generator) -> Floats:
    """Two or three tones, a darker middle, and a network or globules, `(height, width, 3)`."""
    tones = np.array(PIGMENT)[rng.permutation(len(PIGMENT))[:3]] + rng.normal(0, 8, (3, 3))
    second, third = (
        1 / (1 + np.exp(-8 * (smooth_noise(size, cells, rng) - level)))[..., None]
        for cells, level in ((4, 0.1), (7, 0.35))
    )
    pigment = tones[0] * (1 - second) + tones[1] * second
    pigment = pigment * (1 - third) + tones[2] * third
    middle = np.clip(depth / max(depth.max(), 1), 0, 1) * rng.uniform(0, 0.3)
    fine = smooth_noise(size, int(rng.integers(40, 90)), rng)
    texture = np.abs(fine) if rng.random() < 0.5 else np.maximum(fine, 0)  # network or globules
    shade = 1.05 - middle - rng.uniform(0.1, 0.45) * texture
    return np.asarray(pigment * shade[..., None])


# ----------------------------------------------------------------------------------------------
# Distractors: what else lies on the skin and in front of the lens
# ----------------------------------------------------------------------------------------------


def draw_hairs(image: Image.Image, rng: np.random.Generator) -> None:
    """Dark curved hairs that grow more or less the same way."""
    draw, growth = ImageDraw.Draw(image), rng.uniform(0, 2 * math.pi)
    for _ in range(rng.integers(3, 22)):
        start = rng.uniform(0, 1, 2) * image.size
        angle, length = growth + rng.normal(0, 0.4), rng.uniform(0.2, 0.7) * max(image.size)
        end = start + length * np.array([math.cos(angle), math.sin(angle)])
        bend = (start + end) / 2 + rng.normal(0, 0.12 * length, 2)
        t = np.linspace(0, 1, 24)[:, None]
        points = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
        shade = rng.integers(20, 70)
        color = (int(shade + 18), int(shade + 4), int(shade))
        draw.line([(float(x), float(y)) for x, y in points], color, int(rng.integers(1, 3)))


def draw_ruler(image: Image.Image, rng: np.random.Generator) -> None:
    """Millimetre marks along one edge, every fifth of them longer."""
    draw, step = ImageDraw.Draw(image), float(rng.uniform(6, 11))
    width, height = image.size
    at_bottom = rng.random() < 0.5
    for i in range(int((width if at_bottom else height) / step)):
        mark, where = (14 if i % 5 == 0 else 8), round(i * step)
        line = (where, height - mark, where, height) if at_bottom else (0, where, mark, where)
        draw.line(line, (40, 36, 44), 1)


def draw_bubbles(image: Image.Image, rng: np.random.Generator) -> None:
    """Bubbles of the gel under the glass, each a pale ring with a highlight."""
    draw = ImageDraw.Draw(image, "RGBA")
    for _ in range(rng.integers(4, 14)):
        x, y = rng.uniform(0, 1, 2) * image.size
        r = float(rng.uniform(2, 8))
        draw.ellipse((x - r, y - r, x + r, y + r), outline=(255, 250, 245, 110))
        draw.ellipse((x - r / 2, y - r / 2, x - r / 6, y - r / 6), fill=(255, 255, 255, 170))


def draw_sticker(image: Image.Image, rng: np.random.Generator) -> None:
    """A coloured calibration disc that reaches in from a corner."""
    width, height = image.size
    x, y = rng.choice((0, width)), rng.choice((0, height))
    r = float(rng.uniform(0.15, 0.28)) * min(image.size)
    color = [(60, 150, 190), (90, 170, 120), (200, 170, 60)][rng.integers(3)]
    ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), fill=color)


def vignette(size: Size, rng: np.random.Generator) -> Floats:
    """The dark rim of a dermatoscope's round field of view, as factors `(height, width, 1)`."""
    y, x = np.mgrid[: size[0], : size[1]] - np.array(size).reshape(2, 1, 1) / 2
    radius = rng.uniform(0.5, 0.62) * max(size)
    rim = (np.hypot(x, y) - radius) / (rng.uniform(0.01, 0.06) * max(size))
    return np.asarray(1 / (1 + np.exp(rim.clip(-50, 50))))[..., None]


# ----------------------------------------------------------------------------------------------
# Pairs
# ----------------------------------------------------------------------------------------------


def draw_pair(seed: int, index: int) -> tuple[Image.Image, Image.Image]:
    """Draws picture `index` of a sample, whatever its other pictures are.

    Args:
        seed: Seed of the whole sample.
        index: Number of the picture, from 0.

    Returns:
        The picture in RGB and its mask in grey levels 0 and 255, of the same size.
    """
    rng = np.random.default_rng((seed, index))
    size = SIZES[rng.integers(len(SIZES))]
    skin, depth = draw_skin(size, rng), depth_inside(size, rng)
    softness = rng.uniform(0.008, 0.03) * max(size)
    opacity = rng.uniform(0.55, 0.97) / (1 + np.exp(-depth / softness * 2))[..., None]
    painted = skin * (1 - opacity) + draw_pigment(size, depth, rng) * opacity
    image = Image.fromarray(painted.clip(0, 255).astype(np.uint8))
    for draw, share in (
        (draw_sticker, 0.1), (draw_ruler, 0.2), (draw_bubbles, 0.25), (draw_hairs, 0.45),
    ):  # fmt: skip
        if rng.random() < share:
            draw(image, rng)
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.1))), float)
    if rng.random() < 0.3:
        blurred = blurred * vignette(size, rng)
    noisy = blurred + rng.normal(0, 2.5, blurred.shape)
    image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    return image, Image.fromarray((depth > 0).astype(np.uint8) * 255)


def write_sample(output: Path, count: int, seed: int) -> None:
    """Writes `count` pairs under the names that ISIC would give them, and what they are."""
    for folder in ("input", "truth"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image, mask = draw_pair(seed, index)
        name = f"ISIC_{90_000_000 + index}"
        image.save(output / "input" / f"{name}.jpg", quality=85)
        mask.convert("1").convert("L").save(
            output / "truth" / f"{name}_segmentation.png", optimize=True
        )
    (output / "README.txt").write_text(
        f"These {count} pictures are synthetic and show no patient: tests/make_sample.py drew\n"
        f"them with seed {seed}. Their ids have eight digits, where real ISIC ids have seven.\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder (%(default)s)")
    parser.add_argument("--count", type=int, default=64, help="pairs to draw (%(default)s)")
    parser.add_argument("--seed", type=int, default=2017, help="seed (%(default)s)")
    options = parser.parse_args(arguments)
    write_sample(options.output, options.count, options.seed)


if __name__ == "__main__":
    main()
