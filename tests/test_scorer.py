"""Compares the scores with those of the ISIC challenges' own scorer."""

from pathlib import Path

import numpy as np
import pytest
from conftest import MakePairs, draw_lesion
from isic_challenge_scoring.segmentation import SegmentationScore  # type: ignore[import-untyped]

import segment

SIZES = ((90, 120), (120, 90), (64, 64), (75, 131), (200, 150), (33, 57))


def test_the_six_means_equal_those_of_the_isic_challenge_scorer(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    images, masks = make_pairs(len(SIZES))
    for i, size in enumerate(SIZES):
        for path, picture in zip((images[i], masks[i]), draw_lesion(size, i), strict=True):
            picture.save(path)
    generator = segment.create_generator(images, masks, image_size=(64, 64))
    truth = np.concatenate([generator[i][1] for i in range(len(generator))]).astype(np.float32)
    predictions = np.stack([np.roll(truth[i], 2 * i, axis=1) for i in range(len(SIZES))])
    scores = segment.results(generator, predictions, output_dir=tmp_path / "out")
    jaccard = [score["jaccard"] for score in scores]
    assert min(jaccard) < 0.65 < max(jaccard)  # some are set to 0 in the thresholded Jaccard
    expected = SegmentationScore.from_dir(Path(masks[0]).parent, tmp_path / "out" / "masks")
    means = {name: segment.summarize(scores)[name]["mean"] for name in segment.METRICS}
    means["threshold_jaccard"] = means.pop("thresholded_jaccard")  # the scorer's name for it
    assert means == pytest.approx(expected.macro_average.to_dict(), rel=0, abs=1e-12)
