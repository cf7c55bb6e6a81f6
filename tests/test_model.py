"""The improved UNet, on whichever backend."""

import contextlib
import re
from itertools import pairwise
from typing import Any

import keras
import numpy as np
import pytest

import segment


@pytest.fixture(scope="module")
def unet() -> keras.Model:
    """The network with its defaults."""
    return segment.create_model()


def layers_of(model: keras.Model) -> dict[str, tuple[dict[str, Any], list[str]]]:
    """Configuration and names of the inputs of each layer."""
    return {
        layer["name"]: (
            layer["config"],
            [
                tensor["config"]["keras_history"][0]
                for node in layer["inbound_nodes"]
                for argument in node["args"]
                for tensor in (argument if isinstance(argument, list) else [argument])
            ],
        )
        for layer in model.get_config()["layers"]
    }


def drawing() -> list[tuple[str, str]]:
    """The edges of the published network, one level after the other."""
    edges, above = [], "rescaling"
    for level in range(1, 6):
        name = f"level{level}_context"
        chain = [above, f"level{level}_conv"]
        chain += [f"{name}1_norm", f"{name}1_relu", f"{name}1_conv", f"{name}_dropout"]
        chain += [f"{name}2_norm", f"{name}2_relu", f"{name}2_conv", f"{name}_add"]
        edges += [*pairwise(chain), (f"level{level}_conv", f"{name}_add")]
        above = f"{name}_add"
    edges += [(above, "level5_out_norm"), ("level5_out_norm", "level5_out_relu")]
    below = "level5_out_relu"
    for level in (4, 3, 2, 1):
        up, local = f"level{level}_up", f"level{level}_local" if level > 1 else "level1_final"
        chain = [below, f"{up}_repeat", f"{up}_conv", f"{up}_norm", f"{up}_relu"]
        chain += [f"level{level}_concat"]
        steps = (f"{local}1", f"{local}2") if level > 1 else (local,)
        for step in steps:
            chain += [f"{step}_conv", f"{step}_norm", f"{step}_relu"]
        below = chain[-1]
        edges += [*pairwise(chain)]
        edges += [(f"level{level}_context_add", f"level{level}_concat")]
        edges += [(below, f"level{level}_lesion_conv")] if level < 4 else []
    for level, coarser in ((2, "level3_lesion_conv"), (1, "level2_lesion_add")):
        lesion = f"level{level}_lesion"
        edges += [(coarser, f"{lesion}_repeat"), (f"{lesion}_repeat", f"{lesion}_add")]
        edges += [(f"{lesion}_conv", f"{lesion}_add")]
    return [*edges, ("level1_lesion_add", "lesion_probability"), ("image", "rescaling")]


def test_the_graph_is_that_of_the_paper(unet: keras.Model) -> None:
    layers = layers_of(unet)
    edges = [(source, name) for name, (_, sources) in layers.items() for source in sources]
    assert sorted(edges) == sorted(drawing())


def test_convolutions_have_the_published_kernels_filters_and_strides(unet: keras.Model) -> None:
    layers = layers_of(unet)
    found = {
        name: (config["kernel_size"][0], config["filters"], config["strides"][0])
        for name, (config, _) in layers.items()
        if "filters" in config
    }
    expected = {}
    for level, filters in enumerate((16, 32, 64, 128, 256), 1):
        expected[f"level{level}_conv"] = (3, filters, 1 if level == 1 else 2)
        expected[f"level{level}_context1_conv"] = (3, filters, 1)
        expected[f"level{level}_context2_conv"] = (3, filters, 1)
    for level, filters in ((4, 128), (3, 64), (2, 32), (1, 16)):
        expected[f"level{level}_up_conv"] = (3, filters, 1)
        if level > 1:
            expected[f"level{level}_local1_conv"] = (3, 2 * filters, 1)
            expected[f"level{level}_local2_conv"] = (1, filters, 1)
        if level < 4:
            expected[f"level{level}_lesion_conv"] = (1, 1, 1)
    assert found == {**expected, "level1_final_conv": (3, 32, 1)}


