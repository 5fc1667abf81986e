"""Flow: weights in every key format, padding, direction, files, resuming; and the look of the supplied images."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import threading
import urllib.error
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import get_sampling
from torchvision.models.optical_flow import Raft_Large_Weights, Raft_Small_Weights, raft_large, raft_small

from datasets.errors import DataError
from datasets.flow_colour import flow_to_image
from datasets.video_sequence import VideoSequence
from models.errors import CheckpointError
from utils import parallel
from utils.distributed import Processes
from utils.errors import UserError, exit_on_user_error
from utils.flow import estimation, prepare
from utils.flow.beside import FlowBeside
from utils.flow.estimation import FlowEstimator, FlowSettings, compute_flows, dis_flow, frame_pairs, padding
from utils.flow.files import FlowFiles, begin_flow, read_raw_flow, write_raw_flow
from utils.flow.prepare import FlowTask, pending_frames, write_flows
from utils.flow.raft import convert_raft_state, load_raft, torchvision_key
from utils.video import open_folder

ALONE = Processes(0, 1, torch.device("cpu"))
DIS = FlowEstimator(FlowSettings("dis"))

# ------------------------------------------------------------------------------------------------------------ helpers


def texture(height: int, width: int, shift: tuple[int, int] = (0, 0), seed: int = 0) -> np.ndarray:
    """A smooth random picture whose content is moved by ``shift`` = (right, down) pixels, without a border."""
    noise = np.random.default_rng(seed).random((height + 64, width + 64, 3))
    for _ in range(3):  # a box blur, so that matching has gradients to follow
        noise = (noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1) + np.roll(noise, (1, 1), (0, 1))) / 4
    noise = (noise - noise.min()) / (noise.max() - noise.min())
    top, left = 32 - shift[1], 32 - shift[0]
    return (noise[top : top + height, left : left + width] * 255).astype(np.uint8)


def make_sequence(root: Path, count: int = 3, size: tuple[int, int] = (40, 56), name: str = "clip") -> VideoSequence:
    folder = root / "JPEGImages" / name
    folder.mkdir(parents=True, exist_ok=True)
    for t in range(count):
        Image.fromarray(texture(*size, shift=(2 * t, -t))).save(folder / f"{t:05d}.png")
    frames = tuple(sorted(folder.iterdir()))
    return VideoSequence(name, "made", frames, {}, {}, "nonzero", root / "Flows" / name)


def arguments(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    parallel.add_arguments(parser)
    return parser.parse_args(list(options))


def dis(*options: str) -> argparse.Namespace:
    return arguments("--flow_method", "dis", "--workers", "0", *options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ------------------------------------------------------------------------------------------------------------ weights


def princeton_large_keys() -> list[str]:
    """The keys of princeton-vl's RAFT, by its structure: two basic encoders, a SepConvGRU, an upsampling mask."""

    def conv(name: str) -> list[str]:
        return [f"{name}.weight", f"{name}.bias"]

    def norm(name: str) -> list[str]:
        return [f"{name}.{k}" for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

    keys = []
    for encoder, batch_norm in (("fnet", False), ("cnet", True)):  # fnet's instance norm has no parameters
        keys += conv(f"{encoder}.conv1") + conv(f"{encoder}.conv2")
        keys += norm(f"{encoder}.norm1") if batch_norm else []
        for layer in (1, 2, 3):
            for block in (0, 1):
                prefix = f"{encoder}.layer{layer}.{block}"
                keys += conv(f"{prefix}.conv1") + conv(f"{prefix}.conv2")
                keys += norm(f"{prefix}.norm1") + norm(f"{prefix}.norm2") if batch_norm else []
                if layer > 1 and block == 0:
                    keys += conv(f"{prefix}.downsample.0")
                    keys += norm(f"{prefix}.norm3") + norm(f"{prefix}.downsample.1") if batch_norm else []
    keys += [k for n in ("convc1", "convc2", "convf1", "convf2", "conv") for k in conv(f"update_block.encoder.{n}")]
    keys += [k for gate in "zrq" for n in "12" for k in conv(f"update_block.gru.conv{gate}{n}")]
    keys += conv("update_block.flow_head.conv1") + conv("update_block.flow_head.conv2")
    return keys + conv("update_block.mask.0") + conv("update_block.mask.2")


def test_every_princeton_key_of_the_large_network_has_its_place_in_torchvision():
    keys = [key for key in princeton_large_keys() if ".norm3." not in key]
    assert sorted(map(torchvision_key, keys)) == sorted(raft_large(weights=None).state_dict())


@pytest.mark.parametrize(
    "princeton, torchvision",
    [
        ("fnet.conv1.weight", "feature_encoder.convnormrelu.0.weight"),
        ("fnet.conv2.bias", "feature_encoder.conv.bias"),
        ("cnet.norm1.running_mean", "context_encoder.convnormrelu.1.running_mean"),
        ("cnet.layer3.1.conv2.weight", "context_encoder.layer3.1.convnormrelu2.0.weight"),
        ("cnet.layer2.0.norm2.bias", "context_encoder.layer2.0.convnormrelu2.1.bias"),
        ("cnet.layer2.0.downsample.1.bias", "context_encoder.layer2.0.downsample.1.bias"),
        ("fnet.layer1.0.conv3.bias", "feature_encoder.layer1.0.convnormrelu3.0.bias"),
        ("update_block.encoder.convc1.weight", "update_block.motion_encoder.convcorr1.0.weight"),
        ("update_block.encoder.convf2.bias", "update_block.motion_encoder.convflow2.0.bias"),
        ("update_block.encoder.conv.weight", "update_block.motion_encoder.conv.0.weight"),
        ("update_block.gru.convz1.weight", "update_block.recurrent_block.convgru1.convz.weight"),
        ("update_block.gru.convq2.bias", "update_block.recurrent_block.convgru2.convq.bias"),
        ("update_block.gru.convr.weight", "update_block.recurrent_block.convgru1.convr.weight"),
        ("update_block.flow_head.conv1.weight", "update_block.flow_head.conv1.weight"),
        ("update_block.mask.0.weight", "mask_predictor.convrelu.0.weight"),
        ("update_block.mask.2.bias", "mask_predictor.conv.bias"),
    ],
)
def test_key_map(princeton: str, torchvision: str):
    assert torchvision_key(princeton) == torchvision


def princeton_large_state() -> dict[str, torch.Tensor]:
    """Random weights of the large network under princeton-vl's keys, every tensor different."""
    torch.manual_seed(0)
    target = raft_large(weights=None).state_dict()
    state = {}
    for key in princeton_large_keys():
        source = torchvision_key(key.replace(".norm3.", ".downsample.1."))
        state[f"module.{key}"] = target[source] if target[source].ndim == 0 else torch.randn_like(target[source])
        if ".downsample.1." in key:
            state[f"module.{key.replace('.downsample.1.', '.norm3.')}"] = state[f"module.{key}"].clone()
    return state


def test_large_weights_load_from_all_key_formats_and_containers(tmp_path: Path):
    state = princeton_large_state()
    torch.save(state, tmp_path / "raft-things.pth")
    model = load_raft("raft", str(tmp_path / "raft-things.pth"))
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == 5_257_536  # both implementations, research record
    loaded = model.state_dict()
    assert torch.equal(loaded["mask_predictor.conv.bias"], state["module.update_block.mask.2.bias"])
    assert torch.equal(
        loaded["context_encoder.layer3.0.downsample.1.running_var"], state["module.cnet.layer3.0.norm3.running_var"]
    )
    torch.save({"model": loaded}, tmp_path / "torchvision.pth")  # as torchvision's own training script nests it
    again = load_raft("raft", str(tmp_path / "torchvision.pth")).state_dict()
    assert all(torch.equal(loaded[key], again[key]) for key in loaded)


def test_a_shortcut_norm_that_is_stored_twice_must_be_the_same_twice():
    state = princeton_large_state()
    state["module.cnet.layer2.0.norm3.weight"] += 1
    with pytest.raises(CheckpointError, match="norm3.weight and .*downsample.1.weight"):
        convert_raft_state(state)


def test_weights_of_something_else_are_refused(tmp_path: Path):
    small = raft_small(weights=None).state_dict()
    cases = {
        "other.pth": ({"conv.weight": torch.zeros(1)}, "not weights of RAFT"),
        "missing.pth": ({k: v for k, v in small.items() if "convgru" not in k}, "6 missing"),
        "more.pth": ({**small, "extra": torch.zeros(1)}, "1 unexpected .*extra"),
        "shape.pth": (
            {**small, "context_encoder.conv.bias": torch.zeros(3)},
            r"1 of another shape .*expected \(160,\), got \(3,\)",
        ),
        "list.pth": ([1, 2], "holds a list, expected a dict of tensors"),
    }
    for name, (content, message) in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError, match=message):
            load_raft("raft_small", str(tmp_path / name))
    (tmp_path / "cut.pth").write_bytes((tmp_path / "more.pth").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a readable torch file"):
        load_raft("raft_small", str(tmp_path / "cut.pth"))
    torch.save(small, tmp_path / "small.pth")
    with pytest.raises(CheckpointError, match="add --flow_method raft_small"):
        load_raft("raft", str(tmp_path / "small.pth"))


def test_missing_weights_say_what_to_do_and_nothing_is_computed_instead(tmp_path: Path, monkeypatch):
    with pytest.raises(UserError, match="no such file.*C_T_V1"):
        load_raft("raft", str(tmp_path / "nowhere.pth"))

    def offline(self, *args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(Raft_Large_Weights, "get_state_dict", offline)
    monkeypatch.setattr(Raft_Small_Weights, "get_state_dict", offline)
    sequence = make_sequence(tmp_path)
    for method in ("raft", "raft_small"):
        with pytest.raises(UserError, match=r"could not be downloaded.*--flow_weights FILE.*--flow_method dis"):
            prepare.run(arguments("--flow_method", method, "--workers", "0"), [sequence], ALONE)
    assert not sequence.flow_dir.exists()


@pytest.mark.data
def test_the_public_small_weights_load_to_the_last_tensor(real_data: Path):
    path = real_data / "weights" / "raft-small.pth"
    stored = torch.load(path, map_location="cpu", weights_only=True)
    model = load_raft("raft_small", str(path))
    loaded = model.state_dict()
    assert len(stored) == len(loaded) == 106
    assert sum(p.numel() for p in model.parameters()) == 990_162
    # Both files list the network in the same order, which says independently of names what belongs where.
    assert all(torch.equal(a, b) for a, b in zip(stored.values(), loaded.values()))


@pytest.mark.data
def test_raft_small_reproduces_the_look_of_the_supplied_images(real_data: Path):
    """Mean absolute difference in grey levels; the frames here went through JPEG once more than those used there."""
    davis = real_data / "DAVIS"
    weights = str(real_data / "weights" / "raft-small.pth")
    estimator = FlowEstimator(FlowSettings("raft_small", weights, size=(288, 512), iters=12))
    differences = []
    for name, t in (("dog", 20), ("libby", 48)):  # libby's frame 48 is its last: backward flow
        folder = davis / "JPEGImages" / "480p" / name
        frames = [np.array(Image.open(folder / f"{i:05d}.jpg").convert("RGB")) for i in (t - 1, t, t + 1) if i < 49]
        [(index, flow)] = compute_flows(frames, estimator, indices=[1])
        assert index == 1 and flow.shape == (288, 512, 2) and flow.dtype == np.float32
        supplied = np.array(Image.open(davis / "Flows" / "480p" / name / f"{t:05d}.jpg").convert("RGB"))
        differences.append(np.abs(flow_to_image(flow).astype(int) - supplied).mean())
    # measured: 0.74 and 1.12; colour channels exchanged 1.15 and 1.48; a wrong direction or axis 80 and more
    assert differences[0] < 1 and differences[1] < 1.3, differences


# ---------------------------------------------------------------------------------------------------- pairs and padding


@pytest.mark.parametrize(
    "size, expected",
    [((480, 854), (0, 0, 1, 1)), ((480, 856), (0, 0, 0, 0)), ((100, 131), (14, 14, 2, 3)), ((1, 1), (63, 64, 63, 64))],
)
def test_padding(size, expected):
    assert padding(size, 8, 128) == expected


class Echo(torch.nn.Module):
    """Instead of RAFT: its flow is the first frame's red and green, so that misplaced pixels show."""

    def forward(self, first, second, num_flow_updates):
        assert first.shape == second.shape and first.shape[2] % 8 == 0 and first.shape[3] % 8 == 0
        assert min(first.shape[2:]) >= 128
        # replicate padding: the corner continues the picture's corner
        return [torch.full_like(first[:, :2], torch.nan)] * (num_flow_updates - 1) + [first[:, :2]]


@pytest.mark.parametrize("size", [(136, 128), (100, 131), (3, 200)])
def test_padding_is_taken_off_at_the_right_place_and_the_last_update_is_used(size, monkeypatch):
    monkeypatch.setattr(estimation, "load_raft", lambda method, weights: Echo())
    estimator = FlowEstimator(FlowSettings("raft_small"))
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 256, (2, 2, *size, 3), dtype=np.uint8)
    flow = estimator(first, second)
    assert flow.dtype == np.float32
    np.testing.assert_allclose(flow, first[..., :2] / 127.5 - 1, atol=1e-6)


def test_batches_do_not_change_raft(monkeypatch):
    torch.manual_seed(0)
    model, asked, loaded = raft_small(weights=None).eval(), [], []
    model.register_forward_pre_hook(lambda _, inputs, options: asked.append(options), with_kwargs=True)
    monkeypatch.setattr(estimation, "load_raft", lambda method, weights: loaded.append(method) or model)
    frames = [texture(128, 136, (t, 0)) for t in range(4)]
    estimator = FlowEstimator(FlowSettings("raft_small", iters=2))
    one = dict(compute_flows(frames, estimator, batch_size=1))
    assert loaded == ["raft_small"]  # once, and not for every pair
    three = dict(compute_flows(frames, estimator, batch_size=3))
    assert list(one) == list(three) == [0, 1, 2, 3]
    assert asked == [{"num_flow_updates": 2}] * (4 + 2)
    for t in one:
        np.testing.assert_allclose(one[t], three[t], atol=1e-4)


def test_pairs_look_ahead_and_the_last_one_back_and_every_frame_is_read_once():
    class Counting(list):
        reads: list[int] = []

        def __getitem__(self, index):
            self.reads.append(index)
            return super().__getitem__(index)

    frames = Counting(np.full((4, 5, 3), t, np.uint8) for t in range(6))
    pairs = [(t, int(a[0, 0, 0]), int(b[0, 0, 0])) for t, a, b in frame_pairs(frames)]
    assert pairs == [(0, 0, 1), (1, 1, 2), (2, 2, 3), (3, 3, 4), (4, 4, 5), (5, 5, 4)]
    assert frames.reads == [0, 1, 2, 3, 4, 5]
    frames.reads.clear()
    assert [t for t, _, _ in frame_pairs(frames, indices=[1, 5])] == [1, 5]
    assert frames.reads == [1, 2, 4, 5]


def test_flow_of_one_frame_is_zero_and_its_image_white():
    [(index, flow)] = compute_flows([texture(20, 30)], DIS)
    assert index == 0 and flow.shape == (20, 30, 2) and not flow.any()
    assert (flow_to_image(flow) == 255).all()


def test_frames_of_different_sizes_are_an_error():
    with pytest.raises(DataError, match="frames 1 and 2 have different shapes"):
        list(compute_flows([texture(40, 40), texture(40, 40), texture(40, 48)], DIS))
    # Going on after an interruption takes some pairs only, each of which may be of one size.
    two, others = [texture(40, 40)] * 2, [texture(40, 48)] * 2
    with pytest.raises(DataError, match="frame 2 has another shape than frame 0"):
        list(compute_flows([*two, *others], DIS, indices=[0, 2]))


def test_size_is_height_then_width_and_flow_is_in_its_pixels():
    frames = [texture(80, 120, (0, 0)), texture(80, 120, (8, 4))]
    full = dict(compute_flows(frames, DIS))[0]
    half = dict(compute_flows(frames, FlowEstimator(FlowSettings("dis", size=(40, 60)))))[0]
    assert half.shape == (40, 60, 2)
    np.testing.assert_allclose(np.median(full, (0, 1)), (8, 4), atol=0.3)
    np.testing.assert_allclose(np.median(half, (0, 1)), (4, 2), atol=0.3)


def test_frames_are_shrunk_and_not_thinned_out():
    """A pattern of single pixels is grey from afar; of pixels here and there, it would move where nothing does."""
    fine = (np.indices((80, 120)).sum(0) % 2 * 255).astype(np.uint8)
    ((_, *shrunk), *_) = frame_pairs([np.repeat(fine[..., None], 3, 2)] * 2, (40, 60))
    for frame in shrunk:
        assert frame.shape == (40, 60, 3) and np.abs(frame[2:-2, 2:-2].astype(int) - 127).max() < 10


@pytest.mark.parametrize("size", [(64, 96), (20, 70), (5, 9), (1, 1)])
def test_dis_finds_a_shift_and_takes_any_size(size):
    flow = dis_flow(texture(*size), texture(*size, shift=(3, -2)))
    assert flow.shape == (*size, 2) and flow.dtype == np.float32 and np.isfinite(flow).all()
    if min(size) > 32:
        np.testing.assert_allclose(np.median(flow, (0, 1)), (3, -2), atol=0.2)
        back = dis_flow(texture(*size, shift=(3, -2)), texture(*size))
        np.testing.assert_allclose(np.median(back, (0, 1)), (-3, 2), atol=0.2)


def test_dis_sees_grey_as_eyes_do():
    """Red counts 0.299 and blue 0.114 (ITU-R BT.601): where the two move differently, flow is that of red."""
    still, moved = texture(64, 96), texture(64, 96, shift=(3, -2))
    first, second = np.zeros_like(still), np.zeros_like(still)
    first[..., 0], second[..., 0] = still[..., 0], moved[..., 0]
    first[..., 2] = second[..., 2] = still[..., 2]
    np.testing.assert_allclose(np.median(dis_flow(first, second), (0, 1)), (3, -2), atol=0.2)


def test_settings_are_checked():
    for wrong in (
        {"method": "farneback"},
        {"method": "dis", "weights": "x.pth"},
        {"size": (0, 10)},
        {"iters": 0},
    ):
        with pytest.raises(UserError):
            FlowSettings(**wrong)
    with pytest.raises(UserError, match="--flow_batch 0"):
        list(compute_flows([texture(20, 20)] * 2, DIS, batch_size=0))


# -------------------------------------------------------------------------------------------------------------- files


def test_raw_flow_files(tmp_path: Path):
    import cv2

    flow = np.random.default_rng(0).normal(0, 20, (7, 9, 2)).astype(np.float32)
    write_raw_flow(tmp_path / "a.flo", flow)
    np.testing.assert_array_equal(cv2.readOpticalFlow(str(tmp_path / "a.flo")), flow)  # another reader of the format
    np.testing.assert_array_equal(read_raw_flow(tmp_path / "a.flo"), flow)
    write_raw_flow(tmp_path / "a.npz", flow)
    np.testing.assert_array_equal(read_raw_flow(tmp_path / "a.npz"), flow.astype(np.float16).astype(np.float32))
    for name in ("a.flo", "a.npz"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-5])
        with pytest.raises(DataError, match=name):
            read_raw_flow(tmp_path / name)
    with pytest.raises(DataError):
        read_raw_flow(tmp_path / "nothing.npz")


