"""Domain specification: the name of a domain, and where its images and labels are."""

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
# Domains name the entries of `nn.ModuleDict` and `nn.ParameterDict`, where the name of an attribute cannot be a key.
# Written out, so that reading a configuration does not load PyTorch; a test compares them.
RESERVED_NAMES = frozenset(
    (  # noqa: SIM905
        "T_destination add_module apply bfloat16 buffers call_super_init children clear compile copy cpu cuda double "
        "dump_patches eval extra_repr float forward fromkeys get get_buffer get_extra_state get_parameter "
        "get_submodule half ipu items keys load_state_dict modules mtia named_buffers named_children named_modules "
        "named_parameters parameters pop popitem register_backward_hook register_buffer register_forward_hook "
        "register_forward_pre_hook register_full_backward_hook register_full_backward_pre_hook "
        "register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module register_parameter "
        "register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ set_extra_state set_submodule "
        "setdefault share_memory state_dict to to_empty train training type update values xpu zero_grad "
    ).split()
)


class DomainSpec(BaseModel):
    """Where a domain's images and classes are."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    path: str = Field(min_length=1)
    """A Hub data set, a folder, a builder such as `parquet` or `imagefolder`, a folder written by `save_to_disk`, or
    `demo:NAME`."""
    name: str | None = None
    """Configuration of the data set."""
    revision: str | None = None
    """Commit, tag or branch of a Hub data set."""
    data_dir: str | None = None
    """Folder that the builder reads."""
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    """Files that the builder reads, by split if need be."""
    image_column: str = "image"
    """Column of the images."""
    label_column: str = "label"
    """Column of the classes: integers, ClassLabel or strings; lists of them in query splits with an index of their
    own."""
    labels: Literal["column", "none"] = "column"
    """Whether `label_column` holds the classes of the training images, or there are `none`: then it is not opened for
    them. Query and index splits still have it, since nothing can be measured without."""
    train_split: str = "train"
    """Split to train on."""
    validation_split: str | None = "validation"
    """Queries of the validation; also the index, unless that has a split of its own. `null`: no validation."""
    validation_index_split: str | None = None
    """Index of the validation, if it is not the query set."""
    test_split: str | None = "test"
    """Queries of the test; also the index, unless that has a split of its own. `null`: no test."""
    test_index_split: str | None = None
    """Index of the test, if it is not the query set."""
    streaming: bool = False
    """Whether images are read from Parquet files as they are drawn, instead of all being brought to this disk first."""
    shuffle_window: int = Field(4096, gt=0)
    """Images among which a streamed domain is shuffled; row groups are shuffled as a whole before."""
    license: str | None = None
    """Licence of the images, for the model card."""


def check_domain_name(name: str) -> str:
    """Returns the name, if it can name a teacher head.

    Raises:
        ValueError: If the name has other characters than letters, digits, `_` and `-`, or is a reserved word.
    """
    if not _NAME_PATTERN.fullmatch(name):
        raise ValueError(
            f"`domains` must be named with letters, digits, '_' and '-', starting with a letter or digit. Got {name!r}."
        )
    if name in RESERVED_NAMES:
        raise ValueError(f"`domains` must not be named like a method of a module. Got {name!r}; rename the domain.")
    return name
