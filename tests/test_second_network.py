"""The network against a second one, written independently in plain PyTorch."""

import numpy as np
import pytest

import segment


def test_the_network_equals_an_independent_one_in_plain_pytorch() -> None:
    torch = pytest.importorskip("torch", reason="the other network is in PyTorch")
    from benchmark import copy_weights, torch_unet

    model, other = segment.create_model((48, 64)), torch_unet()
    assert sum(weight.numel() for weight in other.parameters()) == model.count_params()
    copy_weights(model, other)
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), np.uint8)
    with torch.no_grad():
        lesion = other.eval()(torch.tensor(images).permute(0, 3, 1, 2).float())
    expected = lesion.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(model.predict(images, verbose=0), expected, atol=1e-4)
    assert expected.std() > 0.01