def test_raw_flow_that_is_damaged_anywhere_is_refused(tmp_path: Path):
    """A machine that stops at once leaves zeros where a file's blocks were not written yet."""
    path = tmp_path / "a.npz"
    write_raw_flow(path, np.random.default_rng(0).normal(0, 20, (24, 40, 2)).cumsum(0))
    whole = path.read_bytes()
    for start in range(0, len(whole) - 100, 20):  # from there on are the names and sizes once more
        path.write_bytes(whole[:start] + bytes(100) + whole[start + 100 :])
        with pytest.raises(DataError, match=r"a\.npz"):
            read_raw_flow(path)


@pytest.mark.parametrize("image_format", ["png", "jpg"])
def test_images_are_the_flow_coloured_under_the_frames_stems(tmp_path: Path, image_format: str):
    sequence = make_sequence(tmp_path)
    assert prepare.run(dis("--flow_format", image_format, "--flow_raw"), [sequence], ALONE) == 3
    assert sorted(p.name for p in sequence.flow_dir.iterdir()) == sorted(
        [f"{t:05d}.{suffix}" for t in range(3) for suffix in (image_format, "npz")] + ["flow.json"]
    )
    frames = [np.array(Image.open(path)) for path in sequence.frames]
    for t, (a, b) in enumerate([(0, 1), (1, 2), (2, 1)]):
        flow = dis_flow(frames[a], frames[b])
        np.testing.assert_allclose(read_raw_flow(sequence.flow_dir / f"{t:05d}.npz"), flow, atol=0.01)
        image = np.array(Image.open(sequence.flow_dir / f"{t:05d}.{image_format}")).astype(int)
        difference = np.abs(image - flow_to_image(flow)).mean()
        assert difference == 0 if image_format == "png" else difference < 4
        if image_format == "jpg":  # hue is the direction of motion: not at half the resolution
            assert get_sampling(Image.open(sequence.flow_dir / f"{t:05d}.jpg")) == 0


