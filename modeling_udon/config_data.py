"""Section of the training configuration for data: what is made of encoded images, for the student and for teachers."""

from typing import Literal

from pydantic import Field, PositiveFloat, model_validator

from modeling_udon.config_sections import Section

# Share of an image's area that a crop has at least, by augmentation; `crop` cuts 224 x 224 out of 256 x 256.
LEAST_AREA = {"crop": (224 / 256) ** 2, "strong": 0.4}


class DataConfig(Section):
    """From encoded images to batches."""

    image_size: int = Field(224, gt=0, le=8192)
    """Side of the square images that the model sees, in pixels."""
    augmentation: Literal["crop", "strong"] = "crop"
    """`crop`: the paper's square, crop and flip; `strong`: crops of many sizes, turned, other colours, parts erased."""
    targets: Literal["classes", "images"] = "classes"
    """Classes of the training: those of the data, or each image as its own class, which needs no labels."""
    flip: bool = True
    """Whether half of the training images are mirrored; false where left and right matter, as in letters."""
    image_mean: tuple[float, float, float] | None = None
    """Mean of each channel of images in 0..1; `null`: as the backbone's image processor has it."""
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Standard deviation of each channel; `null` as for `image_mean`."""
    max_broken_share: float = Field(0.01, ge=0, lt=1)
    """Share of the images drawn from a domain (of 1,000 at least) that may be broken and replaced; 0: not one."""
    num_workers: int = Field(2, ge=0, le=1024)
    """Processes that decode images, for each training process."""
    teacher_image_size: int | None = Field(None, gt=0, le=8192)
    """Side of the images that teachers see: the student's view of each image with more pixels; `null`: `image_size`."""
    teacher_area: float | None = Field(None, gt=0, le=1)
    """Least share of an image's area that teachers see, around the student's crop; `null`: the student's crop itself.
    """

    @property
    def has_teacher_view(self) -> bool:
        """Whether teachers see another view of an image than the student does."""
        return self.teacher_image_size is not None or self.teacher_area is not None

    @property
    def teacher_size(self) -> int:
        """Side of the images that teachers see, in pixels."""
        return self.teacher_image_size or self.image_size

    @model_validator(mode="after")
    def _teachers_see_more(self) -> "DataConfig":
        if self.teacher_image_size is not None and self.teacher_image_size <= self.image_size:
            raise ValueError(
                f"`teacher_image_size` must be above `image_size`, {self.image_size}. Got {self.teacher_image_size}; "
                "leave it out for the same size"
            )
        least = LEAST_AREA[self.augmentation]
        if self.teacher_area is not None and self.teacher_area < least:
            raise ValueError(
                f"`teacher_area` must be at least the student's, {least:g} for augmentation {self.augmentation!r}. "
                f"Got {self.teacher_area:g}"
            )
        return self
