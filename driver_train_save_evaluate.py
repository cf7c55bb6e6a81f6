"""Trains an improved UNet on ISIC images, saves it, and evaluates it on images it never saw.

Without folders it runs on the synthetic sample in images/sample. OUTPUT receives the model, the
log of the training, the scores, the figures and the predicted masks.
"""

import argparse
import atexit
import contextlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from driver_load_evaluate import (
    find_checked_pairs,
    how_to_predict,
    inspect_sizes,
    natural,
    parse_common_options,
    positive,
    quiet_startup,
    run,
)  # fmt: skip


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument_group("training").add_argument
    add("--image-size", nargs=2, type=positive, metavar=("HEIGHT", "WIDTH"),
        help="frame of the network in pixels, divisible by 16 (default: 96 128; sample: 128 128)")
    add("--val-split", type=float, default=0.2, metavar="SHARE",
        help="share that validates of what the test set leaves; with 0 the last epoch counts as "
             "the best (default: %(default)s)")
    add("--test-split", type=float, metavar="SHARE",
        help="share of all that tests; with 0 nothing is scored (default: 0.03; sample: 0.2)")
    add("--epochs", type=positive, metavar="N",
        help="passes over the training set (default: 60; sample: 20)")
    add("--learning-rate", type=float, default=1e-3, metavar="RATE",
        help="peak of the learning rate (default: %(default)s)")
    add("--seed", type=natural, default=0,
        help="of split, weights, order and augmentation (default: %(default)s)")
    add("--deterministic", action="store_true",
        help="train the same model from the same seed, to the last bit; slower on a GPU")
    add("--bfloat16", action="store_true",
        help="compute in bfloat16 where that is safe: faster on recent processors and GPUs")
    add("--devices", type=positive, default=1, metavar="N",
        help="share each batch among N devices, on TensorFlow or JAX, there also of several hosts; "
             "a shorter last batch of an epoch is left out (default: %(default)s)")
    add("--resume", action="store_true",
        help="go on with a training of the same options that was killed, from OUTPUT/last.keras")
    add("--start-from", metavar="FILE.keras", help="begin with the weights of this model")
    add("--cache", metavar="DIR",
        help="folder for decoded images instead of memory, which the next training need not decode "
             "again; remove it at will (default: 2 GiB of memory)")
    add("--save", metavar="FILE.keras", help="model file (default: OUTPUT/model.keras)")
    add("--no-optimizer", dest="optimizer", action="store_false",
        help="leave out of the final model file what only further training needs")
    options = parse_common_options(parser, arguments, output="output")
    fill_in(options)
    check(options, parser)
    return options


def fill_in(options: argparse.Namespace) -> None:
    """The defaults, which are others for the sample."""
    defaults = {"image_size": (128, 128) if options.on_sample else (96, 128),
                "test_split": 0.2 if options.on_sample else 0.03,
                "epochs": 20 if options.on_sample else 60,
                "batch_size": 4 if options.on_sample else 8, "mirror": True, "one_region": True,
                "save": str(Path(options.output) / "model.keras")}
    for name, default in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    if os.environ.get("KERAS_DISTRIBUTION_PROCESS_ID", "0") != "0" and several_hosts():
        # Every host computes the same, results included; the files of the first one are kept.
        options.output = tempfile.mkdtemp(prefix="host-")
        atexit.register(shutil.rmtree, options.output, ignore_errors=True)
        options.save = str(Path(options.output) / "model.keras")


def several_hosts() -> bool:
    return "KERAS_DISTRIBUTION_NUM_PROCESSES" in os.environ


def check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if options.mask_dir is None:
        parser.error("--image-dir came without --mask-dir: training needs the masks")
    if options.batch_size % options.devices:
        parser.error(f"--batch-size {options.batch_size} cannot be shared among {options.devices} "
                     "devices: give a multiple")
    if several_hosts() and options.resume:
        parser.error("--resume goes on with a training on one host only")
    if not options.save.endswith(".keras"):
        parser.error(f"--save {options.save}: the name of a model file ends in .keras")


