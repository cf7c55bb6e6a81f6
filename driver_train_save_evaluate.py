"""Trains an improved UNet on ISIC images, saves it, and evaluates it on held-out images.

Without folders it runs on the synthetic sample in images/sample. OUTPUT receives the model, the
training log, the scores, the figures and the predicted masks.
"""

import argparse
import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

SAMPLE = Path(__file__).parent / "images" / "sample"
ON_ISIC = {"image_size": (96, 128), "test_split": 0.03, "epochs": 60, "batch_size": 8}
ON_SAMPLE = {"image_size": (128, 128), "test_split": 0.2, "epochs": 20, "batch_size": 4}
SEVERAL_HOSTS = "KERAS_DISTRIBUTION_NUM_PROCESSES"  # of Keras


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    flag, positive_int = argparse.BooleanOptionalAction, partial(non_negative_int, least=1)
    add = parser.add_argument_group("data").add_argument
    add("--image-dir", metavar="DIR", help="images (default: the sample)")
    add("--mask-dir", metavar="DIR", help="their masks (default: those of the sample)")
    add("--subset", type=positive_int, metavar="N", help="use only the first N pairs")
    add("--skip-bad", action="store_true", help="leave out files that are unusable or unpaired")
    add("--fit-masks", action="store_true", help="resize masks of another scale to their images")
    add("--soft-masks", action="store_true", help="grey levels of masks are probabilities")
    add("--inspect", action="store_true", help="count and plot the image sizes")
    add("--val-split", type=fraction, default=0.2, metavar="PART", help="for validation (0.2)")
    add("--val-dir", metavar="DIR", help="images to validate on, instead of a drawn part")
    add("--val-masks", metavar="DIR", help="their masks")
    add("--test-split", type=fraction, metavar="PART", help="for testing (0.03; sample: 0.2)")
    add("--folds", type=partial(non_negative_int, least=2), metavar="K",
        help="cross-validate: K models test all images")
    add("--cache", metavar="DIR", help="keep decoded images here, not only in memory")
    add = parser.add_argument_group("training").add_argument
    add("--image-size", nargs=2, type=positive_int, metavar=("HEIGHT", "WIDTH"),
        help="frame of the network, divisible by 16 (96 128; sample: 128 128)")
    add("--batch-size", type=positive_int, metavar="N", help="images per batch (8; sample: 4)")
    add("--epochs", type=positive_int, metavar="N", help="training epochs (60; sample: 20)")
    add("--learning-rate", type=float, default=1e-3, metavar="RATE", help="initial (%(default)s)")
    add("--dropout", type=fraction, default=0.3, metavar="PART",
        help="fraction of feature maps to drop in training (%(default)s)")
    add("--seed", type=non_negative_int, default=0, help="seed of split, weights and batches (0)")
    add("--deterministic", action="store_true", help="give the same model for the same seed")
    add("--bfloat16", action="store_true", help="compute in bfloat16, faster on recent processors")
    add("--devices", type=positive_int, default=1, metavar="N", help="share batches among devices")
    add("--resume", action="store_true", help="resume a training from OUTPUT/last.keras")
    add("--start-from", metavar="FILE.keras", help="start with the weights of this model")
    add("--save", metavar="FILE.keras",
        help="model file (default: OUTPUT/model.keras, of a fold OUTPUT/foldN/model.keras)")
    add("--no-optimizer", dest="optimizer", action="store_false", help="save a smaller final model")
    add = parser.add_argument_group("results").add_argument
    add("--mirror", action=flag, default=True, help="average the predictions of the four flips")
    add("--one-region", action=flag, default=True, help="keep one region of a mask, without holes")
    add("--threshold", type=float, metavar="P", help="at least P is lesion (chosen by validation)")
    add("--output", default="output", metavar="DIR", help="folder of the results (%(default)s)")
    add("--compare", metavar="SCORES.csv", help="compare with the scores of another run")
    add("--metadata", metavar="FILE.csv", help="score subgroups by this table about the images")
    add("--num-imgs", type=non_negative_int, default=4, metavar="N", help="images to plot (4)")
    options = parser.parse_args(arguments)
    folder, sample = options.image_dir or SAMPLE / "input", os.path.realpath(SAMPLE / "input")
    parser.set_defaults(**(ON_SAMPLE if os.path.realpath(folder) == sample else ON_ISIC))
    if options.image_dir is None and options.mask_dir is None:
        parser.set_defaults(image_dir=str(SAMPLE / "input"), mask_dir=str(SAMPLE / "truth"))
    options = parser.parse_args(arguments)
    for error in wrong_options(options):
        parser.error(error)
    host = os.environ.get("KERAS_DISTRIBUTION_PROCESS_ID", "0")
    if SEVERAL_HOSTS in os.environ and host != "0":  # each computes the same, and writes for itself
        options.output, options.save = str(Path(options.output) / f"host{host}"), None
    return options


