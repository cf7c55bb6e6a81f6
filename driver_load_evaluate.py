"""Loads a trained UNet and segments images with it, scored where there are masks.

With MODEL it scores the test set that the model file names (give the folders that it was trained
on), or with --all every pair. Without MODEL the trained model that comes along segments and scores
all images; without --mask-dir they are segmented only. Without folders: the synthetic sample.
"""

import argparse
import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import segment

SAMPLE = Path(__file__).parent / "images" / "sample"


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument_group("model").add_argument
    add("model", nargs="?", metavar="MODEL",
        help="a .keras file that the training saved (default: the trained model in the box)")
    add("--all", action="store_true",
        help="score every pair of the folder, not only the test set that was put aside")
    options = parse_common_options(parser, arguments, output="evaluation")
    if options.mask_dir is None and options.model is not None and not options.all:
        parser.error("without --mask-dir the images cannot be scored: add --all to segment them")
    return options


def load_evaluate(options: argparse.Namespace) -> None:
    import segment

    output = Path(options.output)

    # 1. Load the file names of the ISIC images and masks
    every = options.model is None or options.all or options.mask_dir is None
    image_paths, mask_paths, left_out = find_checked_pairs(
        options, (64, 64), subset=options.subset if every else None
    )
    print(f"{len(image_paths)} images of {options.image_dir}")

    if options.inspect:
        # 2. Inspect the sizes of the images
        sizes = inspect_sizes(image_paths)
        # 3. Plot the occurrence of the sizes
        segment.save_figure(segment.plot_image_sizes(sizes), output / "image_sizes.png")

    # 4. Load the trained model, and with it the names of its test set
    model = segment.load_model(options.model or segment.PRETRAINED)
    record = segment.model_record(model)
    record.threshold = options.threshold or record.threshold
    predict_as_trained(options, record.origin.get("options", {}))
    seen = segment.image_ids_seen(model, image_paths) if every and mask_paths else []
    if not every:
        image_paths, mask_paths = segment.stored_test_split(
            model, image_paths, mask_paths, left_out=left_out
        )
        print(f"Evaluating the {len(image_paths)} test images put aside in training")
    warn_of_images_seen(seen)

    # 5. Predict the test set, as far as the results ask for it
    test_generator = segment.create_generator(
        image_paths[: options.subset], mask_paths[: options.subset] or None,
        image_size=model.input_shape[1:3], batch_size=options.batch_size,
        cache=segment.PairCache(0),  # each image is needed once
    )
    predictions = segment.predict_each(model, test_generator, **how_to_predict(options))

    # 6. Show the results: images are scored while the next are predicted
    segment.results(test_generator, predictions, num_imgs=options.num_imgs,
                    threshold=record.threshold, history=record.history, output_dir=output,
                    notes={"model": str(options.model or segment.PRETRAINED.name),
                           "images_used_in_training": len(seen), "left_out": left_out})
    print(f"Scores, figures and masks are in {output}")


def warn_of_images_seen(seen: Sequence[str]) -> None:
    if seen:
        print(f"Warning: {len(seen)} of these images were used in training ({seen[0]} ...): their "
              "scores do not count as a test.", file=sys.stderr)


def how_to_predict(options: argparse.Namespace) -> dict[str, bool]:
    return {"mirror": options.mirror, "one_region": options.one_region}


def predict_as_trained(options: argparse.Namespace, trained: Mapping[str, object]) -> None:
    """Fills in what was not given, so that the scores are those of the train driver."""
    for name, default in {"batch_size": 8, "mirror": True, "one_region": True}.items():
        if getattr(options, name) is None:
            value = trained.get(name)  # of a file that anybody may have written
            usual = type(value) is type(default) and value in range(512)  # True and False are too
            setattr(options, name, value if usual else default)


# What both drivers share


