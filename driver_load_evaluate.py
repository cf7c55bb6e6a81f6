"""Loads a trained UNet and segments images with it; scores them where there are masks.

With MODEL it scores the test set that the model file names (give the folders of the training), or
with --all every pair. The mean of several models, or the pretrained model without MODEL, segments
and scores all images; without --mask-dir it only segments them. Without folders it uses the
synthetic sample. "As stored" means as in the model file.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from driver_train_save_evaluate import SAMPLE, non_negative_int, run


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    flag, positive_int = argparse.BooleanOptionalAction, partial(non_negative_int, least=1)
    parser.add_argument("models", nargs="*", metavar="MODEL",
        help=".keras files, or the folder of --folds (default: the pretrained model)")
    add = parser.add_argument_group("data").add_argument
    add("--image-dir", metavar="DIR", help="images (default: the sample)")
    add("--mask-dir", metavar="DIR", help="their masks (default: those of the sample)")
    add("--all", action="store_true", help="score every pair, not only the held-out test set")
    add("--subset", type=positive_int, metavar="N", help="use only the first N images")
    add("--batch-size", type=positive_int, metavar="N", help="images per batch (as stored)")
    add("--bfloat16", action=flag, help="compute in bfloat16 (default: from 100 images, if faster)")
    add("--skip-bad", action="store_true", help="leave out files that are unusable or unpaired")
    add("--fit-masks", action="store_true", help="resize masks of another scale to their images")
    add("--soft-masks", action="store_true", help="grey levels of masks are probabilities")
    add("--inspect", action="store_true", help="count and plot the image sizes")
    add = parser.add_argument_group("results").add_argument
    add("--mirror", action=flag, help="average the predictions of the four flips (as stored)")
    add("--one-region", action=flag, help="keep one region of a mask, without holes (as stored)")
    add("--threshold", type=float, metavar="P", help="pixels of at least P are lesion (as stored)")
    add("--output", default="evaluation", metavar="DIR", help="folder of the results (%(default)s)")
    add("--compare", metavar="SCORES.csv", help="compare with the scores of another run")
    add("--metadata", metavar="FILE.csv", help="score subgroups by this table about the images")
    add("--num-imgs", type=non_negative_int, default=4, metavar="N", help="images to plot (4)")
    options = parser.parse_args(arguments)
    if options.image_dir is None and options.mask_dir is None:
        options.image_dir, options.mask_dir = str(SAMPLE / "input"), str(SAMPLE / "truth")
    if options.threshold is not None and not 0 < options.threshold < 1:
        parser.error(f"--threshold {options.threshold}: expected a probability between 0 and 1")
    if options.image_dir is None:
        parser.error("--mask-dir came without --image-dir: give both, or none for the sample")
    if options.mask_dir is None and (options.compare or options.metadata):
        parser.error("--compare and --metadata need scores: add --mask-dir")
    one = len(options.models) == 1 and not os.path.isdir(options.models[0])
    if options.mask_dir is None and one and not options.all:
        parser.error("without --mask-dir the images cannot be scored: add --all to segment them")
    return options


def load_evaluate(options: argparse.Namespace) -> None:
    import segment

    output = Path(options.output)

    # 1. Load the file names of the images and masks
    if options.mask_dir is None:
        images, masks, unpaired = segment.find_images(options.image_dir), list[str](), []
    else:
        folders = options.image_dir, options.mask_dir
        images, masks = segment.find_image_pairs(*folders, skip_bad=options.skip_bad)
        unpaired = segment.unpaired_files(*folders)
    print(f"{len(images)} images in {options.image_dir}")

    if options.inspect:
        # 2. Inspect the sizes of the images
        sizes = segment.inspect(images, skip_bad=options.skip_bad)
        for (height, width), count in sizes.items():
            print(f"{count:6} images of {height} x {width} pixels (height x width)")
        # 3. Plot the occurrence of the sizes
        segment.save_figure(segment.plot_image_sizes(sizes), output / "image_sizes.png")

    # 4. Load the trained model and select its test set. Of several, the mean segments every image
    few = len(images) < 100  # too few to time both ways of computing
    bfloat16 = False if few and options.bfloat16 is None else options.bfloat16
    files = list[str | Path]()
    for model in options.models or [segment.PRETRAINED]:
        folds = sorted(Path(model).glob("fold[0-9]*/"))
        files += [fold / "model.keras" for fold in folds] or [model]
    models = [segment.load_model(file, bfloat16=bfloat16) for file in files]
    record = segment.model_record(models[0])
    if options.models and len(models) == 1 and masks and not options.all:
        images, masks = segment.stored_test_split(models[0], images, masks)
        print(f"Evaluating the {len(images)} test images held out in training")

    # 5. Check the files, which decodes each once, and predict
    cache = segment.PairCache(fit_masks=options.fit_masks, soft_masks=options.soft_masks)
    frame = {"image_size": models[0].input_shape[1:3], "cache": cache}
    images, masks, findings = segment.usable_pairs(
        images[: options.subset], masks[: options.subset], skip_bad=options.skip_bad,
        image_sizes=[frame["image_size"]], cache=cache, findings=unpaired,
        output_dir=output, verbose=int(os.isatty(1)))
    ids = list(map(segment.image_id, images))
    others = segment.read_scores(options.compare, ids) if options.compare else ()
    table = segment.read_metadata(options.metadata, ids) if options.metadata else None
    seen = segment.image_ids_seen(models, images)
    if seen and masks:
        print(f"Warning: {len(seen)} of these images were used in training ({seen[0]} ...), so "
              "their scores are not test scores.", file=sys.stderr)
    batch_size = options.batch_size or record.batch_size
    test_generator = segment.create_generator(images, masks or None, batch_size=batch_size, **frame)
    predictions = segment.predict_each(models, test_generator, mirror=options.mirror,
                                       one_region=options.one_region, threshold=options.threshold)

    # 6. Show the results: images are scored while the next ones are predicted
    segment.results(
        test_generator, predictions, history=record.history if len(models) == 1 else None,
        num_imgs=options.num_imgs, output_dir=output, findings=findings, compare=others,
        metadata=table,
        notes={"model": ", ".join(map(str, files if options.models else [segment.PRETRAINED.name])),
               "images_used_in_training": len(seen), "compared_with": options.compare,
               "bfloat16": "mixed_bfloat16" in models[0].to_json()})
    print(f"Scores, figures and masks are in {output}")


def main(arguments: Sequence[str] | None = None) -> int:
    return run(load_evaluate, parse_options(arguments))


if __name__ == "__main__":
    sys.exit(main())