def wrong_options(options: argparse.Namespace) -> Iterator[str]:
    if (options.image_dir is None) != (options.mask_dir is None):
        yield "--image-dir and --mask-dir belong together: give both or none"
    if (options.val_dir is None) != (options.val_masks is None):
        yield "--val-dir and --val-masks belong together: give both or none"
    if options.batch_size % options.devices:
        yield f"--batch-size {options.batch_size} cannot be shared among {options.devices} devices"
    if options.resume and SEVERAL_HOSTS in os.environ:
        yield "--resume continues a training on one host only"
    if options.folds and os.path.exists(Path(options.output, f"fold{options.folds + 1}")):
        yield f"--output {options.output} holds more folds, of another run: give a new folder"
    if options.folds and options.save:
        yield "--folds saves a model for each fold: leave out --save"
    if options.threshold is not None and not 0 < options.threshold < 1:
        yield f"--threshold {options.threshold}: expected a probability between 0 and 1"
    if any(side % 16 for side in options.image_size):
        yield f"--image-size {options.image_size}: expected sides divisible by 16"
    if not 0 < options.learning_rate < float("inf"):
        yield f"--learning-rate {options.learning_rate}: expected a number above 0"


def non_negative_int(text: str, least: int = 0) -> int:
    if not text.isdecimal() or not least <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} to 2^32 - 1")
    return int(text)


