"""Draws the embedded sample: synthetic images that look like dermoscopy, and their masks.

    python tests/make_sample.py

writes 64 pairs to images/sample. The images are drawn from a seed and show no patient. Their ids
have seven digits, as the scorer of the ISIC challenges requires, and start at ISIC_9200000, above
all ids of the segmentation challenges (2016 to 2018).

The mask ends where the soft border of the lesion is halfway between pigment and skin. A lesion is
one region without holes by construction: a straight line from its centre to any point of it stays
inside.
"""

import argparse
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Floats = NDArray[np.float64]
Size = tuple[int, int]

OUTPUT = Path(__file__).parents[1] / "images" / "sample"
FIRST_ID = 9_200_000
SIZES: tuple[Size, ...] = (  # (height, width), mostly landscape as in ISIC
    (240, 320), (225, 300), (210, 280), (213, 320), (256, 256), (192, 256), (320, 240), (280, 210),
)  # fmt: skip
SKIN = (  # fair, rosy, tanned, olive, brown
    (232, 200, 186), (228, 180, 164), (220, 176, 146), (200, 166, 126), (178, 134, 100),
)  # fmt: skip
BROWNS = (  # optical density in red, green and blue: melanin absorbs blue most
    (0.25, 0.50, 0.85), (0.40, 0.95, 1.40), (0.95, 1.35, 1.60),
)  # fmt: skip
TONES = (*BROWNS, (0.85, 0.72, 0.68), (0.15, 0.60, 0.60), (1.70, 1.85, 1.90))  # grey, red, black
STICKERS = ((236, 140, 50), (60, 140, 190), (80, 165, 105), (225, 195, 70))
FINE = 2  # the overlay is drawn this many times larger, which makes its strokes smooth


# Skin
# ----------------------------------------------------------------------------------------------


def smooth_noise(size: Size, cells: int, rng: np.random.Generator) -> Floats:
    """Returns noise `(height, width)` of about -1 to 1 with `cells` bumps along the longer side."""
    height, width = (max(2, round(cells * side / max(size))) for side in size)
    coarse = Image.fromarray(rng.normal(0, 0.5, (height, width)).astype(np.float32))
    return np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC), np.float64)


def sigmoid(x: Floats) -> Floats:
    """Computes the logistic function. Unlike `exp`, `tanh` does not overflow."""
    return np.asarray(0.5 + 0.5 * np.tanh(x / 2))


def draw_skin(size: Size, rng: np.random.Generator) -> Floats:
    """Draws mottled skin with faint freckles under uneven light, `(height, width, 3)`."""
    tone = np.array(SKIN[rng.integers(len(SKIN))]) + rng.normal(0, 5, 3)
    y, x = np.mgrid[: size[0], : size[1]] / max(size) - 0.5
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0.05, 0.3)
    light = 1 + strength * (x * math.cos(angle) + y * math.sin(angle))
    relief = 3 * smooth_noise(size, 6, rng) + 4 * smooth_noise(size, 70, rng)
    redness = np.multiply.outer(smooth_noise(size, 14, rng), (1.5, -7, -6))
    freckles = rng.uniform(0, 0.4) * np.maximum(smooth_noise(size, 30, rng) - 0.6, 0)
    skin = tone * light[..., None] + relief[..., None] + redness
    return np.asarray(skin * np.exp(-np.multiply.outer(freckles, BROWNS[1])))


# Lesion
# ----------------------------------------------------------------------------------------------


def draw_outline(angles: Floats, rng: np.random.Generator) -> Floats:
    """Returns the radius at each angle of a wavy ellipse of area 1, sometimes with a notch."""
    stretch, turned = rng.uniform(1, 1.25), angles - rng.uniform(0, math.pi)
    radius = 1 / np.hypot(np.cos(turned) / stretch, np.sin(turned) * stretch)
    waves = np.arange(2, 19)[:, None]
    swing = rng.normal(0, rng.uniform(0.06, 0.18), waves.shape) / waves
    phase = rng.uniform(0, 2 * math.pi, waves.shape)
    radius *= 1 + (swing * np.cos(waves * angles + phase)).sum(0).clip(-0.5)
    if rng.random() < 0.4:
        aside = np.angle(np.exp(1j * (angles - rng.uniform(0, 2 * math.pi))))
        radius *= 1 - rng.uniform(0.2, 0.45) * np.exp(-((aside / rng.uniform(0.15, 0.4)) ** 2))
    return np.asarray(radius / math.sqrt(math.pi * np.mean(radius**2)))


