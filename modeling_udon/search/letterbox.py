"""Encoders that pad images to squares, so that nothing of them is cut off."""

from dataclasses import replace

from modeling_udon.data.transforms import Letterbox
from modeling_udon.encoder import Encoder


def is_letterboxed(encoder: Encoder) -> bool:
    """Whether an encoder pads images to squares."""
    return isinstance(encoder.transform, Letterbox)


def letterboxed(encoder: Encoder) -> Encoder:
    """Returns the encoder that pads images to squares with its mean colour; its fingerprint is another."""
    if is_letterboxed(encoder):
        return encoder
    red, green, blue = (min(max(round(255 * mean), 0), 255) for mean in encoder.statistics.mean)
    # A threshold on similarities of cropped images says nothing about these.
    transform = Letterbox(encoder.transform, (red, green, blue))
    return replace(encoder, transform=transform, calibration=None, settings={**encoder.settings, "letterbox": True})
