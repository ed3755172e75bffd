"""Rows of the table of systems: their configs, their benchmarks, and what a run of them is given."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from modeling_udon.config_file import load_config

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs" / "miniuned"
DOMAINS = {
    "miniuned": ("food", "produce", "packaged", "clothes", "objects", "pomology", "omniglot", "emoji"),
    "glyphs": ("letters", "fonts", "hanzi", "icons", "iconsets"),
}
METRICS = ("R@1", "mMP@5")

# What each budget changes in the configs: of the common start, of all runs after it, of those with a joint classifier.
BUDGETS: dict[str, dict[str, list[str]]] = {
    "cpu": {"pretrain": [], "systems": [], "joint": []},
    # Ten minutes of one H100 for all core rows; the rates are the best of three on the validation split.
    "gpu": {
        "pretrain": ["--train.num_steps", "2400", "--train.batch_size", "512", "--train.mixed_precision", "bf16"],
        "systems": ["--train.num_steps", "1000", "--train.mixed_precision", "bf16", "--eval.every", "500"]
        + ["--optim.lr", "1e-2", "--optim.backbone_lr", "3e-4"],
        "joint": ["--optim.backbone_lr", "1e-4"],
    },
    # Heads on cached features of the frozen start; the rate of each row is the best of `RATES` on the validation split.
    "heads": {
        "pretrain": [],
        "systems": ["--train.heads_only", "true", "--train.num_steps", "600", "--optim.warmup_steps", "50"]
        + ["--data.num_workers", "0", "--eval.every", "100000", "--train.checkpoint_every", "100000"]
        + ["--log.every", "100000"],
        "joint": [],
    },
    # Heads as above at the best rate there, then the last two layers of the start with them, on cached tokens; the rate
    # of the layers is the best of `LAYER_RATES` on the validation split.
    "layers": {
        "pretrain": [],
        "systems": ["--train.trained_layers", "2", "--train.num_steps", "150", "--train.batch_size", "32"]
        + ["--optim.warmup_steps", "15", "--optim.frozen_fraction", "0"]
        + ["--data.num_workers", "0", "--eval.every", "100000", "--train.checkpoint_every", "100000"]
        + ["--log.every", "100000"],
        "joint": [],
    },
}
RATES = ("3e-3", "1e-2", "3e-2")
LAYER_RATES = ("1e-5", "3e-5", "1e-4")
# The best of `RATES` for heads on features of MiniUnED (docs/benchmarks/heads.md), and what these heads then have while
# layers learn, a tenth of it.
HEAD_RATES = {
    **dict.fromkeys(("uscrr", "uscrr_256d", "uscrr_dynamic", "ujcds", "udon", "udon_round_robin"), ("3e-3", "3e-4")),
    **dict.fromkeys(("uscds", "ujcrr", "anchor", "specialist", "centred", "centred_separate"), ("1e-2", "1e-3")),
}

JOINT = ("ujcrr", "ujcds")
CORE = ("uscrr", "uscds", *JOINT, "specialists", "separate_teachers", "separate_student", "udon")
# Rows whose runs learn from those of another. They must see images, so that they are no rows of heads on features.
TEACHERS = {"separate_teachers": "specialists", "separate_student": "shared_teacher"}


@dataclass(frozen=True)
class Settings:
    """Where runs lie and what they are given.

    Attributes:
        data: Folder of the benchmark.
        out: Folder of all runs.
        start: Config of the common start, or a folder with a trained backbone.
        budget: One of `BUDGETS`.
        jobs: Runs at the same time, which share the cores.
        options: More options of every run but the start.
        benchmark: One of `DOMAINS`.
        features: Folder of cached features; `None` for one in `out`.
    """

    data: Path
    out: Path
    start: str
    budget: str
    jobs: int
    options: tuple[str, ...] = ()
    benchmark: str = "miniuned"
    features: Path | None = None

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains of the benchmark."""
        return DOMAINS[self.benchmark]

    @property
    def in_process(self) -> bool:
        """Whether runs train in this process, on what is cached of a frozen start."""
        return self.budget in ("heads", "layers")

    @property
    def start_is_trained(self) -> bool:
        """Whether the start is a folder and no config."""
        return self.start not in starts()

    @property
    def start_dir(self) -> Path:
        """Folder of the run that trains the common start; for a trained start its own folder."""
        return Path(self.start) if self.start_is_trained else self.out / self.start

    @property
    def backbone(self) -> Path:
        """Folder of the trained backbone."""
        return self.start_dir if self.start_is_trained else self.start_dir / "best"

    @cached_property
    def start_digest(self) -> str:
        """Digest of the backbone's weights and configuration."""
        digest = hashlib.sha256()
        for name in ("config.json", "model.safetensors"):
            digest.update((self.backbone / name).read_bytes())
        return digest.hexdigest()

    def run_dir(self, seed: int, run: str, rate: str | None = None) -> Path:
        """Folder of one run; `rate` is its learning rate where several are tried."""
        folder = self.out / f"seed-{seed}" / run
        return folder if rate is None else folder / f"lr-{rate}"


def starts() -> list[str]:
    """Every start that is a config, the default first."""
    return sorted(path.stem for path in CONFIGS.glob("pretrain*.yaml"))