def train_save_evaluate(options: argparse.Namespace) -> None:
    import segment

    seed_everything(options)
    output = Path(options.output)

    # 1. Load the file names of the ISIC images and masks
    cache = segment.PairCache(0, options.cache) if options.cache else segment.PairCache()
    height, width = options.image_size
    image_paths, mask_paths, left_out = find_checked_pairs(
        options, (2 * height, 2 * width), cache, options.subset  # as a generator that augments
    )
    print(f"{len(image_paths)} pairs of {options.image_dir}")

    if options.inspect:
        # 2. Inspect the sizes of the images
        sizes = inspect_sizes(image_paths)
        # 3. Plot the occurrence of the sizes
        segment.save_figure(segment.plot_image_sizes(sizes), output / "image_sizes.png")
        for images in segment.find_same_lesions(image_paths, mask_paths):
            print("One lesion:", *map(segment.image_id, images))

    # 4. Split into training, validation and test set, the images of one lesion on one side
    split = segment.train_val_test_split(
        image_paths, mask_paths,
        val_split=options.val_split, test_split=options.test_split, seed=options.seed,
    )
    print("{} to train, {} to validate, {} to test on".format(*(len(part[0]) for part in split)))

    # 5. Create a generator for each set (none for an empty one)
    train_generator, val_generator, test_generator = create_generators(options, split, cache)

    # 6. Create a new UNet
    model = segment.create_model(options.image_size, bfloat16=options.bfloat16)
    segment.model_record(model).origin = tell_origin(options, image_paths, mask_paths, left_out)
    if options.start_from:
        segment.load_weights(model, options.start_from)

    # 7. Train it, the best epoch so far in the file; then save it with its whole history
    train(options, model, train_generator, val_generator, split)
    save(options, model, val_generator)
    if test_generator is None:
        print("No image was put aside to test on (--test-split 0): there is nothing to score")
        return

    # 8. Predict the test set, as far as the results ask for it
    predictions = segment.predict_each(model, test_generator, **how_to_predict(options))

    # 9. Show the results: images are scored while the next are predicted
    record = segment.model_record(model)
    segment.results(test_generator, predictions, num_imgs=options.num_imgs,
                    threshold=record.threshold, history=record.history, output_dir=output,
                    notes={"model": options.save, "left_out": left_out})
    print(f"Scores, figures and masks are in {output}")


def seed_everything(options: argparse.Namespace) -> None:
    import keras

    import segment

    with quiet_startup():
        keras.utils.set_random_seed(options.seed)
        if options.deterministic:
            segment.make_deterministic()


def create_generators(options: argparse.Namespace, split: Any, cache: Any) -> list[Any]:
    """The generators of the training, validation and test set, `None` for an empty one."""
    import segment

    train, val, test = split
    shape = {"image_size": options.image_size, "batch_size": options.batch_size, "cache": cache}
    whole = {**shape, "whole_batches": options.devices > 1}
    return [
        segment.create_generator(*train, shuffle=True, augment=True, seed=options.seed, **whole),
        segment.create_generator(*val, **whole) if val[0] else None,
        segment.create_generator(*test, **shape) if test[0] else None,
    ]


def tell_origin(
    options: argparse.Namespace, image_paths: list[str], mask_paths: list[str],
    left_out: list[str],
) -> dict[str, Any]:  # fmt: skip
    """What the model file says of how the model came about."""
    import numpy
    import PIL

    import segment

    return {
        "options": vars(options), "device": segment.describe_device(), "left_out": left_out,
        "python": platform.python_version(), "numpy": numpy.__version__, "pillow": PIL.__version__,
        "sha256_of_images": segment.checksum(image_paths),
        "sha256_of_masks": segment.checksum(mask_paths),
    }  # fmt: skip


def train(
    options: argparse.Namespace, model: Any, train_generator: Any, val_generator: Any, split: Any
) -> None:
    """Trains the model, or goes on with the training that was interrupted."""
    import segment

    output = Path(options.output)
    if options.resume and not (output / "last.keras").exists():
        print(f"There is no training to go on with in {output}: this one begins anew")
    with telling_the_best_epoch(options.save):
        segment.train_model(
            model, train_generator, val_generator, options.epochs,
            learning_rate=options.learning_rate,
            save_path=options.save, split=split, log_path=output / "training.csv",
            resume_path=output / "last.keras", resume=options.resume,
        )


def save(options: argparse.Namespace, model: Any, val_generator: Any) -> None:
    """Saves the model with the threshold that was given, or is best on the validation set."""
    import segment

    threshold = options.threshold
    if threshold is None and val_generator is not None:
        lesions = segment.predict(model, val_generator, **how_to_predict(options))
        threshold = segment.choose_threshold(val_generator, lesions)
    segment.save_model(model, options.save, threshold=threshold, optimizer=options.optimizer)
    print(f"Saved {options.save}")


@contextlib.contextmanager
def telling_the_best_epoch(path: str) -> Iterator[None]:
    """After Ctrl-C says where the best epoch so far is, if there is one."""
    began = time.time()
    try:
        yield
    except KeyboardInterrupt:
        if os.path.exists(path) and os.path.getmtime(path) >= began:
            print(f"\nThe best epoch so far is in {path}", file=sys.stderr)
        raise


def main(arguments: Sequence[str] | None = None) -> int:
    return run(train_save_evaluate, parse_options(arguments))


if __name__ == "__main__":
    sys.exit(main())
