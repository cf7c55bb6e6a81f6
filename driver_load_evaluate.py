"""Loads a trained UNet and segments images with it, scored where there are masks.

With MODEL it scores the test set that the model file names (give the folders that it was trained
on), or with --all every pair. Without MODEL the trained model that comes along segments and scores
all images; without --mask-dir they are segmented only. Without folders: the synthetic sample.
"""

import argparse
import contextlib
import os
import sys
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
    if options.mask_dir is None:
        image_paths, mask_paths = segment.find_images(options.image_dir), None
        left_out: list[str] = []
    else:
        image_paths, mask_paths, left_out = find_checked_pairs(options)
    print(f"{len(image_paths)} images in {options.image_dir}")

    if options.inspect:
        # 2. Inspect the sizes of the images
        sizes = segment.inspect(image_paths)
        for (height, width), count in sizes.items():
            print(f"{count:6} images of {height} x {width} pixels (height x width)")
        # 3. Plot the occurrence of the sizes
        segment.save_figure(segment.plot_image_sizes(sizes), output / "image_sizes.png")

    # 4. Load the trained model, and with it the names of its test set
    model = segment.load_model(options.model or segment.PRETRAINED)
    record = segment.model_record(model)
    record.threshold = options.threshold or record.threshold
    predict_as_trained(options, record.origin.get("options", {}))
    seen: list[str] = []
    if mask_paths is not None and options.model is not None and not options.all:
        image_paths, mask_paths = segment.stored_test_split(model, image_paths, mask_paths)
        print(f"Evaluating the {len(image_paths)} test images put aside in training")
    elif mask_paths is not None:
        seen = segment.image_ids_seen(model, image_paths[: options.subset])
    if seen:
        print(f"Warning: {len(seen)} of these images were used in training ({seen[0]} ...): their "
              "scores do not count as a test.", file=sys.stderr)

    # 5. Predict the test set
    test_generator = segment.create_generator(
        image_paths[: options.subset], mask_paths and mask_paths[: options.subset],
        image_size=model.input_shape[1:3], batch_size=options.batch_size,
        cache=segment.PairCache(0),  # each image is needed once
    )
    predictions = segment.predict(
        model, test_generator, mirror=options.mirror, one_region=options.one_region
    )

    # 6. Show the results
    segment.results(test_generator, predictions, num_imgs=options.num_imgs,
                    threshold=record.threshold, history=record.history, output_dir=output,
                    notes={"model": str(options.model or segment.PRETRAINED.name),
                           "images_used_in_training": len(seen), "left_out": left_out})
    print(f"Scores, figures and masks are in {output}")


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
        help="images a batch (default: as in training, there 16; sample: 4)")
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


def predict_as_trained(options: argparse.Namespace, trained: Mapping[str, object]) -> None:
    """Fills in what was not given, so that the scores are those of the train driver."""
    for name, default in {"batch_size": 16, "mirror": True, "one_region": True}.items():
        if getattr(options, name) is None:
            value = trained.get(name)  # of a file that anybody may have written
            setattr(options, name, value if type(value) is type(default) else default)


def find_checked_pairs(
    options: argparse.Namespace, cache: "segment.PairCache | None" = None
) -> tuple[list[str], list[str], list[str]]:
    """Images and masks, and the images that were left out; tells what is wrong with the files.

    Those that will be trained on are decoded into the cache on the way, at twice the frame.
    """
    import segment

    image_paths, mask_paths = segment.find_image_pairs(options.image_dir, options.mask_dir)
    height, width = options.image_size if cache else (32, 32)
    findings = segment.check_pairs(
        image_paths, mask_paths, image_size=(2 * height, 2 * width), cache=cache,
        verbose=int(sys.stdout.isatty()),
    )
    for finding in findings:
        print(f"{finding.severity.capitalize()}: {finding.what}", file=sys.stderr)
    bad = sorted({finding.path for finding in findings if finding.severity == "error"})
    if bad and not options.skip_bad:
        raise segment.SegmentError(
            f"{len(bad)} of {len(image_paths)} pairs cannot be used (see above): mend the files, "
            "or leave these pairs out with --skip-bad."
        )
    pairs = zip(image_paths, mask_paths, strict=True)
    good = [(image, mask) for image, mask in pairs if image not in bad]
    return [image for image, _ in good], [mask for _, mask in good], bad


def natural(text: str, least: int = 0) -> int:
    if not text.isdecimal() or not least <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} to 2^32 - 1")
    return int(text)


def positive(text: str) -> int:
    return natural(text, least=1)


def run(steps: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Runs a driver's steps; returns its exit status: 0, 2 after bad input, 130 after Ctrl-C."""
    try:
        with quiet_startup():  # only now, so that --help and wrong options answer at once
            import segment

            sharing = segment.data_parallel(getattr(options, "devices", 1))
            device = segment.describe_device()
        print(f"Device: {device}")
        with sharing:
            steps(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except ImportError as error:
        return complain(f"{error}: pip install -r requirements.txt")
    except OSError as error:
        if error.filename is not None:
            return complain(f"{error.filename}: {error.strerror}; choose another place")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where Python flushes the rest on exit
        return complain(f"what the driver prints cannot be written ({error.strerror})")
    except segment.SegmentError as error:
        return complain(str(error))
    return 0


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
