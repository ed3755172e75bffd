"""The systems that are compared, as what each sets in the config; the rest of a run is the same for all.

Names as in the papers (arXiv 2309.01858 and 2406.08332), but for `centred` and `anchor`, which are ours.
"""

from typing import Any, Literal, NamedTuple

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
    "source_only",
    "uda",
    "kd_stda",
    "kd_mtda",
    "mt_mtda",
    "distil_adapted",
    "affinity",
    "activation_map",
    "okdhp",
]


class Default(NamedTuple):
    """A value that a system fills in and that the config may change; the other values make the system up."""

    value: Any


_NO_TEACHERS = {"teacher_classification": 0, "logit_distillation": 0, "relational_distillation": 0}
# The backbone as it was before training, as `frozen_teachers` has it with all its values.
_START = {"model": "start", "relational": 1.0, "logit": 0.0, "standardise": "none", "sees": "image"}
_START |= {"pooling": None, "image_size": None, "revision": None, "trust_remote_code": False}
_NO_DISTILLATION = {"logit_distillation": 0, "relational_distillation": 0}

# Systems for domains without labels: sources and targets in turn, one class space, no heads that belong to a domain.
_ADAPTED: dict[str, Any] = {
    "loss": _NO_TEACHERS,
    "sampling": {"strategy": "round_robin"},
    "ablation": {"idle_heads": "hold"},
}


def _rising(first: float, last: float) -> dict[str, Any]:
    return {"student_share": Default([first, last])}


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
    # The labelled domains alone, measured on the others.
    "source_only": {**_ADAPTED, "adaptation": {"use_targets": False}},
    # Domain confusion of the student's own features.
    "uda": {**_ADAPTED, "adaptation": {"teachers": "none", "student_confusion": Default(1.0)}},
    # A larger teacher that adapts and a student that it teaches, together.
    "kd_stda": {
        **_ADAPTED,
        "adaptation": {"teachers": "shared", "teacher_confusion": Default(1.0)},
        "optim": _rising(0.1, 0.9),
    },
    # The same with a teacher for each target.
    "kd_mtda": {
        **_ADAPTED,
        "adaptation": {"teachers": "separate", "teacher_confusion": Default(1.0)},
        "optim": _rising(0.1, 0.8),
    },
    # A teacher for each target by gradient reversal, and confusion of the student's features as well.
    "mt_mtda": {
        **_ADAPTED,
        "adaptation": {
            "teachers": "separate",
            "confusion": Default("dann"),
            "teacher_confusion": Default(0.5),
            "student_confusion": Default(0.5),
            "alpha": Default(0.5),
        },
        "optim": _rising(0.1, 0.5),
    },
    # What the online teachers are compared with: a larger model adapts first, and then teaches; it is a run of its own.
    "distil_adapted": {**_ADAPTED, "adaptation": {"teachers": "adapted"}},
    # Similarities of neighbours made alike in source and target, and neighbours in the target made to agree.
    "affinity": {
        **_ADAPTED,
        "adaptation": {"teachers": "none", "affinity_alignment": Default(0.1), "affinity_cleaning": Default(0.1)},
    },
    # A small map in place of some blocks of the teacher, whose bottleneck the student's tokens follow.
    "activation_map": {
        **_ADAPTED,
        "adaptation": {
            "teachers": "shared",
            "feature_distillation": Default(1.0),
            "distillation": Default(0.0),
            "alpha": Default(0.0),
        },
    },
    # Several students on one backbone and an aggregate of them that teaches them back.
    "okdhp": {**_ADAPTED, "adaptation": {"teachers": "none", "branches": Default([{}, {}])}},
}