def depth_inside(size: Size, rng: np.random.Generator) -> Floats:
    """Returns the approximate depth of each pixel inside the lesion, negative outside it."""
    angles = np.linspace(-math.pi, math.pi, 720, endpoint=False)
    area = math.exp(rng.uniform(math.log(0.03), math.log(0.65))) * math.prod(size)
    radius = math.sqrt(area) * draw_outline(angles, rng)
    contour, frame = radius * (np.sin(angles), np.cos(angles)), np.array(size)
    low, high, where = contour.min(1), contour.max(1), rng.beta(2.5, 2.5, 2)
    if rng.random() < 0.03:  # placed at an edge as if it were smaller, so that the edge cuts it off
        low, high, where[rng.integers(2)] = low / 2, high / 2, rng.integers(2)
    squeeze = np.minimum(1, 0.94 * frame / (high - low))  # makes a large lesion fit
    first, last = 0.03 * frame - squeeze * low, 0.97 * frame - squeeze * high
    center = first + where * (last - first)
    y, x = (np.mgrid[: size[0], : size[1]] - center.reshape(2, 1, 1)) / squeeze.reshape(2, 1, 1)
    outline = np.interp(np.arctan2(y, x), angles, radius, period=2 * math.pi)
    return np.asarray(outline - np.hypot(y, x))


def draw_texture(size: Size, rng: np.random.Generator) -> Floats:
    """Draws a network of lines, globules, dots or uneven pigment, about 0 to 1."""
    kind = rng.choice(["network", "globules", "dots", "uneven"])
    noise = smooth_noise(size, int(rng.integers(26, 44)) * (1 if kind == "globules" else 2), rng)
    if kind == "network":  # the zeros of noise form closed lines, and those of two noises a mesh
        other = smooth_noise(size, 60, rng)
        return np.asarray(np.exp(-((np.minimum(abs(noise), abs(other)) / 0.12) ** 2)))
    return 0.5 + 0.4 * noise if kind == "uneven" else sigmoid(12 * (noise - 0.4))


def draw_density(depth: Floats, rng: np.random.Generator) -> Floats:
    """Draws optical density: two or three tones and a texture, `(height, width, 3)`."""
    size = depth.shape[0], depth.shape[1]
    density = np.array(BROWNS[rng.integers(len(BROWNS))])
    for cells, level in ((4, 0.15), (8, 0.4)):
        zone = sigmoid(rng.uniform(6, 14) * (smooth_noise(size, cells, rng) - level))[..., None]
        density = density * (1 - zone) + np.array(TONES[rng.integers(len(TONES))]) * zone
    middle = rng.uniform(-0.2, 0.4) * np.clip(depth / depth.max(), 0, 1)
    texture = rng.uniform(0.3, 0.9) * draw_texture(size, rng) + 0.2 * smooth_noise(size, 60, rng)
    shade = rng.uniform(0.5, 1) * np.maximum(0.8 + middle + texture, 0.5)
    return np.asarray(density * shade[..., None])


def paint_lesion(skin: Floats, depth: Floats, rng: np.random.Generator) -> Floats:
    """Adds to the skin a pigment that fades across the outline of the lesion.

    Blends colours instead of densities, so that `depth` 0 is halfway between skin and pigment.
    """
    size = depth.shape[0], depth.shape[1]
    softness = rng.uniform(0.003, 0.014) * max(size)
    ragged = 0.008 * max(size) * smooth_noise(size, 40, rng)
    edge = sigmoid((depth + ragged) / softness)[..., None]
    return np.asarray(skin * (1 - edge + edge * np.exp(-draw_density(depth, rng))))


# Distractors: objects on the skin and in front of the lens
# ----------------------------------------------------------------------------------------------


