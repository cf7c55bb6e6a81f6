"""A network that takes the place of the UNet in tests of what surrounds it."""

import keras

import segment


def tiny_network(
    image_size: segment.Size, *, num_filters: int = 2, dropout: float = 0.3, bfloat16: bool = False
) -> keras.Model:
    """A few layers of each kind; a step of the UNet takes a second."""
    layers = [
        keras.layers.Rescaling(1 / 255, dtype="float32"),
        keras.layers.Conv2D(num_filters, 5, padding="same", name="level1_conv"),
        keras.layers.SpatialDropout2D(dropout),
        keras.layers.GroupNormalization(groups=-1),
        keras.layers.LeakyReLU(0.01),
        keras.layers.Conv2D(1, 1),
        keras.layers.Activation("sigmoid", dtype="float32"),
    ]
    x = inputs = keras.Input((*segment._check_image_size(image_size, 16), 3))
    for layer in layers:
        x = layer(x)
    model = keras.Model(inputs, x)
    return segment._recast(model, "mixed_bfloat16") if bfloat16 else model
