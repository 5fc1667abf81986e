"""Options: precedence, types, and errors that name the key and what is valid."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from datasets.scenes import SceneOptions
from models import build_dbsnet
from utils.errors import UserError
from utils.inference import weights
from utils.training import config as config_module
from utils.training.config import CONFIGS, TrainConfig, load_config, parse_args
from utils.training.data import build_scene
from utils.training.network import build_network


def write(folder: Path, text: str) -> Path:
    path = folder / "options.yaml"
    path.write_text(text)
    return path


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "lr: 0.5\nepochs: 7\n")
    config, _ = parse_args(["--config", str(path), "--epochs", "9"])
    assert (config.lr, config.epochs, config.batch_size) == (0.5, 9, TrainConfig().batch_size)


def test_the_file_is_chosen_by_finetune() -> None:
    first, _ = parse_args([])
    second, _ = parse_args(["--finetune", "weights.pt"])
    assert (first.epochs, first.save_dir, set(first.datasets)) == (
        30, "runs/stage1", {"YouTube-VOS-2018", "DAVIS-2016", "FBMS"},
    )  # fmt: skip
    assert (second.epochs, second.save_dir, set(second.datasets)) == (25, "runs/finetune", {"DAVIS-2016", "FBMS"})
    assert second.finetune == "weights.pt"
    neither, _ = parse_args(["--finetune", "none"])  # from nothing at all: the first stage
    assert (neither.save_dir, neither.finetune) == ("runs/stage1", None)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_of_the_project_loads(path: Path) -> None:
    load_config(path)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*_*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_published_weights_rotate_as_when_these_were_made(path: Path) -> None:
    assert TrainConfig().rotation_flow == "exact"
    config = load_config(path)
    exact = path.stem == "lite2_all" or set(config.datasets) == {"DUTS-TR"}  # stills are never augmented
    assert config.rotation_flow == ("exact" if exact else "ignore")


@pytest.mark.parametrize(
    "path", [None, *sorted(CONFIGS.glob("*.yaml"))], ids=lambda path: path.stem if path else "none"
)
def test_the_saved_options_read_back_as_they_were(tmp_path: Path, path: Path | None) -> None:
    config = load_config(path, {"scale": ["0.5", "0.7"], "val_size": (64, 96), "network": {"depth": 1}})
    assert load_config(write(tmp_path, config.to_yaml())) == config


def test_numbers_that_yaml_takes_for_strings(tmp_path: Path) -> None:
    text = "lr: 1e-4\nweight_decay: 5e-2\n"
    assert isinstance(yaml.safe_load(text)["lr"], str)  # YAML 1.1 wants a point before the exponent
    config = load_config(write(tmp_path, text))
    assert (config.lr, config.weight_decay) == (1e-4, 5e-2)


def test_flags_of_every_kind() -> None:
    words = (
        "--size 64 96 --datasets DUTS-TR:2 DAVIS-2016 --val_sequences bear --no-tensorboard --compile --val_size none"
    )
    config, _ = parse_args([*words.split(), "--network", "width:32", "streams:[appearance]", "--pretrained", "a b.pt"])
    assert config.size == (64, 96)
    assert config.datasets == {"DUTS-TR": 2.0, "DAVIS-2016": 1.0}
    assert config.val_sequences == ["bear"]
    assert (config.tensorboard, config.compile, config.val_size) == (False, True, None)
    assert config.network == {"width": 32, "streams": ["appearance"]}
    assert config.pretrained == "a b.pt"
    mapping = "encoder:{appearance: tf_efficientnet_lite0, motion: mobilevit}"
    assert parse_args(["--network", mapping])[0].network == {
        "encoder": {"appearance": "tf_efficientnet_lite0", "motion": "mobilevit"}
    }
    assert parse_args(["--val_sequences", "none"])[0].val_sequences == []
    assert parse_args(["--resume", "none"])[0].resume == "none"


@pytest.mark.parametrize("words", [["--local_rank=1"], ["--local-rank=1"], ["--local-rank", "1"]])
def test_local_rank_of_old_and_new_launchers(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert parse_args([*words, "--epochs", "3"])[1] == 1
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert parse_args([])[1] == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bach_size: 2", ["bach_size", "batch_size"]),
        ("zzzzzz: 2", ["zzzzzz", "lr", "epochs", "val_sequences"]),
        ("lr: fast", ["lr", "a number", "'fast'"]),
        ("epochs: 2.5", ["epochs", "a whole number", "2.5"]),
        ("epochs: true", ["epochs", "a whole number"]),
        ("epochs:", ["epochs", "a whole number"]),
        ("epochs: 0", ["epochs", "at least 1", "0"]),
        ("flip: 1.5", ["flip", "0 to 1", "1.5"]),
        ("freeze_stride: 5", ["freeze_stride", "0, 4, 8, 16, 32", "5"]),
        ("amp: fp8", ["amp", "none, bf16, fp16", "fp8"]),
        ("amp: off", ["amp", "none, bf16, fp16", "False"]),  # which YAML takes for a truth value
        ("size: 64", ["size", "2 values", "64"]),
        ("size: [64, 96, 3]", ["size", "2 values"]),
        ("compile: 1", ["compile", "true or false"]),
        ("datasets: [1, [2]]", ["datasets", "names to numbers"]),
        ("datasets: {DAVIS-2016: 0}", ["datasets", "above 0"]),
        ("datasets: {}", ["datasets", "--datasets"]),
        ("datasets: {DAVIS: 1, FBMS: 1, DAVIS-2016: 2}", ["datasets", "DAVIS and DAVIS-2016", "one data set"]),
        ("val_datasets: [FBMS-59, FBMS]", ["val_datasets", "FBMS-59 and FBMS", "one data set"]),
        ("scale: [1, 0.5]", ["scale", "smaller number first"]),
        ("lr: 1\nlr: 2", ["lr", "twice"]),
        ("- lr", ["expected a mapping"]),
        ("lr: [", ["not valid YAML"]),
        ("pretrained: a\nfinetune: b", ["pretrained", "finetune"]),
        ("steps_per_epoch: 1\nsamples_per_epoch: 1", ["steps_per_epoch", "samples_per_epoch"]),
        ("lr: 1e40", ["lr", "0 to 1e+30", "1e+40"]),
        ("lr: .inf", ["lr", "0 to 1e+30", "inf"]),
        ("backbone_lr_factor: 1e20", ["backbone_lr_factor", "0 to 1000"]),
        ("weight_decay: 1e40", ["weight_decay", "0 to 1000"]),
        ("aux_weight: 1e40", ["aux_weight", "0 to 1e+06"]),
        ("seed: 18446744073709551616", ["seed", "18446744073709551616"]),
        ("epochs: 1" + 400 * "0", ["epochs", "at most 1e+09"]),
        ("epochs: '1" + 5000 * "0" + "'", ["epochs", "a whole number"]),
        ("seed: +-5", ["seed", "a whole number", "+-5"]),
        ("save_dir: 2026-02-30", ["not valid YAML", "day is out of range"]),
        ("strides: [1, 1000000000]", ["strides", "1 to 1000"]),
        ("size: [100000, 100000]", ["size", "32 to 16384"]),
        ("datasets: {DAVIS-2016: 1e308, FBMS: 1e308}", ["datasets", "up to 1e+06"]),
        ("lr: {{ lr }}", ["not valid YAML", "name of an option"]),
        ("? [1, 2]\n: 3", ["not valid YAML", "name of an option"]),
        ("flow_drop: 0.6\nframe_drop: 0.6", ["flow_drop and frame_drop", "at most 1 together"]),
        ("strides: []", ["strides", "at least one"]),
        ("val_size: 64", ["val_size", "2 values, each a whole number", "64"]),
        ("network: 3", ["network", "a mapping", "3"]),
    ],
)
def test_errors_of_the_file(tmp_path: Path, text: str, words: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    for word in words:
        assert word in str(caught.value)


def test_errors_of_the_flags(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--batch_szie.*--batch_size"):
        parse_args(["--batch_szie", "2"])
    for words in (
        "--datasets DAVIS-2016:3 FBMS DAVIS-2016",
        "--scene occluder:0.1 occluder:0.9",
        "--network depth:1 depth:2",
    ):
        name = words.split()[-1].split(":")[0]
        with pytest.raises(UserError, match=f"{words.split()[0]}: '{name}' is given twice"):
            parse_args(words.split())
    with pytest.raises(UserError, match=r"--network dilations: '\[1,2' is not YAML"):
        parse_args(["--network", "dilations:[1,2"])
    with pytest.raises(UserError, match=r"--network depth: '2026-02-30' is not YAML"):
        parse_args(["--network", "depth:2026-02-30"])
    with pytest.raises(UserError, match=r"--network: expected key:value, got 'depth'"):
        parse_args(["--network", "depth"])
    with pytest.raises(UserError, match=r"--lr: expected a number, got 'high'"):
        parse_args(["--lr", "high"])
    with pytest.raises(UserError, match=r"nowhere.yaml: no such file.*configs/stage1.yaml"):
        parse_args(["--config", str(tmp_path / "nowhere.yaml")])
    (tmp_path / "weights.pt").write_bytes(b"PK\x03\xff")
    for place in ("weights.pt", ""):
        with pytest.raises(UserError, match=f"{tmp_path / place}: cannot be read as text"):
            parse_args(["--config", str(tmp_path / place)])


def test_a_file_may_be_empty_and_a_list_of_one_a_word(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing yet\n")) == TrainConfig()
    config = load_config(write(tmp_path, "val_sequences: bear\namp: null\nresume: null\nfinetune: null\n"))
    assert (config.val_sequences, config.amp, config.resume, config.finetune) == (["bear"], "none", "none", None)


def test_long_seeds_keep_their_last_digits(tmp_path: Path) -> None:
    number = 2**53 + 1  # a float has no room for it
    assert load_config(write(tmp_path, f"seed: {number}")).seed == number
    config, _ = parse_args(["--seed", str(number)])
    assert config.seed == number and load_config(write(tmp_path, config.to_yaml())).seed == number


def test_a_file_may_merge_mappings(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "network: {<<: {depth: 1, rounds: 0}, rounds: 1}"))
    assert config.network == {"depth": 1, "rounds": 1}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tensorboard", "false"], "--tensorboard takes no value, got 'false'.*--no-tensorboard off"),
        (["--no-augment", "1"], "--augment takes no value, got '1'"),
        (["--no_augment"], "'--no_augment'; did you mean --no-augment"),
        (["weights.pt"], "unexpected word 'weights.pt'; options are given as --name value, their file as --config"),
        (["--lr", "1e-3", "1e-4"], "unexpected word '1e-4' after --lr, which takes one value"),
        (["--lr"], "^--lr: expected one argument$"),  # and no usage of all options above it
        (["--local_rank", "first"], "^--local_rank/--local-rank: invalid int value: 'first'$"),
        (["--save_dir", ""], "--save_dir: expected a string, got ''"),  # a shell's variable that is not set
    ],
)
def test_words_that_no_option_takes(words: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse_args(words)


def test_epochs_are_not_ignored_without_a_word(tmp_path: Path) -> None:
    """Many configurations of the project give max_steps, which goes first."""
    path = str(write(tmp_path, "max_steps: 40"))
    with pytest.raises(UserError, match="--epochs 3 would have no effect.*max_steps 40.*--max_steps 0"):
        parse_args(["--config", path, "--epochs", "3"])
    for steps in ("0", "7"):  # said in the same breath
        config, _ = parse_args(["--config", path, "--epochs", "3", "--max_steps", steps])
        assert (config.epochs, config.max_steps) == (3, int(steps))


def test_a_local_rank_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "first")
    with pytest.raises(UserError, match="LOCAL_RANK: expected a whole number, got 'first'"):
        parse_args([])


def test_every_option_is_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for item in dataclasses.fields(TrainConfig):
        assert f"--{item.name}" in text
        assert item.metadata["help"].split()[0] in text


def test_the_keys_of_mappings_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = capsys.readouterr().out
    network, scene = (re.search(rf"\n  --{name} .*?(?=\n  --)", text, re.DOTALL)[0] for name in ("network", "scene"))
    for key in build_dbsnet("xxs").config:
        assert (key in re.findall(r"\w+", network)) == (key not in ("variant", "flavour"))
    given = {"camera_static": 0.1, "natural": 0.2, "flow_errors": 0.3}
    assert given.keys() <= set(re.findall(r"\w+", scene)) and "camera_speed" not in scene
    assert build_scene(load_config(None, {"scene": given})) == SceneOptions(**given)


def test_a_missing_file_is_told_with_the_place_of_those_that_are_there(tmp_path: Path, monkeypatch) -> None:
    """From another folder `configs/demo.yaml` is no file, and to hear that the project has it helps nobody."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(f"{config_module.CONFIGS.parent} has configs/")):
        parse_args(["--config", "configs/demo.yaml"])
    monkeypatch.setattr(config_module, "CONFIGS", tmp_path / "site-packages" / "configs")
    for words in ([], ["--config", "configs/demo.yaml"]):
        with pytest.raises(UserError, match=r"no such file; there is no .*site-packages.*pip install -e"):
            parse_args(words)
    monkeypatch.setattr(weights, "PUBLISHED_WEIGHTS", tmp_path / "site-packages" / "weights" / "w.safetensors")
    with pytest.raises(UserError, match=r"no weights: there is no .*site-packages.*pip install -e"):
        weights.find_checkpoint(None)


@pytest.mark.parametrize(("key", "value"), [("variant", "s"), ("flavour", "wilile")])
def test_options_of_their_own_are_not_keys_of_network(key: str, value: str) -> None:
    with pytest.raises(UserError, match=f"network: {key} is an option of its own; give --{key} {value}"):
        build_network(load_config(None, {"network": {key: value}}), None)