def test_going_on_keeps_what_is_good_and_makes_what_is_missing_or_damaged(tmp_path: Path):
    sequence = make_sequence(tmp_path, count=4)
    prepare.run(dis("--flow_raw", "flo"), [sequence], ALONE)
    before = contents(sequence.flow_dir)
    assert prepare.run(dis("--flow_raw", "flo"), [sequence], ALONE) == 0

    (sequence.flow_dir / "00000.png").unlink()
    cut = sequence.flow_dir / "00001.png"
    cut.write_bytes(before["00001.png"][:200])
    (sequence.flow_dir / "00002.flo").unlink()
    untouched = (sequence.flow_dir / "00003.png").stat().st_mtime_ns
    assert prepare.run(dis("--flow_raw", "flo"), [sequence], ALONE) == 3
    assert contents(sequence.flow_dir) == before
    assert (sequence.flow_dir / "00003.png").stat().st_mtime_ns == untouched

    cut.write_bytes(before["00001.png"][:200])  # and of two images of one stem a reader would not know which
    assert prepare.run(dis("--flow_raw", "flo", "--flow_format", "jpg"), [sequence], ALONE) == 1
    assert set(contents(sequence.flow_dir)) == set(before) - {"00001.png"} | {"00001.jpg"}


def test_supplied_images_count_whatever_their_format_and_overwrite_leaves_one_image_per_stem(tmp_path: Path):
    sequence = make_sequence(tmp_path)
    sequence.flow_dir.mkdir(parents=True)
    for stem in sequence.stems:
        Image.new("RGB", (8, 8)).save(sequence.flow_dir / f"{stem}.jpg")
    assert prepare.run(dis(), [sequence], ALONE) == 0
    assert prepare.run(dis("--overwrite"), [sequence], ALONE) == 3
    assert sorted(p.name for p in sequence.flow_dir.iterdir()) == ["00000.png", "00001.png", "00002.png", "flow.json"]