def rows() -> dict[str, str]:
    """Every row with its line, from the first line of its config."""
    own = {path.stem: _first_line(path) for path in sorted(CONFIGS.glob("*.yaml")) if path.stem not in starts()}
    for helper in ("base", "specialist"):
        own.pop(helper)
    own["specialists"] = "A model for each domain, asked on its own domain: a bound, since the domain is given."
    return {name: own[name] for name in (*CORE, *(name for name in own if name not in CORE))}


def runs_of(settings: Settings, row: str) -> list[str]:
    """Names of the runs that a row consists of, without those it learns from."""
    return [f"specialist-{domain}" for domain in settings.domains] if row == "specialists" else [row]


def rates_of(settings: Settings) -> tuple[str, ...]:
    """Learning rates that are tried for a row."""
    return LAYER_RATES if settings.budget == "layers" else RATES


def heads_of(settings: Settings, seed: int, run: str) -> tuple[list[str], Path]:
    """Command line and folder of the heads that a run of the last layers starts from.

    Raises:
        SystemExit: If their learning rate was never chosen.
    """
    row = run.partition("-")[0]
    if row not in HEAD_RATES:
        raise SystemExit(f"`--systems` must be rows of HEAD_RATES with --budget layers. Got {row}; add its rate there.")
    pairs = zip(settings.options[::2], settings.options[1::2], strict=True)
    # What is said of the layers' training says nothing of theirs, but for the precision of the features.
    others = ("--train.mixed_precision", "--data.", "--model.", "--sampling.")
    kept = [word for pair in pairs if pair[0].startswith(others) for word in pair]
    heads = replace(settings, budget="heads", options=tuple(kept))
    folder = settings.run_dir(seed, run) / "heads"
    words = words_of(heads, seed, run, HEAD_RATES[row][0])
    return [*words, "--name", folder.name, "--output_dir", str(folder.parent)], folder


def words_of(settings: Settings, seed: int, run: str, rate: str | None = None) -> list[str]:
    """Command line of one run, its config first."""
    config, *domain = run.split("-")
    folder = settings.run_dir(seed, run, rate)
    words = ["--config", str(CONFIGS / f"{config}.yaml"), "--name", folder.name, "--output_dir", str(folder.parent)]
    words += ["--seed", str(seed), "--model.backbone", str(settings.backbone)]
    words += domain_words(settings, domain or settings.domains)
    if not settings.start_is_trained:
        words += ["--data.image_size", str(_image_size(settings))]
    if settings.in_process:
        words += ["--train.feature_cache", str(settings.features or settings.out / "features")]
    words += BUDGETS[settings.budget]["systems"]
    words += BUDGETS[settings.budget]["joint"] if run in JOINT else []
    words += settings.options
    if settings.budget == "layers":
        words += ["--optim.lr", HEAD_RATES[config][1]]
    if rate is not None:
        words += ["--optim.backbone_lr" if settings.budget == "layers" else "--optim.lr", rate]
    if domain:
        words += ["--train.num_steps", str(num_steps(settings) // len(settings.domains))]
    if config == "separate_teachers":
        for name in settings.domains:
            words += [f"--teachers.{name}", str(settings.run_dir(seed, f"specialist-{name}"))]
    if config == "separate_student":
        words += ["--teachers", str(settings.run_dir(seed, "shared_teacher"))]
    return words


def domain_words(settings: Settings, names: Sequence[str]) -> list[str]:
    """Options that name domains of the benchmark."""
    specs = {name: {"path": str(settings.data / name), "label_column": "class_name"} for name in names}
    return ["--domains", yaml.safe_dump(specs, default_flow_style=True, width=10**6)]


def num_steps(settings: Settings) -> int:
    """Steps of every run on all domains."""
    words = [*BUDGETS[settings.budget]["systems"], *settings.options]
    if "--train.num_steps" in words:
        return int(words[len(words) - words[::-1].index("--train.num_steps")])
    return yaml.safe_load((CONFIGS / "udon.yaml").read_text(encoding="utf-8"))["train"]["num_steps"]


def asked_of(settings: Settings, words: Sequence[str]) -> dict[str, Any]:
    """What decides a run: what its config sets, a digest of the start, and the sizes of the data's files."""
    # Defaults are left out, so that a key that is new does not make all older runs different.
    config = load_config(words[1], words[2:]).model_dump(mode="json", exclude_unset=True)
    # Where it lies decides nothing.
    for section, key in ((config, "output_dir"), (config["train"], "feature_cache"), (config["model"], "backbone")):
        section.pop(key, None)
    sizes = {str(path.relative_to(settings.data)): path.stat().st_size for path in settings.data.rglob("*.parquet")}
    return json.loads(json.dumps({"config": config, "start": settings.start_digest, "data": sizes}))


def check_asked(folder: Path, asked: Mapping[str, Any]) -> None:
    """Refuses a finished run of another start, budget or option, which would be taken for this one.

    Raises:
        SystemExit: If the run was asked for something else, or nobody knows for what.
    """
    path = folder / "asked.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if before != asked:
        what = "of which nobody knows what it was given" if before is None else ", ".join(_differing(before, asked))
        raise SystemExit(
            f"`--out` must hold runs of the same start, data, budget and options. Got {folder}, which differs: {what}; "
            "give another --out, or remove that folder."
        )


def _differing(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted({*before, *now}):
        one, other = before.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += _differing(one, other, f"{prefix}{key}.")
        elif one != other:
            found.append(f"{prefix}{key}")
    return found


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def _image_size(settings: Settings) -> int:
    path = settings.start_dir / "config.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))["data"]["image_size"]