def draw_hairs(overlay: Image.Image, rng: np.random.Generator) -> None:
    """Draws curved hairs, dark or fair, that taper and grow in roughly the same direction."""
    draw, growth = ImageDraw.Draw(overlay), rng.uniform(0, 2 * math.pi)
    dark, t = rng.random() < 0.85, np.linspace(0, 1, 40)[:, None]
    for _ in range(rng.integers(3, 20)):
        start = rng.uniform(0, 1, 2) * overlay.size
        angle, length = growth + rng.normal(0, 0.4), rng.uniform(0.15, 0.6) * max(overlay.size)
        end = start + length * np.array([math.cos(angle), math.sin(angle)])
        bend = (start + end) / 2 + rng.normal(0, 0.15 * length, 2)
        curve = ((1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end).tolist()
        red, thick = int(rng.integers(25, 75) if dark else 200), rng.uniform(1.2, 2) * FINE
        for i, (a, b) in enumerate(itertools.pairwise(curve)):
            draw.line((*a, *b), (red, red - 14, red - 22, 225), round(thick * (1 - i / 60)))


def draw_ruler(overlay: Image.Image, rng: np.random.Generator) -> None:
    """Draws millimetre marks along one edge, every fifth of them longer."""
    draw, step = ImageDraw.Draw(overlay), rng.uniform(6, 11) * FINE
    width, height = overlay.size
    at_bottom = rng.random() < 0.5
    for i in range(1, int((width if at_bottom else height) / step)):
        mark, where = (14 if i % 5 == 0 else 8) * FINE, i * step
        line = (where, height - mark, where, height) if at_bottom else (0, where, mark, where)
        draw.line(line, (40, 36, 44, 220), FINE)


def draw_bubbles(overlay: Image.Image, rng: np.random.Generator) -> None:
    """Draws bubbles in the gel under the glass, each a pale ring with a highlight."""
    draw = ImageDraw.Draw(overlay)
    for _ in range(rng.integers(3, 14)):
        x, y = rng.uniform(0, 1, 2) * overlay.size
        r = rng.uniform(1.5, 7) * FINE
        draw.ellipse((x - r, y - r, x + r, y + r), outline=(255, 250, 245, 100), width=FINE)
        draw.ellipse((x - r / 2, y - r / 2, x, y - r / 6), fill=(255, 255, 255, 190))


def draw_sticker(overlay: Image.Image, depth: Floats, rng: np.random.Generator) -> None:
    """Draws a coloured disc in the corner farthest from the lesion."""
    height, width = (side - 1 for side in depth.shape)
    corners = [(x, y) for x in (0, width) for y in (0, height)]
    x, y = min(corners, key=lambda corner: float(depth[corner[::-1]]))
    r = max(0, min(rng.uniform(0.2, 0.4) * height, -0.8 * float(depth[y, x])))
    outer, inner = rng.permutation(STICKERS)[:2].tolist()
    for radius, color in ((r, outer), (r / 2, inner)):
        box = (x - radius, y - radius, x + radius, y + radius)
        ImageDraw.Draw(overlay).ellipse([FINE * side for side in box], fill=(*color, 255))


def draw_overlay(depth: Floats, rng: np.random.Generator) -> Image.Image:
    """Draws all distractors on a transparent RGBA image."""
    height, width = depth.shape
    overlay = Image.new("RGBA", (FINE * width, FINE * height))
    if rng.random() < 0.1:
        draw_sticker(overlay, depth, rng)
    for draw, share in ((draw_ruler, 0.2), (draw_bubbles, 0.25), (draw_hairs, 0.4)):
        if rng.random() < share:
            draw(overlay, rng)
    return overlay.resize((width, height), Image.Resampling.BOX)


def vignette(size: Size, rng: np.random.Generator) -> Floats:
    """Returns the dark rim of a dermatoscope's field of view as factors `(height, width)`."""
    y, x = np.mgrid[: size[0], : size[1]] - np.array(size).reshape(2, 1, 1) / 2
    radius, blur = rng.uniform(0.51, 0.62), rng.uniform(0.003, 0.03)
    return sigmoid((radius - np.hypot(y, x) / max(size)) / blur)


# Writing
# ----------------------------------------------------------------------------------------------


def photograph(scene: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Adds blur, a tint and noise, as a lens and a sensor do, and sometimes a dark rim."""
    seen = np.asarray(scene.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1))), np.float64)
    if rng.random() < 0.3:
        seen = seen * vignette((scene.height, scene.width), rng)[..., None]
    noisy = seen * rng.uniform(0.93, 1.04, 3) + rng.normal(0, 2, seen.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def draw_pair(seed: int, index: int) -> tuple[Image.Image, Image.Image]:
    """Draws one pair of a sample, which does not depend on the size of the sample.

    Args:
        seed: Seed of the whole sample.
        index: Number of the pair, from 0.

    Returns:
        The RGB image and its mask, of the same size. The mask has the grey levels 0 and 255.
    """
    rng = np.random.default_rng((seed, index))
    size = SIZES[rng.integers(len(SIZES))]
    skin, depth = draw_skin(size, rng), depth_inside(size, rng)
    painted = paint_lesion(skin, depth, rng).clip(0, 255).astype(np.uint8)
    scene = Image.fromarray(painted).convert("RGBA")
    scene.alpha_composite(draw_overlay(depth, rng))
    mask = Image.fromarray((depth > 0).astype(np.uint8) * 255)
    return photograph(scene.convert("RGB"), rng), mask


def write_sample(output: Path, count: int, seed: int) -> None:
    """Writes `count` pairs under ISIC file names, and a README.txt that describes them."""
    images, masks = output / "input", output / "truth"
    for folder in (images, masks):
        folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image, mask = draw_pair(seed, index)
        name = f"ISIC_{FIRST_ID + index}"
        image.save(images / f"{name}.jpg", quality=85)
        mask.save(masks / f"{name}_segmentation.png", optimize=True)
    (output / "README.txt").write_text(
        f"These {count} images are synthetic and show no patient. tests/make_sample.py drew them\n"
        f"with seed {seed}. Their ids start at ISIC_{FIRST_ID}, above all ids of the ISIC\n"
        "segmentation challenges (2016 to 2018).\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws a sample with the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="output folder (%(default)s)")
    parser.add_argument("--count", type=int, default=64, help="number of pairs (%(default)s)")
    parser.add_argument("--seed", type=int, default=2017, help="seed (%(default)s)")
    options = parser.parse_args(arguments)
    write_sample(options.output, options.count, options.seed)


if __name__ == "__main__":
    main()