@pytest.mark.parametrize("suffix", [".PNG", ".JPG"])
def test_supplied_images_of_upper_case_suffixes_are_not_made_again_beside_themselves(tmp_path: Path, suffix: str):
    """Readers take them, so a second image of the stem would make the folder ambiguous."""
    sequence = make_sequence(tmp_path)
    sequence.flow_dir.mkdir(parents=True)
    for stem in sequence.stems[:2]:
        picture = Image.new("RGB", (56, 40))
        picture.save(sequence.flow_dir / f"{stem}{suffix}", format="PNG" if suffix == ".PNG" else "JPEG")
    assert prepare.run(dis(), [sequence], ALONE) == 1
    names = [f"00000{suffix}", f"00001{suffix}", "00002.png", "flow.json"]
    assert sorted(path.name for path in sequence.flow_dir.iterdir()) == names
    assert prepare.run(dis("--overwrite"), [sequence], ALONE) == 3
    assert sorted(p.name for p in sequence.flow_dir.iterdir()) == ["00000.png", "00001.png", "00002.png", "flow.json"]


def test_what_is_there_is_read_by_as_many_threads_as_there_are_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each image is decoded to its end: those of YouTube-VOS are half an hour's work of one core."""
    sequence = make_sequence(tmp_path, count=6)
    assert prepare.run(dis(), [sequence], ALONE) == 6
    together, complete = threading.Barrier(3), FlowFiles.complete

    def at_once(files: FlowFiles, flow_dir: Path, stem: str) -> bool:
        together.wait(timeout=30)
        return complete(files, flow_dir, stem)

    monkeypatch.setattr(FlowFiles, "complete", at_once)
    assert prepare.run(dis("--workers", "3"), [sequence], ALONE) == 0


