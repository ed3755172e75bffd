"""The systems that are compared, as what each sets in the config; the rest of a run is the same for all.

Names as in the papers (arXiv 2309.01858 and 2406.08332), but for `centred` and `anchor`, which are ours.
"""

from typing import Any, Literal

SystemName = Literal[
    "udon",
    "centred",
    "anchor",
    "uscrr",
    "uscds",
    "ujcrr",
    "ujcds",
    "specialist",
    "shared_teacher",
    "separate_teachers",
]

_NO_TEACHERS = {"teacher_classification": 0, "logit_distillation": 0, "relational_distillation": 0}
# The backbone as it was before training, as `frozen_teachers` has it with all its values.
_START = {"model": "start", "relational": 1.0, "logit": 0.0, "standardise": "none", "sees": "image"}
_START |= {"pooling": None, "image_size": None, "revision": None, "trust_remote_code": False}
_NO_DISTILLATION = {"logit_distillation": 0, "relational_distillation": 0}

SYSTEMS: dict[str, dict[str, Any]] = {
    # Teachers and student learn together; what is left out of it is said by the sections themselves.
    "udon": {},
    # Ours: one classifier of all classes on features whose mean is taken out.
    "centred": {
        "model": {"centre_features": True},
        "loss": {"classifier": "joint", **_NO_TEACHERS},
        "sampling": {"strategy": "round_robin"},
    },
    # Ours too: one classifier of all classes, domain teachers that have to earn their say, similarities of the start.
    "anchor": {
        "loss": {"classifier": "joint", "gate": "per_image", "relational_distillation": 0.1},
        "sampling": {"strategy": "round_robin"},
        "frozen_teachers": [_START],
    },
    # One shared embedding, a classifier for each domain; round-robin, or by the size of the data sets.
    "uscrr": {"loss": _NO_TEACHERS, "sampling": {"strategy": "round_robin"}},
    "uscds": {"loss": _NO_TEACHERS, "sampling": {"strategy": "dataset_size"}},
    # One shared embedding, one classifier of all classes.
    "ujcrr": {"loss": {"classifier": "joint", **_NO_TEACHERS}, "sampling": {"strategy": "round_robin"}},
    "ujcds": {"loss": {"classifier": "joint", **_NO_TEACHERS}, "sampling": {"strategy": "dataset_size"}},
    # A model for one domain, to be asked on its domain, and its teacher head for `separate_teachers`.
    "specialist": {"loss": _NO_DISTILLATION, "sampling": {"strategy": "round_robin"}},
    # One backbone with a teacher head for each domain, for `separate_teachers`.
    "shared_teacher": {"loss": {"student_classification": 0, **_NO_DISTILLATION}},
    # A student of trained teachers; `teachers` names their runs.
    "separate_teachers": {"loss": {"teacher_classification": 0}, "sampling": {"strategy": "round_robin"}},
}
