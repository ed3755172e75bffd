"""Channel statistics of image processors, whatever their arithmetic, as means and deviations on pixels from 0 to 1."""

from collections.abc import Mapping
from typing import Any

from modeling_udon.data.preprocessing import ChannelStatistics


def processor_values(processor: Any) -> dict[str, Any]:
    """Returns all values of an image processor."""
    # `to_dict` leaves out what is `None`, which for a processor that does not normalise is just this.
    return {**processor.to_dict(), "do_normalize": bool(getattr(processor, "do_normalize", True))}


def statistics_of_values(values: Mapping[str, Any]) -> ChannelStatistics:
    """Reads the statistics of an image processor from its values, as `preprocessor_config.json` holds them.

    Raises:
        ValueError: If it has none for three channels.
    """
    mean, std = [0.0] * 3, [1.0] * 3
    if values.get("do_normalize", True) and values.get("image_mean") is not None:
        mean, std = list(values["image_mean"]), list(values["image_std"])
    # EfficientNet's processor divides by the deviation a second time, unless it is told not to.
    if values.get("include_top", "EfficientNet" in str(values.get("image_processor_type"))):
        std = [value * again for value, again in zip(std, values["image_std"], strict=True)]
    # Processors that scale to other than 0 to 1: the same arithmetic on pixels from 0 to 1.
    factor = values.get("rescale_factor") or 1 / 255 if values.get("do_rescale", True) is not False else 1.0
    scale, offset = 255 * factor, float(bool(values.get("rescale_offset")))
    if not (abs(scale - 1) < 1e-6 and offset == 0):
        mean, std = [(value + offset) / scale for value in mean], [value / scale for value in std]
    return ChannelStatistics(tuple(mean), tuple(std))  # type: ignore[arg-type]


def statistics_of_processor(processor: Any) -> ChannelStatistics:
    """Reads the statistics of an image processor of transformers.

    Raises:
        ValueError: If it has none for three channels.
    """
    return statistics_of_values(processor_values(processor))