def test_flow_by_raft_is_stored_as_that_by_dis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What --tools flow does by default, with a network in RAFT's place whose flow is known."""
    monkeypatch.setattr(estimation, "load_raft", lambda method, weights: Echo())
    sequence = make_sequence(tmp_path)
    args = arguments("--workers", "0", "--flow_batch", "2", "--flow_iters", "2", "--flow_raw", "flo")
    assert prepare.run(args, [sequence], ALONE) == 3
    for frame in sequence.frames:
        flow = read_raw_flow(sequence.flow_dir / f"{frame.stem}.flo")
        np.testing.assert_allclose(flow, np.asarray(Image.open(frame))[..., :2] / 127.5 - 1, atol=1e-6)
        assert np.array_equal(Image.open(sequence.flow_dir / f"{frame.stem}.png"), flow_to_image(flow))
    record = json.loads((sequence.flow_dir / "flow.json").read_text())
    assert (record["method"], record["weights"], record["iters"]) == ("raft", "C_T_V1", 2)
    before = contents(sequence.flow_dir)
    assert prepare.run(args, [sequence], ALONE) == 0 and contents(sequence.flow_dir) == before
    (sequence.flow_dir / "00001.flo").unlink()
    assert prepare.run(args, [sequence], ALONE) == 1 and contents(sequence.flow_dir) == before
    damaged = Echo()
    damaged.register_forward_hook(lambda _, inputs, flows: [flow * torch.nan for flow in flows])
    monkeypatch.setattr(estimation, "load_raft", lambda method, weights: damaged)
    (sequence.flow_dir / "00002.png").unlink()
    with pytest.raises(DataError, match="flow of frame 2 is not finite; are the weights damaged"):
        prepare.run(args, [sequence], ALONE)
    assert not (sequence.flow_dir / "00002.png").exists()


def test_interrupted_overwriting_leaves_no_supplied_flow_among_the_new(tmp_path: Path):
    """Also where the record is of the same settings, since it tells of the rest of the folder."""
    sequence = make_sequence(tmp_path, count=4)
    sequence.flow_dir.mkdir(parents=True)
    for stem in sequence.stems[:3]:
        Image.new("RGB", (8, 8)).save(sequence.flow_dir / f"{stem}.png")
    settings, files = FlowSettings(method="dis"), FlowFiles()
    assert prepare.run(dis(), [sequence], ALONE) == 1
    pending = pending_frames(sequence.stems, sequence.flow_dir, settings, files, overwrite=True)
    frames = [np.asarray(Image.open(path)) for path in sequence.frames]
    next(write_flows([FlowTask(frames, sequence.stems, sequence.flow_dir, pending)], settings, files, workers=0))
    assert prepare.run(dis(), [sequence], ALONE) == 2
    assert all(Image.open(path).size == (56, 40) for path in sequence.flow_dir.glob("*.png"))


def test_flow_of_frames_that_changed_is_made_again(tmp_path: Path):
    """Of one that has another content, of the frame before it, which looks at it, and of what was the last one."""
    sequence = make_sequence(tmp_path, count=4)
    assert prepare.run(dis(), [sequence], ALONE) == 4
    before = contents(sequence.flow_dir)
    shutil.copytree(tmp_path, tmp_path.with_name("copy"))  # with other times
    copied = make_sequence(tmp_path.with_name("copy"), count=4)
    for path in copied.frames:
        os.utime(path, (1, 1))
    assert prepare.run(dis(), [copied], ALONE) == 0

    Image.fromarray(texture(40, 56, seed=9)).save(sequence.frames[2])
    assert prepare.run(dis(), [sequence], ALONE) == 3  # of the last one, the partner is the one before
    after = contents(sequence.flow_dir)
    assert [before[name] == after[name] for name in sorted(before) if name.endswith("png")] == [
        True,
        False,
        False,
        False,
    ]
    assert prepare.run(dis(), [sequence], ALONE) == 0

    longer = make_sequence(tmp_path, count=6)  # and frame 2 is as it was
    assert prepare.run(dis(), [longer], ALONE) == 5
    fresh = make_sequence(tmp_path.with_name("fresh"), count=6)
    assert prepare.run(dis(), [fresh], ALONE) == 6
    assert contents(longer.flow_dir) == contents(fresh.flow_dir)


def test_supplied_flow_stays_where_frames_changed(tmp_path: Path):
    sequence = make_sequence(tmp_path, count=3)
    sequence.flow_dir.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(sequence.flow_dir / f"{sequence.stems[0]}.png")
    assert prepare.run(dis(), [sequence], ALONE) == 2
    Image.fromarray(texture(40, 56, seed=9)).save(sequence.frames[1])
    assert prepare.run(dis(), [sequence], ALONE) == 2
    assert Image.open(sequence.flow_dir / f"{sequence.stems[0]}.png").size == (8, 8)