def test_the_model_has_3188435_trainable_parameters(unet: keras.Model) -> None:
    assert unet.count_params() == 3_188_435
    assert sum(int(np.prod(weight.shape)) for weight in unet.trainable_weights) == 3_188_435


def test_activations_leak_a_hundredth_and_dropout_is_three_tenths(unet: keras.Model) -> None:
    configs = [config for config, _ in layers_of(unet).values()]
    assert {config["negative_slope"] for config in configs if "negative_slope" in config} == {0.01}
    assert {config["rate"] for config in configs if "rate" in config} == {0.3}


def test_dropout_takes_whole_feature_maps() -> None:
    model = segment.create_model((32, 32), num_filters=8)
    drop = model.get_layer("level1_context_dropout")
    kept = np.asarray(drop(np.ones((64, 4, 4, 8), np.float32), training=True))
    assert set(kept.min((1, 2)).ravel().round(4)) == {0, np.float32(round(1 / 0.7, 4))}
    np.testing.assert_array_equal(kept.min((1, 2)), kept.max((1, 2)))


def test_each_channel_is_normalized_scaled_and_offset_by_itself(unet: keras.Model) -> None:
    norms = [layer for layer in unet.layers if isinstance(layer, keras.layers.GroupNormalization)]
    assert len(norms) == 2 * 5 + 1 + 4 + 2 * 3 + 1
    assert all(norm.groups == norm.gamma.shape[0] == norm.beta.shape[0] for norm in norms)


@pytest.mark.parametrize(("batch_size", "xla"), [(1, False), (8, False), (9, False), (4, True)])
def test_fused_norms_equal_stock_norms_in_output_and_training(batch_size: int, xla: bool) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(3, 1, (9, 8, 12, 3)), rng.normal(size=(9, 8, 12, 5))
    image = keras.Input((8, 12, 3))
    norm = keras.layers.GroupNormalization(groups=-1, epsilon=1e-5)
    plain = keras.Model(image, norm(keras.layers.Conv2D(5, 3, padding="same")(image)))
    fused = keras.models.clone_model(plain)
    fused.set_weights(plain.get_weights())
    on_processor = keras.backend.backend() == "tensorflow" and "CPU" in segment.describe_device()
    outputs = []
    for model, block in ((plain, contextlib.nullcontext()), (fused, segment._fused_norms(fused))):
        with block:
            assert ("call" in vars(model.layers[-1])) == (on_processor and model is fused)
            compiled = xla and model is fused  # the stock one is the same with or without XLA
            model.compile(keras.optimizers.SGD(0.3), "mse", jit_compile=compiled)
            model.fit(x, y, batch_size, epochs=2, shuffle=False, verbose=0)
            outputs.append(model.predict(x, batch_size, verbose=0))
    assert "call" not in vars(fused.layers[-1])
    for ours, theirs in zip(fused.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-4)


def test_the_model_is_functional_uncompiled_and_saves_no_code() -> None:
    model = segment.create_model((32, 48))
    assert not model.compiled
    assert model.input_shape == (None, 32, 48, 3)
    assert model.output_shape == (None, 32, 48, 1)
    modules = {layer["module"] for layer in model.get_config()["layers"]}
    assert modules == {"keras.layers"}
    assert not any(isinstance(layer, keras.layers.Lambda) for layer in model.layers)


def test_an_image_counts_by_itself_and_as_uint8_or_float_alike() -> None:
    model = segment.create_model((32, 32), num_filters=2)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    probabilities = model.predict(images, verbose=0)
    assert probabilities.dtype == np.float32
    assert 0 <= probabilities.min() < probabilities.max() <= 1
    np.testing.assert_array_equal(model.predict(images.astype(float), verbose=0), probabilities)
    alone = model.predict(images[:1], verbose=0)  # normalized without the rest of its batch
    np.testing.assert_allclose(probabilities[:1], alone, atol=1e-5)


