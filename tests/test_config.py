"""A config that cannot be used is refused in one line that names the key, the rule, the value and the way out."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from modeling_udon.config import ConfigError, TrainConfig
from modeling_udon.config_file import dump_config, load_config
from modeling_udon.config_reference import describe_configuration
from modeling_udon.domain_spec import DomainSpec
from modeling_udon.run_record import MOVED, REMOVED, migrate
from modeling_udon.training.resuming import leaves

Write = Callable[..., Path]


def refuse(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim__lrr": 1.0}, "`optim.lrr` is not a key of .*config.yaml; did you mean `lr`?"),
        ({"optmi": {}}, "`optmi` is not a key of .*; did you mean `optim`?"),
        ({"zzz": {}}, "`zzz` is not a key of .*; known here: name, output_dir"),
        ({"domains__blobs": {"pth": "x"}}, "`domains.blobs.pth` is not a key of .*; did you mean `path`?"),
        ({"domains__blobs": {}}, "`domains.blobs.path` is missing in"),
        ({"optim__lr": "fast"}, "`optim.lr`: input should be a valid number.* Got 'fast'"),
        ({"optim__lr": -1}, "`optim.lr`: input should be greater than or equal to 0. Got -1"),
        ({"optim__lr": float("inf")}, "`optim.lr`: input should be a finite number. Got inf"),
        ({"optim__betas": [0.9, 0.0]}, "`optim.betas`: the first must be at least 0, the second above 0"),
        (
            {"optim__betas": [0.9, 1.0]},
            "`optim.betas`: the first must be at least 0, the second above 0, both below 1. Got \\[0.9, 1.0\\]",
        ),
        ({"train__batch_size": 8.5}, "`train.batch_size`: input should be a valid integer.* Got 8.5"),
        ({"train__num_epochs": 2}, "`train`: give either `num_steps` or `num_epochs`, not both"),
        ({"train__num_steps": None}, "`train`: give either `num_steps` or `num_epochs`, not both"),
        ({"train": None}, "`train`: input should be .* Got None"),
        ({"model__backbone": "some/vit"}, "`model`: name either `backbone` .* or `backbone_config` .*, not both"),
        ({"model__backbone_config": None}, "`model`: name either `backbone` .* or `backbone_config`"),
        ({"loss__margin": 0.2}, "`loss`: `margin` must be 0 for kind 'normface'. Got 0.2; use 'cosface' or 'arcface'"),
        ({"model__lora": {"rank": 4}}, "`model.lora.rank` is not a key of"),
        ({"model__lora": {"rank": 4}}, "known here: r, lora_alpha, lora_dropout, target_modules."),
        ({"model__keep_layers": 2}, "`keep_layers` must go with `backbone`"),
        ({"loss__kind": "arcface"}, "`loss`: `margin` must be above 0 and at most 1.5 for kind 'arcface'. Got 0"),
        ({"loss__kind": "arcface", "loss__margin": 4.0}, "at most 1.5 for kind 'arcface'. Got 4"),
        ({"loss__kind": "cosface", "loss__margin": 1.2}, "at most 1 for kind 'cosface'. Got 1.2"),
        ({"loss__kind": "softmax"}, "`loss.kind`: input should be 'normface', 'cosface' or 'arcface'. Got 'softmax'"),
        ({"domains": {}}, "`domains`: .*at least 1"),
        ({"domains": {"a.b": "x"}}, "`domains`: `domains` must be named with letters, .* Got 'a.b'"),
        ({"domains": {"keys": "x"}}, "must not be named like a method of a module. Got 'keys'; rename the domain"),
        ({"domains": {"type": "x"}}, "must not be named like a method of a module. Got 'type'; rename the domain"),
        ({"name": "../up"}, "`name`: .*Got '../up'"),
        ({"push__repo": "udon"}, "`push.repo`: string should match pattern .* Got 'udon'"),
        ({"push__privat": True}, "`push.privat` is not a key of .*; did you mean `private`?"),
        ({"log__trackers": ["mlflow"]}, "`log.trackers.0`: input should be 'tensorboard'.* Got 'mlflow'"),
    ],
)
def test_a_wrong_value_is_named(tiny_config: Write, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(tiny_config(**changes))


def test_all_weights_zero_are_refused(tiny_config: Write) -> None:
    terms = ("student_classification", "teacher_classification", "logit_distillation", "relational_distillation")
    message = refuse(tiny_config(**{f"loss__{term}": 0 for term in terms}))
    assert "`loss`: at least one term must have a weight above 0" in message


def test_the_number_of_further_errors_is_told(tiny_config: Write) -> None:
    assert refuse(tiny_config(optim__lr=-1, optim__eps=0, train__batch_size=0)).endswith(" (2 more)")


def test_an_override_wins_and_may_be_joined_by_an_equals_sign(tiny_config: Write) -> None:
    path = tiny_config()
    config = load_config(path, ["--optim.lr", "3e-4", "--optim.backbone_lr=1e-3", "--train.num_steps", "7"])
    assert (config.optim.lr, config.optim.backbone_lr, config.train.num_steps) == (3e-4, 1e-3, 7)
    assert load_config(path, ["--data.flip=false"]).data.flip is False
    assert load_config(path, ["--log.trackers", "[tensorboard]"]).log.trackers == ("tensorboard",)
    assert load_config(path, ["--domains.blobs.test_split", "null"]).domains["blobs"].test_split is None


def test_a_number_that_yaml_reads_as_text_becomes_a_number(tiny_config: Write) -> None:
    assert yaml.safe_load("lr: 1e-3") == {"lr": "1e-3"}
    config = load_config(tiny_config(optim__lr="1e-3"))
    assert config.optim.lr == 0.001
    assert dump_config(config)["optim"]["lr"] == 0.001


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--optim.lr"], "An override must have a value. Got `--optim.lr` with none; write `--optim.lr VALUE`"),
        (["--optim.lr", "--train.num_steps", "3"], "`--optim.lr` with none; write `--optim.lr VALUE`"),
        (["optim.lr"], "An override must look like `--section.key value`. Got 'optim.lr'"),
        (["--optim.lr", "[1"], "`optim.lr` must have a YAML value. Got '[1'; put it in quotes."),
        (["--name.first", "x"], "`name.first` must lead through sections. Got the value 'run' at `name`."),
        (["--optim.lrr", "1"], "`optim.lrr` is not a key of "),
        (["--lr", "1"], "; did you mean `optim.lr`?"),
        (["--batch_size", "1"], "; did you mean `train.batch_size` or `eval.batch_size`?"),
    ],
)
def test_a_wrong_override_is_named(tiny_config: Write, overrides: list[str], words: str) -> None:
    assert words in refuse(tiny_config(), *overrides)


def test_a_base_is_overridden_section_by_section(tiny_config: Write, tmp_path: Path) -> None:
    base = load_config(tiny_config())
    (tmp_path / "more").mkdir()
    child = tmp_path / "more" / "child.yaml"
    child.write_text("base: ../config.yaml\nname: child\noptim: {lr: 0.5}\ndomains: {blobs: other}\n")
    config = load_config(child)
    assert (config.name, config.optim.lr, config.optim.backbone_lr) == ("child", 0.5, base.optim.backbone_lr)
    assert list(config.domains) == list(base.domains)
    assert config.domains["blobs"].path == "other"
    assert config.train == base.train


def test_domains_of_the_command_line_take_the_place_of_those_in_the_file(tiny_config: Write, tmp_path: Path) -> None:
    config = load_config(tiny_config(), ["--domains.b.test_split", "query"], ["a=/data/a=1", "b=org/b"])
    assert {name: (spec.path, spec.test_split) for name, spec in config.domains.items()} == {
        "a": ("/data/a=1", "test"),
        "b": ("org/b", "query"),
    }
    for wrong in ("a", "a=", "=x"):
        with pytest.raises(ConfigError, match="`--domain` must look like NAME=SOURCE. Got "):
            load_config(tiny_config(), (), [wrong])


def test_no_mixed_precision_may_be_said_as_yaml_reads_it(tiny_config: Write) -> None:
    assert load_config(tiny_config(), ["--train.mixed_precision", "no"]).train.mixed_precision == "no"
    assert load_config(tiny_config(train__mixed_precision=False)).train.mixed_precision == "no"


def test_a_base_may_lie_where_a_variable_says(
    tiny_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_config()
    monkeypatch.setenv("UDON_SOMEWHERE", str(tmp_path))
    child = tmp_path / "else" / "child.yaml"
    child.parent.mkdir()
    child.write_text("base: ${UDON_SOMEWHERE}/config.yaml\nname: child\n")
    assert load_config(child).name == "child"


def test_a_base_gives_no_half_of_a_backbone(tiny_config: Write, tmp_path: Path) -> None:
    tiny_config()
    child = tmp_path / "child.yaml"
    child.write_text("base: config.yaml\nmodel: {backbone_config: {model_type: clip_vision_model}}\n")
    assert load_config(child).model.backbone_config == {"model_type": "clip_vision_model"}


@pytest.mark.parametrize("name", ["vitb16_in21k", "vitb16_clip", "vits16_in21k", "vitl16_in21k"])
def test_the_configs_of_uned_stand_on_what_is_prepared(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "domains.yaml").write_text("domains: {cars: {path: uned/cars, test_index_split: index}}\n")
    monkeypatch.setenv("UNED_DIR", str(tmp_path))
    config = load_config(Path(__file__).parents[1] / "configs" / f"uned_{name}.yaml")
    assert config.name == f"uned_{name}" and list(config.domains) == ["cars"]
    # The paper's settings, which are the defaults as well.
    assert (config.train.batch_size, config.train.num_epochs, config.optim.frozen_fraction) == (128, 10, 0.2)
    assert (config.optim.lr, config.optim.backbone_lr, config.sampling.update_every) == (1e-3, 1e-5, 1000)


def test_a_config_for_domains_of_ones_own_trains_our_system_unless_told_otherwise() -> None:
    path, domains = Path(__file__).parents[1] / "configs" / "base.yaml", ["shoes=data/shoes", "tools=org/tools"]
    config = load_config(path, domains=domains)
    assert (config.system, config.loss.classifier, config.model.centre_features) == ("centred", "joint", True)
    udon = load_config(path, ["--system", "udon"], domains=domains)
    assert (udon.loss.classifier, udon.model.centre_features, udon.loss.needs_teachers) == ("separate", False, True)


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    missing, folder = tmp_path / "missing.yaml", tmp_path
    assert refuse(missing) == f"`config` must be a file that can be read. Got {missing}: No such file or directory."
    assert refuse(folder).endswith("Is a directory.")
    texts = {
        "name: [1": "`config` must be valid YAML. Got ",
        "- a": "`config` must hold keys with values. Got list in ",
        "": "`config` must hold keys with values. Got NoneType in ",
        "base: wrong.yaml": "`base` must not lead back to its own file. Got ",
        "base: nowhere.yaml": "nowhere.yaml: No such file or directory.",
    }
    wrong = tmp_path / "wrong.yaml"
    for text, words in texts.items():
        wrong.write_text(text)
        assert words in refuse(wrong)
    wrong.write_bytes(b"\xff\xfe\xff")
    assert "`config` must be a UTF-8 text file" in refuse(wrong)


def test_a_loop_over_two_bases_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    assert refuse(tmp_path / "a.yaml").endswith("a.yaml again; remove one `base`.")


def test_the_resolved_config_reads_back_as_itself(tiny_config: Write, tmp_path: Path) -> None:
    config = load_config(tiny_config())
    copy = tmp_path / "resolved.yaml"
    copy.write_text(yaml.safe_dump(dump_config(config)))
    assert load_config(copy) == config


def test_every_value_has_a_description() -> None:
    def undescribed(model: Any, prefix: str = "") -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            nested = getattr(field.annotation, "model_fields", None)
            if nested:
                found += undescribed(field.annotation, f"{prefix}{name}.")
            elif not field.description:
                found.append(prefix + name)
        return found

    assert undescribed(TrainConfig) == []


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_the_old_place_of_a_key_names_its_new_one(tiny_config: Write, old: str, new: str) -> None:
    assert f"`{old}` is not a key of" in (message := refuse(tiny_config(**{old.replace(".", "__"): "hold"})))
    assert message.endswith(f"it has moved: write `{new}`.")
    assert message == refuse(tiny_config(), f"--{old}=hold")


@pytest.mark.parametrize("old", REMOVED)
def test_a_key_that_is_gone_says_what_holds_instead(tiny_config: Write, old: str) -> None:
    assert refuse(tiny_config(), f"--{old}=8").endswith(f"; it is gone: {REMOVED[old][1]}; remove it.")


def test_every_key_that_has_moved_is_where_it_is_said_to_be(tiny_config: Write) -> None:
    keys = leaves(dump_config(load_config(tiny_config())))
    assert set(MOVED.values()) <= set(keys) and not {*MOVED, *REMOVED} & set(keys)


def test_the_config_of_an_old_run_is_read_with_its_keys_where_they_are_now() -> None:
    old = {"optim": {"lr": 1, "idle_heads": "hold"}, "sampling": {"signal": "student"}, "data": {"resize_size": None}}
    now = {"optim": {"lr": 1}, "sampling": {}, "data": {}, "ablation": {"idle_heads": "hold", "signal": "student"}}
    assert migrate(old, Path("run/config.yaml")) == now == migrate(now, Path("run/config.yaml"))
    with pytest.raises(ValueError, match=r"^`data\.resize_size` must be null in run/config\.yaml, since .* 0\.1\.0"):
        migrate({"data": {"resize_size": 80}}, Path("run/config.yaml"))


def test_the_reference_page_has_every_key_with_its_meaning() -> None:
    def keys(model: Any, prefix: str) -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            kinds = (field.annotation, *get_args(field.annotation))
            nested = next((kind for kind in kinds if hasattr(kind, "model_fields") and kind is not DomainSpec), None)
            found += keys(nested, f"{prefix}{name}.") if nested else [prefix + name]
        return found

    rows = [row.split(" | ") for row in describe_configuration().splitlines() if row.startswith("| `")]
    expected = keys(TrainConfig, "") + [f"domains.NAME.{name}" for name in DomainSpec.model_fields]
    assert sorted(row[0].strip("| `") for row in rows) == sorted(expected)
    assert all(len(row) == 4 and len(row[3]) > 10 for row in rows)


def test_reading_a_config_loads_neither_torch_nor_transformers() -> None:
    program = "import modeling_udon.config_file, sys; print({'torch', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