def test_weights_of_one_name_are_told_apart_by_their_content(tmp_path: Path):
    settings = []
    for number in range(2):
        path = tmp_path / str(number) / "raft.pth"
        path.parent.mkdir()
        path.write_bytes(bytes([number]))
        settings.append(FlowSettings("raft_small", str(path)))
    sequence, files = make_sequence(tmp_path), FlowFiles()
    older = {key: value for key, value in settings[0].record().items() if key != "weights_sha256"}
    for record, refused in ((settings[0].record(), True), (older, False)):
        begin_flow(sequence.flow_dir, sequence.stems, record)
        files.write(sequence.flow_dir, sequence.stems[0], np.zeros((40, 56, 2), np.float32))
        assert pending_frames(sequence.stems, sequence.flow_dir, settings[0], files) == [1, 2]
        with pytest.raises(UserError, match="weights_sha256") if refused else nullcontext():
            pending_frames(sequence.stems, sequence.flow_dir, settings[1], files)


def test_raw_flow_in_a_png_is_not_written_over(tmp_path: Path):
    """KITTI's form, 16 bits in each of three channels: nothing that the network can read, and somebody's data."""
    cv2 = pytest.importorskip("cv2")
    sequence = make_sequence(tmp_path)
    sequence.flow_dir.mkdir(parents=True)
    for stem in sequence.stems:
        cv2.imwrite(str(sequence.flow_dir / f"{stem}.png"), np.full((40, 56, 3), 1 << 15, dtype=np.uint16))
    before = contents(sequence.flow_dir)
    assert prepare.run(dis(), [sequence], ALONE) == 0
    assert contents(sequence.flow_dir) == before
    # Nor is it shown to the network: not where a data set has it (`tests.test_images`), and not to a user's own video.
    frames = open_folder(sequence.frames[0].parent)
    with pytest.raises(DataError, match=r"00000\.png: 16 bits per channel in this flow image.*colour wheel"):
        prepare.video_flows(dis(), frames, sequence.flow_dir)
    Image.fromarray(flow_to_image(np.ones((40, 56, 2)))).save(sequence.flow_dir / f"{sequence.stems[0]}.png")
    flows = prepare.video_flows(dis(), frames, sequence.flow_dir)
    with pytest.raises(DataError, match=r"00001\.png: 16 bits per channel in this flow image"):
        flows[1]


def test_the_record_does_not_claim_supplied_flow(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sequence = make_sequence(tmp_path, count=4)
    sequence.flow_dir.mkdir(parents=True)
    for stem in sequence.stems[:3]:  # as many sets of flow come: the last frame has none
        Image.new("RGB", (56, 40)).save(sequence.flow_dir / f"{stem}.png")
    before = contents(sequence.flow_dir)
    assert prepare.run(dis(), [sequence], ALONE) == 1
    out = capsys.readouterr().out
    assert f"warning: {sequence.flow_dir}: 3 flow images there are of unknown making" in out
    assert "--flow_dir DIR" in out and "--overwrite" in out

    def record() -> dict[str, object]:
        return json.loads((sequence.flow_dir / "flow.json").read_text())

    assert record()["supplied"] == ["00000", "00001", "00002"] and record()["method"] == "dis"
    assert contents(sequence.flow_dir).items() >= before.items()
    # One that is damaged is made here, and no longer supplied; the others still are.
    (sequence.flow_dir / "00001.png").write_bytes(b"no picture")
    assert prepare.run(dis(), [sequence], ALONE) == 1
    assert record()["supplied"] == ["00000", "00002"]
    with pytest.raises(UserError, match="other settings"):  # two images are DIS's
        prepare.run(dis("--flow_size", "20", "30"), [sequence], ALONE)
    # What is there is supplied only, so the record tells of nothing.
    (sequence.flow_dir / "00001.png").unlink()
    (sequence.flow_dir / "00003.png").unlink()
    assert prepare.run(dis("--flow_size", "20", "30"), [sequence], ALONE) == 2
    assert record()["size"] == [20, 30] and record()["supplied"] == ["00000", "00002"]
    capsys.readouterr()
    assert prepare.run(dis("--overwrite"), [sequence], ALONE) == 4
    assert "supplied" not in record() and "warning" not in capsys.readouterr().out


def test_a_run_that_failed_does_not_lock_the_folder(tmp_path: Path):
    sequence = make_sequence(tmp_path)
    weights = tmp_path / "w.pth"
    torch.save(raft_small(weights=None).state_dict(), weights)
    raft = ("--flow_method", "raft_small", "--flow_weights", str(weights), "--workers", "0")
    with pytest.raises(UserError, match="--flow_batch 0"):
        prepare.run(arguments(*raft, "--flow_batch", "0"), [sequence], ALONE)
    task = FlowTask([texture(40, 56)] * 3, sequence.stems, sequence.flow_dir, [0])
    with pytest.raises(UserError, match="--flow_batch 0"):
        list(write_flows([task], FlowSettings("raft_small", str(weights)), batch_size=0, workers=0))
    assert not sequence.flow_dir.exists()
    # A frame that cannot be read fails later, after the record.
    good = sequence.frames[1].read_bytes()
    sequence.frames[1].write_bytes(b"not an image")
    with pytest.raises(DataError):
        prepare.run(dis("--flow_size", "20", "30"), [sequence], ALONE)
    assert sorted(path.name for path in sequence.flow_dir.iterdir()) == ["flow.json"]
    sequence.frames[1].write_bytes(good)
    assert prepare.run(dis(), [sequence], ALONE) == 3


def test_other_settings_are_not_mixed_in(tmp_path: Path):
    sequence = make_sequence(tmp_path)
    prepare.run(dis(), [sequence], ALONE)
    before = contents(sequence.flow_dir)
    with pytest.raises(UserError, match=r"size None, now \[20, 30\].*--overwrite"):
        prepare.run(dis("--flow_size", "20", "30"), [sequence], ALONE)
    assert contents(sequence.flow_dir) == before
    prepare.run(dis("--flow_size", "20", "30", "--overwrite"), [sequence], ALONE)
    assert Image.open(sequence.flow_dir / "00000.png").size == (30, 20)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_record_is_told_on_a_line_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
):
    """Not behind the progress bar of the look at what is there; the flow stays, and --overwrite makes it again."""
    sequence = make_sequence(tmp_path)
    prepare.run(dis(), [sequence], ALONE)
    record = sequence.flow_dir / "flow.json"
    good = contents(sequence.flow_dir)
    record.write_text(content)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"), exit_on_user_error():
        prepare.run(dis(), [sequence], ALONE)
    said = capsys.readouterr().err.splitlines()
    assert any(line.startswith(f"error: {record}: not a record of flow in JSON") for line in said), said
    assert contents(sequence.flow_dir) == {**good, "flow.json": content.encode()}
    prepare.run(dis("--overwrite"), [sequence], ALONE)
    assert contents(sequence.flow_dir) == good


