"""Loads a trained UNet and segments images with it; scores them where there are masks.

With MODEL it scores the test set that the model file names (give the folders of the training), or
with --all every pair. Without MODEL the pretrained model segments and scores all images; without
--mask-dir it only segments them. Without folders it uses the synthetic sample.
"""

import argparse
import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

SAMPLE = Path(__file__).parent / "images" / "sample"


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", metavar="MODEL",
        help="a .keras file that the training saved (default: the pretrained model)")
    add = parser.add_argument_group("data").add_argument
    add("--image-dir", metavar="DIR", help="folder of the images (default: the sample)")
    add("--mask-dir", metavar="DIR", help="folder of their masks (default: those of the sample)")
    add("--all", action="store_true", help="score every pair, not only the held-out test set")
    add("--subset", type=positive_int, metavar="N", help="use only the first N images")
    add("--batch-size", type=positive_int, metavar="N",
        help="images per batch (default: as in training)")
    add("--skip-bad", action="store_true", help="leave out pairs with unusable files")
    add("--inspect", action="store_true", help="count and plot the image sizes")
    add = parser.add_argument_group("results").add_argument
    add("--mirror", action=argparse.BooleanOptionalAction,
        help="average the predictions of the four flips of each image (default: as in training)")
    add("--one-region", action=argparse.BooleanOptionalAction,
        help="keep one region of each mask and fill its holes (default: as in training)")
    add("--threshold", type=float, metavar="P",
        help="probability from which a pixel is lesion (default: that of the model file)")
    add("--output", default="evaluation", metavar="DIR",
        help="folder for everything that is written (default: %(default)s)")
    add("--num-imgs", type=non_negative_int, default=4, metavar="N",
        help="test images to plot, and as many of the worst (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.threshold is not None and not 0 < options.threshold < 1:
        parser.error(f"--threshold {options.threshold}: expected a probability between 0 and 1")
    if options.image_dir is None and options.mask_dir is not None:
        parser.error("--mask-dir came without --image-dir: give both, or none for the sample")
    if options.image_dir is None:
        options.image_dir, options.mask_dir = str(SAMPLE / "input"), str(SAMPLE / "truth")
    if options.mask_dir is None and options.model is not None and not options.all:
        parser.error("without --mask-dir the images cannot be scored: add --all to segment them")
    return options


def non_negative_int(text: str, least: int = 0) -> int:
    if not text.isdecimal() or not least <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} to 2^32 - 1")
    return int(text)


def positive_int(text: str) -> int:
    return non_negative_int(text, least=1)


def load_evaluate(options: argparse.Namespace) -> None:
    import segment

    output = Path(options.output)

    # 1. Load the file names of the ISIC images and masks
    if options.mask_dir is None:
        image_paths, mask_paths = segment.find_images(options.image_dir), list[str]()
    else:
        image_paths, mask_paths = segment.find_image_pairs(options.image_dir, options.mask_dir)
    print(f"{len(image_paths)} images in {options.image_dir}")

    if options.inspect:
        # 2. Inspect the sizes of the images
        sizes = segment.inspect(image_paths, skip_bad=options.skip_bad)
        for (height, width), count in sizes.items():
            print(f"{count:6} images of {height} x {width} pixels (height x width)")
        # 3. Plot the occurrence of the sizes
        segment.save_figure(segment.plot_image_sizes(sizes), output / "image_sizes.png")

    # 4. Load the trained model and select its test set
    model = segment.load_model(options.model or segment.PRETRAINED)
    record = segment.model_record(model)
    if options.model is not None and not options.all:
        image_paths, mask_paths = segment.stored_test_split(model, image_paths, mask_paths)
        print(f"Evaluating the {len(image_paths)} test images held out in training")

    # 5. Check the files, which decodes each once, and predict
    cache, image_size = segment.PairCache(), model.input_shape[1:3]
    image_paths, mask_paths, left_out = segment.usable_pairs(
        image_paths[: options.subset], mask_paths[: options.subset], image_sizes=[image_size],
        cache=cache, skip_bad=options.skip_bad, verbose=int(sys.stdout.isatty()),
    )
    seen = segment.image_ids_seen(model, image_paths) if mask_paths else []
    if seen:
        print(f"Warning: {len(seen)} of these images were used in training ({seen[0]} ...): their "
              "scores are not those of a test.", file=sys.stderr)
    test_generator = segment.create_generator(
        image_paths, mask_paths or None, image_size=image_size, cache=cache,
        batch_size=options.batch_size or record.batch_size,
    )
    predictions = segment.predict_each(
        model, test_generator, mirror=options.mirror, one_region=options.one_region
    )

    # 6. Show the results: images are scored while the next ones are predicted
    segment.results(test_generator, predictions, num_imgs=options.num_imgs,
                    threshold=options.threshold, history=record.history, output_dir=output,
                    notes={"model": str(options.model or segment.PRETRAINED.name),
                           "images_used_in_training": len(seen), "left_out": left_out})
    print(f"Scores, figures and masks are in {output}")


@contextlib.contextmanager
def quiet_startup() -> Iterator[None]:
    """Hides what TensorFlow prints while it starts, except errors; a missing GPU is none."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    stderr = os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            log.seek(0)
            errors = (line for line in log if re.match(r"[EF]\d{4} ", line))
            sys.stderr.writelines(line for line in errors if "cuInit" not in line)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)  # before TensorFlow starts, so that --help answers at once
    try:
        with quiet_startup():
            import segment
    except (ImportError, ValueError) as error:  # a ValueError for an unknown backend
        print(f"Error: {error}: run pip install -r requirements.txt, and check KERAS_BACKEND",
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return segment.run_driver(load_evaluate, options, startup=quiet_startup)


if __name__ == "__main__":
    sys.exit(main())