def fraction(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return float(text)


def train_save_evaluate(options: argparse.Namespace) -> None:
    import keras

    import segment

    if options.deterministic:
        segment.make_deterministic()
    output = Path(options.output)
    twice = tuple(2 * side for side in options.image_size)  # from which augmentation zooms in
    cache = segment.PairCache(
        folder=options.cache, fit_masks=options.fit_masks, soft_masks=options.soft_masks)

    # 1. Load the file names of the images and masks, and check the files, which decodes each once
    sets, findings = [], list[segment.Finding]()
    folders = [(options.image_dir, options.mask_dir), (options.val_dir, options.val_masks)]
    for image_dir, mask_dir in folders if options.val_dir else folders[:1]:
        images, masks = segment.find_image_pairs(image_dir, mask_dir, skip_bad=options.skip_bad)
        findings += segment.unpaired_files(image_dir, mask_dir)
        images, masks, findings = segment.usable_pairs(
            images[: options.subset], masks[: options.subset], skip_bad=options.skip_bad,
            training=True, image_sizes=[twice, options.image_size], cache=cache, findings=findings,
            output_dir=output, verbose=int(os.isatty(1)))
        sets.append((images, masks))
        print(f"{len(images)} pairs in {image_dir}")
    (images, masks), *validation = sets

    if options.inspect:
        # 2. Inspect the sizes of the images
        sizes = segment.inspect(images)
        for (rows, columns), count in sizes.items():
            print(f"{count:6} images of {rows} x {columns} pixels (height x width)")
        # 3. Plot the occurrence of the sizes
        segment.save_figure(segment.plot_image_sizes(sizes), output / "image_sizes.png")
        for lesion in segment.find_same_lesions(images, masks, image_size=twice, cache=cache):
            print("Same lesion:", *map(segment.image_id, lesion))

    # 4. Split into training, validation and test set, the images of one lesion together
    draw = {"val_split": 0 if validation else options.val_split, "seed": options.seed,
            "image_size": twice, "cache": cache}
    if options.folds:
        splits = segment.cross_validation_splits(images, masks, options.folds, **draw)
    else:
        draw["test_split"] = options.test_split
        splits = [segment.train_val_test_split(images, masks, **draw)]
    images, masks = ([path for *_, test in splits for path in test[i]] for i in (0, 1))
    ids = list(map(segment.image_id, images))  # tables of other images stop it before the training
    others = segment.read_scores(options.compare, ids) if options.compare and ids else ()
    table = segment.read_metadata(options.metadata, ids) if options.metadata and ids else None

    shape = {"image_size": options.image_size, "batch_size": options.batch_size, "cache": cache}
    whole = {**shape, "whole_batches": options.devices > 1}
    predictions, seen = list[segment.Predictions](), list[str]()
    for fold, (train, val, test) in enumerate(splits, 1):
        folder = output / f"fold{fold}" if options.folds else output
        (val,) = validation or [val]
        print(f"{len(train[0])} to train, {len(val[0])} to validate, {len(test[0])} to test on")

        # 5. Create a generator for each set
        train_generator = segment.create_generator(
            *train, shuffle=True, augment=True, seed=options.seed, **whole)
        val_generator = segment.create_generator(*val, **whole) if val[0] else None
        test_generator = segment.create_generator(*test, **shape) if test[0] else None

        # 6. Create a new UNet
        keras.utils.set_random_seed(options.seed)
        model = segment.create_model(
            options.image_size, dropout=options.dropout, bfloat16=options.bfloat16)
        left_out = [finding.path for finding in findings if finding.severity == "error"]
        segment.model_record(model).origin = {"options": vars(options), "left_out": left_out}
        if options.start_from:
            segment.load_weights(model, options.start_from)
            if known := segment.image_ids_seen(model, test[0]):
                print(f"Warning: {options.start_from} was trained on {len(known)} of the test "
                      f"images ({known[0]} ...), so their scores are too good.", file=sys.stderr)

        # 7. Train it and save it with its settings
        path, checkpoint = options.save or folder / "model.keras", folder / "last.keras"
        if options.resume and not checkpoint.exists():
            print(f"There is no checkpoint in {folder}: training starts from scratch")
        print(f"Training: the best epoch so far is always in {path}")
        segment.train_model(
            model, train_generator, val_generator, options.epochs, split=(train, val, test),
            learning_rate=options.learning_rate, save_path=path, resume=options.resume,
            resume_path=checkpoint, log_path=folder / "training.csv")
        settings = {name: getattr(options, name) for name in ("mirror", "one_region", "threshold")}
        if val_generator is not None:
            validated = segment.predict(model, val_generator, **settings)
            if options.threshold is None:
                validated.threshold = segment.choose_threshold(val_generator, validated)
            settings |= {"threshold": validated.threshold,
                         "estimate": segment.fit_estimate(val_generator, validated)}
        segment.save_model(model, path, optimizer=options.optimizer, **settings)
        print(f"Saved {path}")

        # 8. Predict the test set
        if test_generator is not None:
            predictions += segment.predict_each(model, test_generator)
            seen += segment.image_ids_seen(model, test[0])

    if not predictions:
        print("No image was held out (--test-split 0): there is nothing to score")
        return

    # 9. Show the results: each image as predicted by the model that has not seen it
    segment.results(
        segment.create_generator(images, masks, **shape), iter(predictions), findings=findings,
        num_imgs=options.num_imgs, output_dir=output, compare=others, metadata=table,
        history=None if options.folds else segment.model_record(model).history,
        notes={"model": str(output if options.folds else path), "compared_with": options.compare,
               "images_used_in_training": len(seen)})
    print(f"Scores, figures and masks are in {output}")


@contextlib.contextmanager
def quiet_startup() -> Iterator[None]:
    """Hides what TensorFlow prints while it starts, except errors; a missing GPU is not one."""
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
            sys.stderr.writelines(line for line in log if re.match(r"[EF]\d{4} (?!.*cuInit)", line))


def run(steps: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Runs the steps of either driver; its options are parsed first, so --help answers at once."""
    try:
        with quiet_startup():
            import segment
    except (ImportError, OSError, ValueError) as error:  # a ValueError for an unknown backend
        how = "run pip install -r requirements.txt, and check KERAS_BACKEND and TMPDIR"
        print(f"Error: {error}: {how}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return segment.run_driver(steps, options, startup=quiet_startup)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(train_save_evaluate, parse_options(arguments))


if __name__ == "__main__":
    sys.exit(main())