def test_the_number_of_updates_is_refused_where_there_are_none_to_make():
    with pytest.raises(UserError, match=r"--flow_iters is for RAFT: leave it out, or choose --flow_method raft"):
        prepare.settings_from(dis("--flow_iters", "20"))
    assert prepare.settings_from(arguments())[0].iters == 20  # its authors' number
    assert prepare.settings_from(arguments("--flow_iters", "12"))[0].iters == 12


def test_settings_that_flow_does_not_depend_on_are_no_others():
    assert FlowSettings("dis", iters=5).record() == FlowSettings("dis").record()
    assert FlowSettings(iters=5).record() != FlowSettings().record()
    assert FlowSettings(weights="/here/a.pth").record() == FlowSettings(weights="there/a.pth").record()
    assert FlowSettings(weights="here/a.pth").record() != FlowSettings(weights="here/b.pth").record()


@pytest.mark.parametrize(
    "method, workers, processes, can",
    [("dis", 2, 1, True), ("dis", 1, 1, False), ("dis", 4, 2, False), ("raft", 2, 1, False)],
)
def test_where_flow_is_made_beside_the_network(method: str, workers: int, processes: int, can: bool):
    """Several processes would each wait for flow that another one makes and does not tell of."""
    args = arguments("--flow_method", method, "--workers", str(workers))
    assert prepare.can_run_beside(args, processes) == can


def test_a_size_of_another_aspect_is_warned_of_with_one_that_keeps_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """check and training take such flow for that of other frames, long after it was made."""
    wide, square = make_sequence(tmp_path), make_sequence(tmp_path, size=(40, 40), name="square")
    prepare.run(dis("--flow_size", "20", "28"), [wide], ALONE)
    assert "warning" not in capsys.readouterr().out
    prepare.run(dis("--flow_size", "32", "56", "--overwrite"), [wide, square], ALONE)
    out = capsys.readouterr().out
    assert out.count("warning") == 1 and "--flow_size 32 56: another aspect than 40 × 56" in out
    assert f"{wide.frames[0].parent} and of 1 more videos" in out and "--flow_size 40 56 keeps the aspect" in out
    assert "keeps the aspect of the first, and no --flow_size that of each" in out  # of several shapes
    prepare.run(dis("--overwrite"), [square], ALONE)
    assert "warning" not in capsys.readouterr().out


def test_interrupted_overwriting_leaves_no_old_flow_among_the_new(tmp_path: Path):
    sequence = make_sequence(tmp_path, count=6)
    files = FlowFiles(raw_format="npz")
    old, new = FlowSettings(method="dis"), FlowSettings(method="dis", size=(20, 28))

    def write(settings: FlowSettings, most: int, overwrite: bool) -> None:
        pending = pending_frames(sequence.stems, sequence.flow_dir, settings, files, overwrite)
        frames = [np.asarray(Image.open(path)) for path in sequence.frames]
        task = FlowTask(frames, sequence.stems, sequence.flow_dir, pending)
        for count, _ in enumerate(write_flows([task], settings, files, workers=0), 1):
            if count == most:
                break

    write(old, 6, False)
    write(new, 2, True)
    assert len(pending_frames(sequence.stems, sequence.flow_dir, new, files)) == 4
    assert len(list(sequence.flow_dir.glob("*.npz"))) == 2
    write(new, 6, False)
    for path in sequence.flow_dir.glob("*.png"):
        assert Image.open(path).size == (28, 20)


def test_two_processes_write_the_same_bytes_as_one(tmp_path: Path):
    sequences = [make_sequence(tmp_path / "one", name=name) for name in ("a", "b")]
    assert prepare.run(dis(), sequences, ALONE) == 6
    others = [make_sequence(tmp_path / "two", name=name) for name in ("a", "b")]
    assert prepare.run(arguments("--flow_method", "dis", "--workers", "2"), others, ALONE) == 6
    for sequence, other in zip(sequences, others):
        assert contents(sequence.flow_dir) == contents(other.flow_dir)


def test_a_folder_can_be_waited_for_while_the_next_ones_are_made():
    """Also when something goes wrong with a later one; without an error the rest is made before the block ends."""
    a, b, c, go = Path("a"), Path("b"), Path("c"), threading.Event()
    pending = {a: ["0", "1"], b: ["0"], c: ["0"]}

    def writing(error: Exception | None) -> Iterator[tuple[Path, str]]:
        yield a, "0"
        yield a, "1"
        assert go.wait(60)
        yield b, "0"
        if error is not None:
            raise error
        done.append(c)
        yield c, "0"

    done: list[Path] = []
    with FlowBeside(writing(None), pending, FlowFiles("jpg")) as making:
        making.wait(a)
        making.wait(Path("there before"))
        assert not done
        assert (
            making.path(a, "1") == Path("a/1.jpg")
            and making.path(a, "2") is None
            and making.path(Path("d"), "1") is None
        )
        go.set()
    assert done == [c]

    failing = FlowBeside(writing(DataError("no frame")), pending, FlowFiles())
    with pytest.raises(DataError, match="no frame"), failing as making:
        making.wait(a)
        making.wait(b)
        with pytest.raises(DataError, match="no frame"):
            making.wait(c)
        making.wait(b)

    # An error of whoever waits is the one that is raised, and the flow of the next frames is not made.
    done.clear()
    go.clear()
    with pytest.raises(ZeroDivisionError), FlowBeside(writing(None), pending, FlowFiles()) as making:
        making.wait(a)
        threading.Timer(0.2, go.set).start()
        raise ZeroDivisionError
    assert not done