def test_probabilities_are_float32_under_mixed_precision() -> None:
    model = segment.create_model((16, 16), num_filters=2, bfloat16=True)
    assert model.get_layer("level1_conv").compute_dtype == "bfloat16"
    assert {weight.dtype for weight in model.weights} == {"float32"}
    assert keras.config.dtype_policy().name == "float32"
    assert model.predict(np.zeros((1, 16, 16, 3)), verbose=0).dtype == np.float32


def test_one_step_moves_every_weight(eager: None) -> None:
    model = segment.create_model((32, 32), num_filters=2, dropout=0.0)
    model.compile(keras.optimizers.SGD(1.0), loss=segment.dice_loss)
    rng = np.random.default_rng(0)
    images, masks = rng.integers(0, 256, (4, 32, 32, 3)), rng.integers(0, 2, (4, 32, 32, 1))
    before = [np.array(weight) for weight in model.trainable_weights]
    model.train_on_batch(images, masks)
    still = {
        weight.path
        for weight, old in zip(model.trainable_weights, before, strict=True)
        if np.array_equal(weight, old)
    }
    # Normalization takes away what the bias of the convolution right before it adds.
    inputs = {name: sources for name, (_, sources) in layers_of(model).items()}
    edges = [(source, name) for name, sources in inputs.items() for source in sources]
    elsewhere = {source for source, name in edges if "norm" not in name and "dropout" not in name}
    excused = {f"{source}/bias" for source, _ in edges if source not in elsewhere}
    assert still <= excused, still - excused


def test_the_model_can_overfit_four_images(eager: None) -> None:
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
    y, x = np.mgrid[:32, :32]
    centers = ((10, 10), (20, 12), (14, 22), (18, 18))
    masks = np.stack([np.hypot(y - a, x - b) < 7 for a, b in centers])[..., None].astype(np.uint8)
    model = segment.create_model((32, 32), num_filters=4, dropout=0.0)
    model.compile(keras.optimizers.Adam(1e-2), segment.dice_loss)
    model.fit(images, masks, batch_size=4, epochs=22, verbose=0)
    prediction = np.asarray(model(images, training=False)) > 0.5
    assert 2 * (prediction & (masks > 0)).sum() / (prediction.sum() + masks.sum()) > 0.95


@pytest.mark.parametrize("image_size", [(100, 256), (256, 8), (0, 16), (256,)])
def test_a_size_that_16_does_not_divide_is_refused(image_size: Any) -> None:
    with pytest.raises(segment.SegmentError, match=r"image_size is \(.*divisible by 16"):
        segment.create_model(image_size)


def test_a_model_without_filters_is_refused() -> None:
    with pytest.raises(segment.SegmentError, match="num_filters is 0"):
        segment.create_model(num_filters=0)
    with pytest.raises(segment.SegmentError, match=r"dropout is 1\.0"):
        segment.create_model(dropout=1.0)


def test_the_device_is_named_in_one_line() -> None:
    line = segment.describe_device()
    assert re.fullmatch(r"\S+ \(\w+ [\d.+a-z]+, Keras [\d.]+\)", line)
    assert keras.backend.backend() in line


def test_a_model_may_predict_while_it_trains() -> None:
    model = segment.create_model((16, 16), num_filters=1)
    stock = [layer.call for layer in model.layers]
    with segment._fused_norms(model):
        inside = [layer.call for layer in model.layers]
        with segment._fused_norms(model):
            pass
        assert [layer.call for layer in model.layers] == inside
    assert [layer.call for layer in model.layers] == stock


def test_a_setting_of_channels_first_changes_nothing() -> None:
    keras.config.set_image_data_format("channels_first")
    try:
        model = segment.create_model((32, 48), num_filters=2)
    finally:
        keras.config.set_image_data_format("channels_last")
    assert model.output_shape == (None, 32, 48, 1)