def parse_common_options(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, output: str
) -> argparse.Namespace:
    """Adds the options that both drivers have, and parses all of them."""
    add = parser.add_argument_group("data").add_argument
    add("--image-dir", metavar="DIR", help="folder of the images (default: the sample)")
    add("--mask-dir", metavar="DIR", help="folder of their masks (default: that of the sample)")
    add("--subset", type=positive, metavar="N", help="use the first N pairs (or test images) only")
    add("--batch-size", type=positive, metavar="N",
        help="images a batch (default: as in training, there 8; sample: 4)")
    add("--skip-bad", action="store_true", help="leave out pairs with files that cannot be used")
    add("--inspect", action="store_true", help="count and plot the sizes of the images")
    add = parser.add_argument_group("results").add_argument
    add("--mirror", action=argparse.BooleanOptionalAction,
        help="predict the mean of the four mirrorings of each image (default: as in training, "
             "there yes)")
    add("--one-region", action=argparse.BooleanOptionalAction,
        help="keep one region of each mask and fill its holes (default: as in training, there yes)")
    add("--threshold", type=float, metavar="P",
        help="probability from which a pixel is lesion (default: the one in the model file, which "
             "training chooses on the validation images)")
    add("--output", default=output, metavar="DIR",
        help="folder for everything that is written (default: %(default)s)")
    add("--num-imgs", type=natural, default=4, metavar="N",
        help="test images to draw, and as many of the worst (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.threshold is not None and not 0 < options.threshold < 1:
        parser.error(f"--threshold {options.threshold}: expected a probability between 0 and 1")
    if options.image_dir is None and options.mask_dir is not None:
        parser.error("--mask-dir came without --image-dir: give both, or none for the sample")
    if options.image_dir is None:
        options.image_dir, options.mask_dir = str(SAMPLE / "input"), str(SAMPLE / "truth")
    options.on_sample = Path(options.image_dir).resolve() == (SAMPLE / "input").resolve()
    return options


def find_checked_pairs(
    options: argparse.Namespace,
    decoded_size: tuple[int, int],
    cache: "segment.PairCache | None" = None,
    subset: int | None = None,
) -> tuple[list[str], list[str], list[str]]:
    """Images, masks (if there are), and the images left out; tells what is wrong with the files.

    All are decoded in `decoded_size` into the cache, if there is one, on the way.
    """
    import segment

    if options.mask_dir is None:
        image_paths, mask_paths = segment.find_images(options.image_dir), list[str]()
    else:
        image_paths, mask_paths = segment.find_image_pairs(options.image_dir, options.mask_dir)
    image_paths, mask_paths = image_paths[:subset], mask_paths[:subset]
    findings = segment.check_pairs(
        image_paths, mask_paths or None, image_size=decoded_size, cache=cache,
        verbose=int(sys.stdout.isatty()),
    )
    for finding in findings:
        print(f"{finding.severity.capitalize()}: {finding.what}", file=sys.stderr)
    bad = dict.fromkeys(finding.path for finding in findings if finding.severity == "error")
    if len(bad) == len(image_paths):
        raise segment.SegmentError("None of the images can be used (see above): mend the files.")
    if bad and not options.skip_bad:
        raise segment.SegmentError(
            f"{len(bad)} of {len(image_paths)} images cannot be used (see above): mend the files, "
            "or leave these out with --skip-bad."
        )
    good = [i for i, path in enumerate(image_paths) if path not in bad]
    masks = [mask_paths[i] for i in good if mask_paths]
    return [image_paths[i] for i in good], masks, list(bad)


def inspect_sizes(image_paths: Sequence[str]) -> dict[tuple[int, int], int]:
    """Counts the sizes, and prints them."""
    import segment

    sizes = segment.inspect(image_paths)
    for (height, width), count in sizes.items():
        print(f"{count:6} images of {height} x {width} pixels (height x width)")
    return sizes


def natural(text: str, least: int = 0) -> int:
    if not text.isdecimal() or not least <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} to 2^32 - 1")
    return int(text)


def positive(text: str) -> int:
    return natural(text, least=1)


def run(steps: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Runs a driver's steps; returns its exit status: 0, 2 after bad input, 130 after Ctrl-C."""
    with contextlib.suppress(AttributeError):  # names that the terminal has no letters for
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    warnings.showwarning = lambda what, *_: print(f"Warning: {what}", file=sys.stderr)
    try:
        with quiet_startup():  # only now, so that --help and wrong options answer at once
            segment = importlib.import_module("segment")
    except KeyboardInterrupt:
        return interrupted()
    except (ImportError, ValueError) as error:  # a ValueError if there is no such backend
        return complain(f"{error}: pip install -r requirements.txt, and mind KERAS_BACKEND")
    try:
        with quiet_startup():
            sharing = segment.data_parallel(getattr(options, "devices", 1))
            device = segment.describe_device()
        print(f"Device: {device}")
        with sharing:
            steps(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return interrupted()
    except OSError as error:
        if error.filename is not None:
            return complain(f"{error.filename}: {error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where Python flushes the rest on exit
        return complain(f"what the driver prints cannot be written ({error.strerror})")
    except segment.SegmentError as error:
        return complain(str(error))
    return 0


def interrupted() -> int:
    print("\nInterrupted.", file=sys.stderr)
    return 130


def complain(sentence: str) -> int:
    print(f"Error: {sentence}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def quiet_startup() -> Iterator[None]:
    """Drops what TensorFlow writes to stderr while it starts, which no setting of its own stops."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(load_evaluate, parse_options(arguments))


if __name__ == "__main__":
    sys.exit(main())