def test_flow_of_a_thinned_out_video_is_that_of_neighbours_in_the_folder(tmp_path: Path):
    whole = make_sequence(tmp_path / "whole", count=5)
    prepare.run(dis(), [whole], ALONE)
    thin = make_sequence(tmp_path / "thin", count=5)
    thin = VideoSequence(thin.name, thin.dataset, thin.frames[::2], {}, {}, "nonzero", thin.flow_dir)
    assert prepare.run(dis(), [thin], ALONE) == 3
    made = contents(thin.flow_dir)
    assert sorted(made) == ["00000.png", "00002.png", "00004.png", "flow.json"]
    assert all(made[name] == data for name, data in contents(whole.flow_dir).items() if name in made)


def test_two_sets_that_share_a_video_make_its_flow_once(tmp_path: Path):
    sequence = make_sequence(tmp_path)
    assert prepare.run(dis(), [sequence, sequence], ALONE) == 3


def test_flow_of_a_users_own_video(tmp_path: Path):
    from utils.flow.prepare import video_flows

    frames = open_folder(make_sequence(tmp_path, count=4).frames[0].parent)
    flows = video_flows(dis(), frames, tmp_path / "out")
    assert len(flows) == 4 and flows.stems == frames.stems
    for t, partner in ((0, 1), (1, 2), (2, 3), (3, 2)):
        np.testing.assert_array_equal(flows[t], flow_to_image(dis_flow(frames[t], frames[partner])))
    before = contents(tmp_path / "out")
    video_flows(dis(), frames, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    # another video of the same name and length must not get this one's flow
    Image.fromarray(texture(40, 56, seed=1)).save(frames.files[2])
    with pytest.raises(UserError, match="of another video .*content"):
        video_flows(dis(), open_folder(frames.files[0].parent), tmp_path / "out")


def test_a_users_own_video_is_told_by_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Uncompressed frames have one size, whatever they show; a folder has one name, however it is given."""
    from utils.flow.prepare import video_flows

    folder = tmp_path / "frames"
    folder.mkdir()

    def film(seed: int) -> None:
        for t in range(2):
            Image.fromarray(texture(40, 56, shift=(t, 0), seed=seed)).save(folder / f"{t}.bmp")

    film(0)
    sizes = [path.stat().st_size for path in sorted(folder.iterdir())]
    video_flows(dis(), open_folder(folder), tmp_path / "out")
    before = contents(tmp_path / "out")
    monkeypatch.chdir(folder)
    video_flows(dis(), open_folder("."), tmp_path / "out")
    assert contents(tmp_path / "out") == before
    film(1)
    assert [path.stat().st_size for path in sorted(folder.iterdir())] == sizes
    with pytest.raises(UserError, match="of another video"):
        video_flows(dis(), open_folder(folder), tmp_path / "out")
    (folder / "1.bmp").unlink()
    (folder / "1.bmp").symlink_to(tmp_path / "gone.bmp")
    with pytest.raises(DataError, match="1.bmp: no such frame, but a link to .*gone.bmp"):
        video_flows(dis(), open_folder(folder), tmp_path / "out")


def test_an_unreadable_frame_is_named(tmp_path: Path):
    sequence = make_sequence(tmp_path)
    sequence.frames[1].write_bytes(b"not an image")
    with pytest.raises(DataError, match="00001.png"):
        prepare.run(dis(), [sequence], ALONE)


def test_files_settings_are_checked():
    with pytest.raises(UserError, match="--flow_format gif"):
        FlowFiles("gif")
    with pytest.raises(UserError, match="--flow_raw txt"):
        FlowFiles("png", "txt")


def test_raw_flow_does_not_replace_supplied_images(tmp_path: Path) -> None:
    sequence = make_sequence(tmp_path)
    prepare.run(dis(), [sequence], ALONE)
    (sequence.flow_dir / "flow.json").unlink()  # from elsewhere
    before = contents(sequence.flow_dir)
    with pytest.raises(UserError, match=r"--flow_raw npz: 3 flow images in .* came from elsewhere.*--overwrite"):
        prepare.run(dis("--flow_raw"), [sequence], ALONE)
    assert contents(sequence.flow_dir) == before
    assert prepare.run(dis("--flow_raw", "--overwrite"), [sequence], ALONE) == 3
    assert len(list(sequence.flow_dir.glob("*.npz"))) == 3


def test_raw_flow_goes_with_the_image_that_is_made_again(tmp_path: Path) -> None:
    """Of uncompressed frames, whose changes no size tells, --overwrite is asked for; it need not name the raw flow."""
    sequence = make_sequence(tmp_path)
    frames = [path.with_suffix(".bmp") for path in sequence.frames]
    sequence = dataclasses.replace(sequence, frames=tuple(frames))
    for direction in (1, -1):
        for t, path in enumerate(frames):
            path.with_suffix(".png").unlink(missing_ok=True)
            Image.fromarray(texture(40, 56, shift=(2 * direction * t, -t))).save(path)
        prepare.run(dis(*(("--flow_raw", "flo") if direction == 1 else ("--overwrite",))), [sequence], ALONE)
    for stem in sequence.stems:
        flow = read_raw_flow(sequence.flow_dir / f"{stem}.flo")
        assert (flow_to_image(flow) == np.asarray(Image.open(sequence.flow_dir / f"{stem}.png"))).all()
