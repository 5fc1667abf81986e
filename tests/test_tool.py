"""tool.py: the documented lines run as they stand, and bad input of each kind gets one line and exit code 2."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("cv2")

import tool
from datasets.synthetic import write_dataset
from models import Predictor, build_dbsnet, load_dbsnet
from models.growth import keep_stream, put_back
from models.weights import save_weights
from utils import report
from utils.evaluation.reading import Scores
from utils.flow.files import FlowFiles
from utils.inference.weights import load_weights
from utils.report import describe_encoders
from utils.stopping import end_by_ctrl_c

FRAMES = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with a DAVIS of four synthetic videos, two of them val, without flow."""
    root = tmp_path_factory.mktemp("data")
    write_dataset(root, "DAVIS", videos=4, frames=FRAMES, size=(48, 80), seed=2, validation=2, flows=False)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = build_dbsnet("xxs", depth=1, dilations=[1])
    with torch.no_grad():
        net.decoder.head.weight.mul_(100)  # answers on both sides of 0.5
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(path, net, metadata={"size": "32 64", "trained_on": "nothing at all"})
    return path


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)  # what goes to the default folders goes here


def call(*words: object) -> int:
    return tool.main([str(word) for word in ["--device", "cpu", "--workers", 1, *words]])


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The message of a call that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        call(*words)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "error: " in message and "Traceback" not in message
    return message


@pytest.fixture(scope="module")
def results(data: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole row of tools as the README has it, with the default folders, run in a folder of its own."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(data, folder / "data")
    tools = ["flow", "test", "eval", "report"]
    try:
        import pydensecrf.densecrf  # noqa: F401

        tools.insert(2, "crf")
    except ImportError:
        pass
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        words = ["--checkpoint", weights, "--tools", *tools, "--data_dir", "data", "--datasets", "DAVIS-2016"]
        assert call(*words, "--flow_method", "dis", "--metrics", "uvos") == 0
    return folder


# ------------------------------------------------------------------------------------------------- the row of tools


def test_the_row_of_tools_scores_what_it_wrote(results: Path) -> None:
    document = json.loads((results / "results" / "evaluation.json").read_text())
    names = ["video-002", "video-003"]
    assert sorted(document["sequences"]) == names
    for name in names:
        scores = []
        for t in range(1, FRAMES - 1):  # the first and the last frame do not count on DAVIS
            mask = np.asarray(Image.open(results / f"results/binary/DAVIS-2016/{name}/{t:05d}.png")) > 0
            truth = np.asarray(Image.open(results / f"data/DAVIS/Annotations/480p/{name}/{t:05d}.png")) > 0
            scores.append((mask & truth).sum() / max(1, (mask | truth).sum()))
        assert document["sequences"][name]["J_mean"] == pytest.approx(np.mean(scores), abs=1e-9)
    assert 0.01 < document["overall"]["J_mean"] < 1


def test_the_crf_runs_beside_the_test(
    results: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crf = pytest.importorskip("utils.crf")
    pytest.importorskip("pydensecrf.densecrf")
    left, run = [], crf.run
    monkeypatch.setattr(crf, "run", lambda *args: left.append(run(*args)))
    words = ["--checkpoint", weights, "--data_dir", results / "data", "--datasets", "DAVIS-2016"]
    maps = {}
    # One after the other, and side by side; the second time everything is made again.
    for workers, options in (("0", []), ("2", []), ("2", ["--overwrite"])):
        folder = tmp_path / workers
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
        assert call(*words, "--tools", "test", "crf", "--workers", workers, "--save_dir", folder, *options) == 0
        files = sorted((folder / "crf").rglob("*.png"))
        maps[workers] = [path.read_bytes() for path in files]
        assert all(path.stat().st_mtime_ns > time for path, time in before.items())
        assert len(files) == 2 * FRAMES
    assert maps["2"] == maps["0"]
    assert left == [2 * FRAMES, 0, 0]


def test_flow_is_made_beside_the_test(
    data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The maps are those of one tool after the other, and the network has begun before the last flow is there."""
    flow, maps, made = {}, {}, []
    run = Predictor.__call__

    def watched(self: Predictor, frames: object, flows: object):
        made.append(len(list(root.rglob("Flows/**/*.png"))))
        return run(self, frames, flows)

    monkeypatch.setattr(Predictor, "__call__", watched)
    write, turn = FlowFiles.write, threading.Event()

    def later(self: FlowFiles, flow_dir: Path, stem: str, image: np.ndarray) -> None:
        if flow_dir.name == "video-003" and stem == "00004":
            assert turn.wait(60)  # until the network has begun with the first video
        write(self, flow_dir, stem, image)

    words = ["--checkpoint", weights, "--datasets", "DAVIS-2016", "--flow_method", "dis", "--split", "val"]
    for name, workers in (("sequence", 1), ("beside", 2)):
        root = shutil.copytree(data, tmp_path / name)
        if name == "beside":  # in threads of this process, where one can be held up
            monkeypatch.setattr(FlowFiles, "write", later)
            monkeypatch.setattr("utils.parallel.start_pool", lambda workers, niceness: ThreadPoolExecutor(workers))
            monkeypatch.setattr("utils.parallel._run_job", lambda function, *task: function(*task))
            monkeypatch.setattr(Predictor, "__call__", lambda *of: turn.set() or watched(*of))
        row = [*words, "--data_dir", root, "--workers", workers]
        assert call(*row, "--tools", "flow", "test", "--save_dir", root / "r") == 0
        flow[name] = [path.read_bytes() for path in sorted(root.rglob("Flows/**/*.png"))]
        maps[name] = [path.read_bytes() for path in sorted((root / "r" / "binary").rglob("*.png"))]
        assert len(flow[name]) == len(maps[name]) == 2 * FRAMES
        assert ("while the network is at work" in capsys.readouterr().out) == (name == "beside")
        # The maps say which flow they are of: all of it, though some was made while they were.
        assert call(*row, "--tools", "flow", "test", "--save_dir", root / "r") == 0
        assert "0 frames to do; 2 of 2 videos are there already" in capsys.readouterr().out
    assert flow["beside"] == flow["sequence"] and maps["beside"] == maps["sequence"]
    assert made[:3] == [2 * FRAMES, 2 * FRAMES, made[2]] and FRAMES <= made[2] < 2 * FRAMES and made[3] == 2 * FRAMES


@pytest.mark.parametrize("workers", [1, 2])
def test_what_flow_cannot_be_made_of_is_told(
    workers: int, data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(data, tmp_path / "data")
    frame = root / "DAVIS/JPEGImages/480p/video-003/00002.jpg"
    frame.write_bytes(frame.read_bytes()[:500])
    words = ["--checkpoint", weights, "--datasets", "DAVIS-2016", "--flow_method", "dis", "--data_dir", root]
    message = fails(capsys, *words, "--tools", "flow", "test", "--workers", workers, "--save_dir", tmp_path / "r")
    assert f"{frame}: cannot read this frame" in message


def test_the_page_needs_no_other_file(results: Path) -> None:
    page = (results / "results" / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    sources = re.findall(r'src="([^"]{30})', page)
    assert len(sources) >= 8 and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    document = json.loads((results / "results" / "evaluation.json").read_text())
    for name, values in document["sequences"].items():
        row = re.search(rf"<tr><th>{name}</th>(.*?)</tr>", page)[1]
        assert row.startswith(f"<td>{100 * values['J_mean']:.1f}</td><td>")
    assert "trained_on nothing at all" in page and "annotated frames without the first and last" in page
    assert "viewport" in page and "prefers-color-scheme: dark" in page
    if "crf" in document:
        assert f"<b>{100 * document['crf']['overall']['J_mean']:.1f}</b>J after the CRF" in page


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        ("mobilevit", "MobileViT-XS"),
        ("tf_efficientnet_lite0", "tf_efficientnet_lite0"),
        ({"appearance": "resnet18", "motion": "mobilevit"}, "appearance resnet18, motion MobileViT-XS"),
    ],
)
def test_the_page_names_the_encoders(encoder: str | dict[str, str], words: str) -> None:
    assert describe_encoders({"variant": "xs", "encoder": encoder}) == words


def test_the_page_is_not_of_other_maps_than_its_figures(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(results / "results", tmp_path / "r")
    words = ["--tools", "report", "--save_dir", folder, "--data_dir", results / "data", "--datasets", "DAVIS-2016"]
    assert call(*words) == 0
    (folder / "evaluation.json").rename(tmp_path / "kept")
    assert "run --tools eval" in fails(capsys, *words)
    (tmp_path / "kept").rename(folder / "evaluation.json")
    later = (folder / "evaluation.json").stat().st_mtime_ns + 10**9
    os.utime(folder / "test.json", ns=(later, later))
    assert call(*words) == 0  # of a later run, on other data perhaps
    os.utime(next((folder / "binary").rglob("*.png")), ns=(later, later))
    assert "--tools eval again" in fails(capsys, *words)


def test_the_page_tells_how_its_own_maps_were_made(results: Path, weights: Path, tmp_path: Path) -> None:
    """Not how the last run made those of other data, which test.json tells of."""
    folder = shutil.copytree(results / "results", tmp_path / "r")
    words = ["--tools", "report", "--save_dir", folder, "--data_dir", results / "data", "--datasets", "DAVIS-2016"]
    record = json.loads((folder / "test.json").read_text())
    other = {**record, "checkpoint": "another.pt", "sha256": "0" * 16, "parameters": 123456}
    other["settings"] = {**record["settings"], "weights": "0" * 16, "flip": True}
    (folder / "test.json").write_text(json.dumps(other))
    assert call(*words) == 0
    page = (folder / "report.html").read_text()
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    sha = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    assert (
        facts["checkpoint"].startswith(f"SHA-256 {sha}…")
        and facts["test"] == "32×64, whole video, consensus of frames, smoothed, flow dis"
    )
    assert "network" not in facts and "run" not in facts and "another.pt" not in page
    if (folder / "crf").is_dir():
        assert facts["CRF"].startswith("iters 1, gaussian_sxy 3,") and facts["CRF"].endswith("scale 1.05")


def test_the_page_has_one_kind_of_figure() -> None:
    """As the tables: J in percent, S as a fraction, and rounded alike."""
    some = {"counted": "all", "frames": {}, "dataset": "D"}
    scores = Scores(
        overall={"": {"S": 0.8155, "max_F": 0.5}}, sequences={"": {"a": {}}}, key="S", frame_key="S", **some
    )
    assert "<b>0.816</b>S<" in report._tiles(scores) and scores.words(0.25) == "0.250"
    overall = {"": {"J_mean": 0.8155, "F_mean": 0.5}}
    scores = Scores(overall=overall, sequences={"": {"a": {}}}, key="J_mean", frame_key="J", **some)
    assert "<b>81.6</b>J<" in report._tiles(scores) and scores.words(0.25) == "25.0"


def test_the_page_shows_published_figures_that_were_compared(results: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(results / "results", tmp_path / "r")
    words = ["--save_dir", folder, "--data_dir", results / "data", "--datasets", "DAVIS-2016", "--metrics", "uvos"]

    def page(*tools: str) -> str:
        assert call("--tools", *tools, *words) == 0
        return (folder / "report.html").read_text()

    assert "Beside published figures" not in page("eval", "report")
    shown = page("eval", "report", "--published")
    assert re.search(r"<th>\d+ MATNet, all 20 sequences</th><td>82\.4</td>", shown)
    assert "davischallenge.org" in shown and shown.count("<tr class=all>") >= 2  # in the table of sequences and here
    # Figures of an older evaluation beside new ones would mislead.
    table = folder / "comparison.csv"
    table.write_text(table.read_text().replace(",no,0.", ",no,0.9"))
    assert "Beside published figures" not in page("report")


def test_the_page_of_the_crf_alone(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pydensecrf.densecrf")
    folder = tmp_path / "r"
    shutil.copytree(results / "results" / "crf", folder / "crf")
    words = ["--save_dir", folder, "--data_dir", results / "data", "--datasets", "DAVIS-2016", "--metrics", "uvos"]
    assert call("--tools", "eval", *words) == 0
    assert "beside crf/" in fails(capsys, "--tools", "report", *words)


def test_the_page_shows_the_training_run(results: Path, data: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    lines = [{"kind": "train", "step": step, "loss": 2 - step / 50} for step in (10, 20, 30)]
    lines.append({"kind": "val", "step": 30, "J": 0.5})
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "train", "st')
    words = ["--tools", "report", "--save_dir", results / "results", "--data_dir", results / "data"]
    assert call(*words, "--datasets", "DAVIS-2016", "--log", log, "--report", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert "loss: 1.800 at step 10, 1.400 at step 30" in page
    assert 'aria-label="loss over the steps"' in page and page.count("<svg") == page.count('role="img" aria-label="')


@pytest.mark.parametrize("content", [b"\x80\x02}q\x00", b'3\n[1]\n{"kind": "train", "step": 1, "loss": 0.5}\n'])
def test_a_log_that_is_none(content: bytes, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "last.pt").write_bytes(content)
    words = ["--tools", "report", "--save_dir", results / "results", "--data_dir", results / "data"]
    words += ["--datasets", "DAVIS-2016", "--report", tmp_path / "page.html"]
    assert "last.pt: has neither" in fails(capsys, *words, "--log", tmp_path / "last.pt")


def test_default_datasets_are_those_that_are_there(results: Path, weights: Path, tmp_path: Path) -> None:
    shutil.copytree(results / "data", tmp_path / "data")
    assert call("--checkpoint", weights, "--tools", "test") == 0  # as the README has it
    assert [path.name for path in (tmp_path / "results" / "binary").iterdir()] == ["DAVIS-2016"]
    first = sorted((tmp_path / "results" / "binary").rglob("*.png"))
    assert len(first) == 2 * FRAMES


def test_published_weights_are_the_default(
    results: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--tools",
        "test",
        "--data_dir",
        results / "data",
        "--sequences",
        "video-003",
        "--save_dir",
        tmp_path / "r",
    ]
    monkeypatch.setattr("utils.inference.weights.PUBLISHED_WEIGHTS", tmp_path / "weights" / "none.safetensors")
    message = fails(capsys, *words)
    assert "main.py" in message and "--checkpoint" in message and "weights/none.safetensors" in message
    monkeypatch.setattr("utils.inference.weights.PUBLISHED_WEIGHTS", weights)
    assert call(*words) == 0
    assert json.loads((tmp_path / "r" / "test.json").read_text())["checkpoint"] == str(weights)
    assert len(list((tmp_path / "r" / "binary").rglob("*.png"))) == FRAMES


def test_flow_in_a_folder_of_its_own(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    words = ["--checkpoint", weights, "--data_dir", data, "--datasets", "DAVIS-2016", "--sequences", "video-002"]
    flow = ["--flow_method", "dis", "--flow_dir", tmp_path / "dis"]
    assert call("--tools", "check", "flow", "test", *words, *flow, "--split", "val", "--save_dir", tmp_path / "r") == 0
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before  # nothing is written among the data
    made = sorted((tmp_path / "dis" / "DAVIS-2016" / "Flows" / "480p" / "video-002").glob("*.png"))
    assert len(made) == FRAMES

    # Flow of another kind: the maps of the first are not taken for those of the second, though they are newer.
    other = shutil.copytree(tmp_path / "dis", tmp_path / "other")
    for path in other.rglob("*.png"):
        Image.new("RGB", Image.open(path).size, "red").save(path)
        os.utime(path, (0, 0))
    capsys.readouterr()
    for folder, frames in ((tmp_path / "dis", 0), (other, FRAMES)):
        assert call("--tools", "test", *words, "--flow_dir", folder, "--save_dir", tmp_path / "r") == 0
        shown = capsys.readouterr()
        assert f"{frames} frames to do" in shown.out
        # Beside the bar: a long video is encoded for minutes before its first map.
        assert (f"video-002, {FRAMES} encoded" in shown.err) == bool(frames)
    assert "--flow_dir" in fails(capsys, "--tools", "test", "--video", made[0], "--flow_dir", other)


def test_check_before_flow_does_not_ask_for_flow(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data_dir", data, "--datasets", "DAVIS-2016", "--split", "train"]
    assert call("--tools", "check", *words) == 1  # the flow of train is not there
    assert "--tools flow" in capsys.readouterr().out
    assert call("--tools", "check", "flow", "check", *words, "--flow_method", "dis") == 0
    flows = list((data / "DAVIS" / "Flows").rglob("*.png"))
    assert len(flows) == 2 * FRAMES
    assert call("--tools", "check", *words) == 0
    shutil.rmtree(data / "DAVIS" / "Flows")


def test_check_looks_at_every_set_that_is_there(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tools", "check", "--data_dir", tmp_path]
    assert "none of DAVIS-2016" in fails(capsys, *words)
    for kind in ("JPEGImages", "Annotations", "Flows"):
        for number in range(7):
            path = tmp_path / "YouTube-VOS" / "train" / kind / "a" / f"{number:05d}.jpg"
            if kind == "Annotations":
                path = path.with_suffix(".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L" if kind == "Annotations" else "RGB", (64, 32), 1).save(path)
    assert call(*words) == 0
    assert "1 sequence, 7 frames, 7 with flow, 7 with a mask" in capsys.readouterr().out  # and not every fifth
    shutil.copytree(tmp_path / "YouTube-VOS/train/JPEGImages", tmp_path / "YouTube-VOS/valid/JPEGImages")
    assert call(*words) == 0  # nobody tests on valid, which needs no flow then
    assert call(*words, "--datasets", "YouTube-VOS", "--split", "val") == 1
    path.unlink()
    assert call(*words) == 1
    assert call(*words, "--num_frames", 5) == 0  # those that training uses
    for name in ("DUTS-TR", "FBMS"):
        (tmp_path / name).mkdir()
    assert call(*words) == 1
    assert "FBMS is not under" in capsys.readouterr().out
    shutil.copytree(data / "DAVIS", tmp_path / "DAVIS")
    assert call(*words) == 1
    shown = capsys.readouterr().out
    assert all(f"{name} " in shown for name in ("DAVIS-2016", "YouTube-VOS-2018", "FBMS", "DUTS-TR"))
    # What tests take is asked of those sets that they are of.
    words = ["--data_dir", tmp_path, "--split", "val", "--flow_method", "dis"]
    assert call("--tools", "check", "flow", *words) == 0 and call("--tools", "check", *words) == 0
    shown = capsys.readouterr().out
    assert "DAVIS-2016 val" in shown and "YouTube-VOS" not in shown


def test_check_of_some_sequences(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tools", "check", "flow", "--data_dir", data, "--datasets", "DAVIS-2016", "--flow_method", "dis"]
    message = fails(capsys, *words, "--sequences", "video-004")
    assert "--sequences video-004: not in DAVIS-2016" in message and "video-003" in message
    assert call("--tools", "check", *words[3:-2], "--sequences", "video-002") == 1  # there is no flow
    shown = capsys.readouterr()
    assert "DAVIS-2016 val in" in shown.out and f"1 sequence, {FRAMES} frames" in shown.out
    assert "video-003" not in shown.out and "train" not in shown.out
    assert f"{FRAMES}/{FRAMES}" in shown.err and "check DAVIS-2016" in shown.err  # the progress bar


def test_tools_stop_after_a_check_with_problems(data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--data_dir", data, "--datasets", "DAVIS-2016", "--save_dir", tmp_path / "r"]
    assert call("--tools", "check", "test", *words) == 1
    assert not (tmp_path / "r").exists()


def test_all_processes_stop_after_a_check_with_problems(data: Path) -> None:
    words = ["--device", "cpu", "--tools", "check", "test", "--data_dir", str(data), "--datasets", "DAVIS-2016"]
    args = tool.parse_args(words)
    told: list[float] = []

    def reduce(values: list[float], operation: str) -> list[float]:
        told.extend(values)
        return [max(told)]

    # Only the first looks, and the others hear of it.
    codes = [tool.run_check(args, SimpleNamespace(is_main=rank == 0, reduce=reduce)) for rank in range(2)]
    assert told[0] > 0 and told[1] == 0 and codes == [1, 1]


@pytest.mark.parametrize("name", ["flow", "crf", "eval", "report", "bench", "export"])
def test_what_is_not_shared_out_is_left_to_the_first_process(name: str, tmp_path: Path) -> None:
    """The others would write the same files at the same time."""
    args = tool.parse_args(["--tools", "check", "--data_dir", str(tmp_path), "--save_dir", str(tmp_path / "r")])
    args.tools, args.frames = [name], str(tmp_path / "nowhere") if name == "flow" else None
    args.bench_json = str(tmp_path / "nowhere" / "x")
    assert tool.TOOLS[name](args, SimpleNamespace(is_main=False, world_size=2)) == 0
    assert not list(tmp_path.iterdir())


def test_export(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.safetensors"
    words = ["--tools", "export", "--checkpoint", weights, "--output", out]
    assert call(*words, "--note", "licence=CC BY-NC 4.0", "sequences=a=b") == 0
    made = load_weights(out)
    notes = made.notes
    assert made.size == (32, 64)
    assert notes["licence"] == "CC BY-NC 4.0" and notes["sequences"] == "a=b"
    assert notes["trained_on"] == "nothing at all"  # what the checkpoint said already
    assert out.stat().st_size < 0.55 * weights.stat().st_size
    before, after = load_dbsnet(weights).state_dict(), load_dbsnet(out).state_dict()
    for key, value in before.items():
        assert torch.allclose(value.float(), after[key].float(), rtol=1e-3, atol=1e-6), key
    assert call(*words, "--size", 64, 96) == 0 and load_weights(out).size == (64, 96)
    assert "--size 0 -4: expected a height and a width" in fails(capsys, *words, "--size", 0, -4)
    assert "KEY=VALUE" in fails(capsys, *words, "--note", "licence")
    assert "--size" in fails(capsys, *words, "--note", "size=3")
    assert "--note zoom=3; expected yes or no" in fails(capsys, *words, "--note", "zoom=3")
    assert "'a=2': a is given twice" in fails(capsys, *words, "--note", "a=1", "a=2")
    save_weights(tmp_path / "bare.safetensors", load_dbsnet(weights))
    bare = [*words[:3], tmp_path / "bare.safetensors", *words[4:]]
    assert "does not say the input size that it is for; give --size H W" in fails(capsys, *bare)
    assert call(*bare, "--size", 32, 96) == 0 and load_weights(out).size == (32, 96)
    assert ".safetensors" in fails(capsys, "--tools", "export", "--checkpoint", weights, "--output", "out.pt")
    assert "--checkpoint" in fails(capsys, "--tools", "export", "--output", out)
    (tmp_path / "folder.safetensors").mkdir()
    message = fails(capsys, *words, "--output", tmp_path / "folder.safetensors")
    assert "--output" in message and "a folder" in message


def test_export_of_a_mean(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nets = [load_dbsnet(weights) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    files = [tmp_path / f"{index}.safetensors" for index in range(3)]
    for net, file in zip(nets, files):
        for parameter in net.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator)
        save_weights(file, net, metadata={"size": "32 64", "J": "0.9", "step": "7", "licence": "x"})
    out = tmp_path / "mean.safetensors"
    words = ["--tools", "export", "--checkpoint", files[0], "--output", out, "--average"]
    assert call(*words, *files[1:]) == 0
    mean = load_dbsnet(out).state_dict()
    for key, value in mean.items():
        states = [net.state_dict()[key].numpy() for net in nets]
        assert np.allclose(value.numpy(), sum(states) / 3, rtol=1e-3, atol=1e-3), key
    made = load_weights(out)
    # Figure and step are those of one of them.
    assert made.size == (32, 64) and made.notes == {"size": "32 64", "licence": "x", "average_of": "3"}
    other = build_dbsnet(**{**nets[0].config, "rounds": nets[0].config["rounds"] + 1})
    save_weights(tmp_path / "other.safetensors", other, metadata={"size": "32 64"})
    assert "rounds" in fails(capsys, *words, tmp_path / "other.safetensors")
    # Half precision must not take the place of what may be nowhere else in full.
    (tmp_path / "link.safetensors").symlink_to(files[0])
    before = [file.read_bytes() for file in files]
    for output, option in ((files[0], "--checkpoint"), (files[1], "--average"), ("link.safetensors", "--checkpoint")):
        message = fails(capsys, *words, *files[1:], "--output", tmp_path / output)
        assert f"the file of {option}" in message and "another name" in message
    assert [file.read_bytes() for file in files] == before


def test_export_without_a_part(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = load_dbsnet(weights)
    save_weights(tmp_path / "whole.safetensors", net, metadata={"size": "32 64", "J": "0.9", "licence": "x"})
    out = tmp_path / "o.safetensors"
    words = ["--tools", "export", "--checkpoint", tmp_path / "whole.safetensors", "--output", out]
    assert call(*words, "--average", tmp_path / "whole.safetensors", "--without", "co_dga") == 0
    rest = load_dbsnet(out)
    assert rest.config == {**net.config, "rounds": 0} and net.config["rounds"]
    expected = net.state_dict()
    for key, value in rest.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-3)
    notes = {"size": "32 64", "licence": "x", "average_of": "2", "without": "co_dga"}
    made = load_weights(out)
    assert (made.notes, made.size) == (notes, (32, 64))
    again = ["--tools", "export", "--checkpoint", out, "--output", tmp_path / "p.safetensors"]
    assert call(*again, "--without", "refinement") == 0
    assert load_weights(tmp_path / "p.safetensors").notes["without"] == "co_dga, refinement"
    assert "propagation, refinement, co_dga" in fails(capsys, *words, "--without", "flow")
    assert f"--without co_dga: {out}: the network has no co_dga to take out" in fails(
        capsys, *again, "--without", "co_dga"
    )


def test_export_with_a_stream_from_elsewhere(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = load_dbsnet(weights)
    one, out = keep_stream(net, "motion"), tmp_path / "out.safetensors"
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.mul_(1.5)
    save_weights(tmp_path / "one.safetensors", one)
    words = ["--tools", "export", "--checkpoint", weights, "--output", out]
    assert call(*words, "--stream_from", tmp_path / "one.safetensors") == 0
    expected = put_back(net, one).state_dict()
    for key, value in load_dbsnet(out).state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-3)
    message = fails(capsys, *words, "--stream_from", weights)
    assert "--stream_from" in message and "one stream" in message


def test_export_of_a_training_checkpoint(tmp_path: Path, repository: Path) -> None:
    import main

    run = tmp_path / "run"
    words = f"--config {repository / 'configs/demo.yaml'} --size 32 64 --max_steps 1 --steps_per_epoch 1 --workers 0"
    words += f" --device cpu --batch_size 2 --network depth:1 dilations:[1] --save_dir {run}"
    assert main.main(words.split()) == 0
    assert call("--tools", "export", "--checkpoint", run / "last.pt", "--output", tmp_path / "w.safetensors") == 0
    made = load_weights(tmp_path / "w.safetensors")
    notes = made.notes
    assert made.size == (32, 64) and notes["step"] == "1" and notes["trained_on"] == "synthetic" and "J" not in notes
    # A figure belongs to the weights that it was measured with.
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    for step, said in ((1, "0.7500"), (0, None)):
        torch.save({**checkpoint, "best": {"J": 0.75, "step": step}}, tmp_path / "best.pt")
        assert load_weights(tmp_path / "best.pt").notes.get("J") == said


# ------------------------------------------------------------------------------------------------------ what is wrong


def test_an_unknown_tool(capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "--tools", "evaluate")
    assert "'evaluate'" in message and "eval" in message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tools", "test", "--sizes", "3"], "error: unknown argument '--sizes'; did you mean --size "),
        (["--tools", "test", "--save-dri=x"], "error: unknown argument '--save-dri'; did you mean --save_dir"),
        (["--checkpoint", "w.pt", "extra", "--tools", "test"], "error: unexpected word 'extra'; "),
        (["--tools", "test", "--size", "3"], "error: --size: expected 2 arguments"),
        (["--tools", "test", "--save_dir", ""], "error: --save_dir '': expected the name of a folder"),
        ([], "error: --tools is missing; give one or several of check, "),
    ],
)
def test_a_slip_in_the_command_line_is_told_in_one_line(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fails(capsys, *words)
    assert message.startswith(expected) and message.count("\n") == 1


def test_no_data(tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "--tools", "test", "--checkpoint", weights)
    assert "--data_dir data" in message and "--video" in message and "demo" in message
    (tmp_path / "empty").mkdir()
    message = fails(capsys, "--tools", "flow", "--data_dir", tmp_path / "empty", "--datasets", "FBMS")
    assert "FBMS" in message and str(tmp_path / "empty") in message


def test_a_data_set_given_itself_without_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its folder's name it is MCL alone; what could be several is not scored as all of them."""
    for root in (tmp_path / "MCL", tmp_path / "clips"):
        for stem in ("000", "001"):
            for place, mode in ((root / "road" / "Imgs", "RGB"), (root / "road" / "GT", "L")):
                place.mkdir(parents=True, exist_ok=True)
                Image.new(mode, (40, 24), "white").save(place / f"{stem}.png")
    assert call("--tools", "flow", "check", "--data_dir", tmp_path / "MCL", "--flow_method", "dis") == 0
    printed = capsys.readouterr().out
    assert "MCL val in" in printed and "DAVSOD" not in printed
    message = fails(capsys, "--tools", "flow", "--data_dir", tmp_path / "clips", "--flow_method", "dis")
    assert f"--data_dir {tmp_path / 'clips'}" in message and "DAVSOD and of MCL" in message
    assert "--datasets DAVSOD" in message and len(message.splitlines()) == 1


def test_missing_flow(data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tools", "test", "--checkpoint", weights, "--data_dir", data, "--save_dir", tmp_path / "r"]
    message = fails(capsys, *words)
    assert str(data / "DAVIS/Flows/480p/video-002/00000") in message
    assert "python tool.py --tools flow --datasets DAVIS-2016" in message
    assert not (tmp_path / "r").exists()


@pytest.fixture
def broken(results: Path, tmp_path: Path) -> Path:
    """A copy of the data with flow, to be damaged."""
    shutil.copytree(results / "data", tmp_path / "broken")
    return tmp_path / "broken"


def test_a_truncated_frame(broken: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = broken / "DAVIS/JPEGImages/480p/video-003/00002.jpg"
    path.write_bytes(path.read_bytes()[:300])
    words = ["--tools", "test", "--checkpoint", weights, "--data_dir", broken, "--save_dir", tmp_path / "r"]
    assert str(path) in fails(capsys, *words, "--sequences", "video-003")
    assert not list((tmp_path / "r").rglob("*.tmp"))


def test_a_damaged_flow_image(broken: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = broken / "DAVIS/Flows/480p/video-003/00001.png"
    path.write_bytes(b"no picture")
    words = ["--tools", "test", "--checkpoint", weights, "--data_dir", broken, "--sequences", "video-003"]
    assert str(path) in fails(capsys, *words)


def test_a_mask_of_another_size(broken: Path, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = broken / "DAVIS/Annotations/480p/video-002/00002.png"
    Image.fromarray(np.zeros((40, 80), np.uint8)).save(path)
    words = ["--tools", "eval", "--save_dir", results / "results", "--metrics", "uvos", "--data_dir", broken]
    message = fails(capsys, *words, "--table_dir", broken)
    assert str(path) in message and "80×40" in message


def test_checkpoints_that_are_none(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tools", "test", "--data_dir", data, "--checkpoint"]
    assert "nowhere.pt" in fails(capsys, *words, "nowhere.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    assert "text.pt" in fails(capsys, *words, tmp_path / "text.pt")
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pt")
    assert "other.pt" in fails(capsys, *words, tmp_path / "other.pt")
    net = build_dbsnet("xxs", depth=1, dilations=[1])
    net.config["depth"] = 2
    save_weights(tmp_path / "misfit.safetensors", net)
    message = fails(capsys, *words, tmp_path / "misfit.safetensors")
    assert "misfit.safetensors" in message and "missing" in message
    net.config["depth"] = 1
    save_weights(tmp_path / "size.safetensors", net, metadata={"size": "large"})
    assert "'large'" in fails(capsys, *words, tmp_path / "size.safetensors")


def test_videos_that_are_none(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tools", "test", "--checkpoint", weights]
    (tmp_path / "clip.mp4").write_bytes(b"this is no video" * 100)
    message = fails(capsys, *words, "--video", tmp_path / "clip.mp4")
    assert str(tmp_path / "clip.mp4") in message and "ffmpeg" in message
    assert "nowhere.mp4" in fails(capsys, *words, "--video", "nowhere.mp4")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in fails(capsys, *words, "--frames", tmp_path / "empty")
    message = fails(capsys, *words, "--frames", tmp_path / "empty", "--video", tmp_path / "clip.mp4")
    assert "--video and --frames" in message
    message = fails(capsys, "--tools", "test", "eval", "--checkpoint", weights, "--video", tmp_path / "clip.mp4")
    assert "--tools eval" in message
    for option, name in (("--video", "file"), ("--frames", "folder")):  # as of a variable that is not set
        assert f"{option} '': expected the name of a {name}" in fails(capsys, *words, option, "")
    for option, value in (("--datasets", "bear"), ("--split", "bear"), ("--sequences", "bear"), ("--num_frames", 5)):
        assert f"{option} is of data sets" in fails(capsys, *words, "--video", tmp_path / "clip.mp4", option, value)


def test_results_are_not_taken_for_a_video(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be written over while they are read."""
    results = tmp_path / "results"
    for option, place in (("--video", "overlay/clip.mp4"), ("--frames", "probability/clip"), ("--frames", "crf/clip")):
        words = ["--tools", "test", "crf", "--checkpoint", weights, option, results / place]
        assert f"{option} {results / place}: this is among the results" in fails(capsys, *words, "--save_dir", results)
        monkeypatch.chdir(tmp_path)
        assert "this is among the results of --save_dir results" in fails(capsys, *words)  # the default
        assert "no such" in fails(capsys, *words, "--save_dir", tmp_path / "others")


def test_options_out_of_range(data: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(data, "with-flow", videos=1, frames=2, size=(32, 64), seed=5)
    words = ["--tools", "test", "--checkpoint", weights, "--data_dir", data, "--datasets", "with-flow"]
    assert "--batch_size 0" in fails(capsys, *words, "--batch_size", 0)
    assert "--clip_len 0" in fails(capsys, *words, "--clip_len", 0)
    assert "--cuda_graphs needs a GPU" in fails(capsys, *words, "--cuda_graphs", "--device", "cpu")
    assert "--scales" in fails(capsys, *words, "--scales", 0)
    assert "--size 0 64" in fails(capsys, *words, "--size", 0, 64)
    message = fails(capsys, *words, "--sequences", "video-00")
    assert "--sequences video-00" in message and "video-000" in message
    assert "--num_frames 0" in fails(capsys, *words, "--num_frames", 0)


@pytest.mark.parametrize(
    ("words", "on_a_gpu", "on_a_cpu"), [([], True, False), (["--no-cuda_graphs"], False, False)], ids=str
)
def test_graphs_are_the_default_on_a_gpu(words: list[str], on_a_gpu: bool, on_a_cpu: bool) -> None:
    for device, expected in (("cuda", on_a_gpu), ("cpu", on_a_cpu)):
        args = tool.parse_args(["--tools", "bench", *words])
        tool._check_device(args, SimpleNamespace(device=torch.device(device), world_size=1))
        assert args.cuda_graphs is expected


CRF = ["--tools", "flow", "test", "crf"]
EXPORT = ["--tools", "test", "export", "--output", "o.safetensors"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--checkpoint", "/nope"], "--checkpoint /nope: no such file"),
        (["--size", 0, 5], "--size 0 5"),
        (["--batch_size", 0], "--batch_size 0"),
        (["--scales", 0], "--scales 0"),
        (["--clip_len", 0], "--clip_len 0"),
        (["--cuda_graphs"], "--cuda_graphs needs a GPU"),
        ([*CRF, "--crf_iters", 0], "--crf_iters 0"),
        ([*CRF, "--crf_scale", "nan"], "--crf_scale nan"),
        (["--flow_batch", 0], "--flow_batch 0"),
        (["--flow_method", "dis", "--flow_iters", 12], "--flow_iters is for RAFT"),
        (["--workers", -1], "--workers -1"),
        (["--tools", "check", "--workers", -1], "--workers -1"),
        (["--tools", "test", "report", "--log", "nowhere.jsonl"], "--log nowhere.jsonl: no such file"),
        (["--tools", "flow", "report", "--report", "."], "--report .: a folder"),
        (["--tools", "report", "--report", "main.py"], "--report main.py: expected the name of a .html file to write"),
        (["--tools", "report", "--report", ""], "--report : expected the name of a .html file to write"),
        (["--tools", "bench", "--bench_json", "w.safetensors"], "--bench_json w.safetensors: expected the name of a"),
        (["--tools", "flow", "bench", "--bench_json", "."], "--bench_json .: a folder"),
        (["--tools", "flow", "bench", "--batch_size", 0], "--batch_size 0"),
        (["--tools", "test", "eval", "--results", "nowhere"], "nowhere: no such folder; --results expects"),
        (["--tools", "test", "eval", "--results", ".", "."], "--results: a folder is given twice"),
        (["--tools", "test", "eval", "--table_dir", __file__], "test_tool.py: a file; expected the name of a folder"),
        (["--tools", "test", "export"], "--output : expected"),
        (["--tools", "test", "export", "--output", "o.safetensors", "--note", "licence"], "expected KEY=VALUE"),
        ([*EXPORT, "--average", "nowhere.pt"], "--average nowhere.pt: no such file"),
        ([*EXPORT, "--stream_from", "nowhere.pt"], "--stream_from nowhere.pt: no such file"),
        (["--tools", "test", "eval", "--data_dir", "nowhere"], "--data_dir nowhere: none of DAVIS-2016"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_wrong_options_of_later_tools_are_told_before_the_first(
    words: list[object], said: str, data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if "crf" in words:
        pytest.importorskip("pydensecrf.densecrf")
    ran = []
    monkeypatch.setattr(tool, "TOOLS", {name: lambda *_: ran.append("a tool") for name in tool.TOOLS})
    row = ["--tools", "flow", "test", "--checkpoint", weights, "--flow_method", "dis", "--data_dir", data]
    assert said in fails(capsys, *row, *words)
    assert ran == []
    assert call(*row) == 0 and len(ran) == 2
    # Of a tool that is not asked for, nothing is demanded; and the demo makes a checkpoint for those after it.
    assert call("--tools", "eval", "--checkpoint", "/nope", "--data_dir", data, "--scales", 0, "--crf_iters", 0) == 0
    assert call("--tools", "flow", "--cuda_graphs", "--log", "nowhere", "--note", "licence") == 0
    assert call("--tools", "demo", "test", "--checkpoint", "demo/trained/weights.safetensors") == 0


@pytest.mark.parametrize(
    ("datasets", "words", "missing"),
    [
        (["DAVIS-2016"], [], "vsod"),
        (["DAVIS-2016"], ["--metrics", "uvos"], None),
        (["DAVSOD"], [], "vsod"),
        (["DAVSOD", "DAVIS-2016"], ["--metrics", "vsod", "uvos"], "vsod"),
    ],
)
def test_packages_of_eval_are_told_before_the_first_tool(
    datasets: list[str], words: list[str], missing: str | None, weights: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(tool, "TOOLS", {name: lambda *_: None for name in tool.TOOLS})
    monkeypatch.setitem(sys.modules, "py_sod_metrics", None)  # as where it is not installed
    row = ["--tools", "test", "eval", "--checkpoint", weights, "--datasets", *datasets, *words]
    if missing:
        assert f"--metrics {missing} needs pysodmetrics" in fails(capsys, *row)
    else:
        assert call(*row) == 0


def test_steps_out_of_order(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data_dir", data, "--datasets", "DAVIS-2016", "--save_dir", tmp_path / "r"]
    assert "--tools eval" in fails(capsys, "--tools", "report", *words)
    assert str(tmp_path / "r") in fails(capsys, "--tools", "eval", "--metrics", "uvos", *words)
    pytest.importorskip("pydensecrf.densecrf")
    assert "--tools test" in fails(capsys, "--tools", "crf", *words)


def test_as_a_program(repository: Path, tmp_path: Path) -> None:
    """The exit code and the message as a shell sees them."""
    words = ["tool.py", "--tools", "test", "--frames", str(tmp_path / "nowhere"), "--checkpoint", "nowhere.pt"]
    done = subprocess.run([sys.executable, *words], cwd=repository, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "nowhere" in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------------------ signals


def alive(session: int) -> list[str]:
    """The processes of a session, the tool's and whichever it started, that have not ended."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "stat").read_text().rsplit(")", 1)[1].split() if folder.name.isdigit() else []
            if words and int(words[3]) == session and words[0] != "Z":
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it has just ended
    return found


@pytest.mark.parametrize("where", ["parse_args", "_check_device"])
def test_ctrl_c_while_it_starts_is_no_traceback(
    where: str, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first tool runs, PyTorch is imported, for seconds."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, where, interrupted)
    assert call("--tools", "export", "--checkpoint", weights, "--output", "w.safetensors") == 130
    assert "the same command goes on from here" in capsys.readouterr().err


def test_the_help_names_the_splits_that_data_sets_have(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call("--help")
    split = re.search(r"--split NAME .*?(?=\n  --)", capsys.readouterr().out, re.DOTALL)[0]
    for name in ("train", "val", "trainval", "test", "test-dev", "test-challenge", "validation"):
        assert re.search(rf"(?<![\w-]){name}(?![\w-])", re.sub(r"-\n +", "-", split)), name


# As NumPy does with what interrupts its import.
INTERRUPTED_IMPORT = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000): pass
except KeyboardInterrupt as error:
    raise ImportError("you should not try to import torch from its source directory") from error
"""


@pytest.mark.parametrize("program", ["main.py", "tool.py"])
def test_ctrl_c_while_a_program_imports_what_it_needs_is_a_word(program: str, tmp_path: Path, repository: Path) -> None:
    (tmp_path / "torch.py").write_text(INTERRUPTED_IMPORT)
    ended = subprocess.run(
        [sys.executable, program, "--help"],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")


# What is run by each program once all has been imported, in whose place the way that Ctrl-C goes is told.
BEGUN = """
import runpy, signal, sys
import utils.distributed
def told(*_):
    sys.exit(str(signal.getsignal(signal.SIGINT)))
utils.distributed.run_as_program = utils.distributed.start_processes = told
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("words", [["main.py"], ["tool.py", "--tools", "check"]])
def test_ctrl_c_raises_as_ever_once_all_is_imported(words: list[str], repository: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", BEGUN, *words], cwd=repository, capture_output=True, text=True)
    assert ended.stderr == f"{signal.default_int_handler}\n"


# As from a script, a notebook or a server.
CALLED = """
import signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
import main, tool
def run(program):
    try:
        program.main(["--help"])
    except SystemExit as end:
        codes.append(end.code)
codes = []
for program in (main, tool):
    run(program)
    thread = threading.Thread(target=run, args=[program])
    thread.start()
    thread.join()
sys.exit(f"{codes} {signal.getsignal(signal.SIGINT)}")
"""


def test_ctrl_c_stays_that_of_who_calls_the_programs(repository: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", CALLED], cwd=repository, capture_output=True, text=True)
    assert ended.stderr == f"[0, 0, 0, 0] {signal.default_int_handler}\n"


def test_ctrl_c_that_a_shell_has_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for at_once in (True, False):
            end_by_ctrl_c(at_once=at_once)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


IMPATIENT = """
import atexit, os, runpy, signal, sys
import utils.errors
def interrupted():
    raise KeyboardInterrupt
utils.errors.exit_on_user_error = interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(os.kill, os.getpid(), signal.SIGINT)
sys.argv = ["tool.py"]
runpy.run_path("tool.py", run_name="__main__")
"""


def test_ctrl_c_again_while_it_ends_is_no_traceback(repository: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", IMPATIENT], cwd=repository, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "interrupted; the same command goes on from here\n")


def test_who_was_making_all_again_is_told_that_it_would_begin_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(tool.TOOLS, "test", interrupted)
    for words, said in ((["--overwrite"], "begins anew, and without --overwrite it keeps"), ([], "goes on from here")):
        assert call("--tools", "test", *words) == 130
        assert f"interrupted; the same command {said}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["save_dir", "flow_dir", "table_dir", "demo_dir", "checkpoint"])
def test_a_variable_that_is_not_set_is_no_place(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        call("--tools", "test", f"--{name}", "")
    assert caught.value.code == 2 and f"error: --{name} '': expected the name of a" in capsys.readouterr().err


def test_a_benchmark_reads_the_video_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path, "DAVIS-2016", videos=3, frames=4, size=(32, 48), flows=False, validation=2)
    read = []
    monkeypatch.setattr("utils.benchmark.bench.run", lambda args, device, frames: read.append(frames))
    words = ["--tools", "bench", "--device", "cpu", "--data_dir", tmp_path, "--bench_video_frames", 3]
    assert call(*words) == 0 and read.pop() is None  # it draws some
    for sequences, video in (([], "video-001"), (["--sequences", "video-002"], "video-002")):
        assert call(*words, "--datasets", "DAVIS-2016", *sequences) == 0
        assert [path.parent.name for path in read.pop()] == [video] * 3
    message = fails(capsys, *words, "--datasets", "DAVIS-2016", "--sequences", "video-02")
    assert "--sequences video-02: not in DAVIS-2016; did you mean video-002" in message and not read
    words[words.index(tmp_path)] = tmp_path / "elsewhere"
    assert "elsewhere" in fails(capsys, *words, "--datasets", "DAVIS-2016") and not read  # before anything is measured


def test_an_interrupted_benchmark_does_not_promise_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("utils.benchmark.bench.run", interrupted)
    assert call("--tools", "bench", "--device", "cpu") == 130
    error = capsys.readouterr().err
    assert "measures all anew" in error and "goes on from here" not in error


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("number", "to_group", "code"),
    # As docker stop sends it, as SLURM and timeout do, as a terminal does, and as the kernel does for want of memory.
    [
        (signal.SIGTERM, False, 143),
        (signal.SIGTERM, True, 143),
        (signal.SIGINT, True, 130),
        (signal.SIGKILL, False, -signal.SIGKILL),
    ],
    ids=["SIGTERM", "SIGTERM to all", "SIGINT to all", "SIGKILL"],
)
def test_a_signal_leaves_no_process_behind(
    number: signal.Signals, to_group: bool, code: int, repository: Path, tmp_path: Path
) -> None:
    frames = tmp_path / "clip"
    frames.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (240, 432, 3), dtype=np.uint8)
    Image.fromarray(noise).save(frames / "0000.jpg")
    for t in range(1, 1000):
        os.link(frames / "0000.jpg", frames / f"{t:04d}.jpg")
    words = ["--tools", "flow", "--flow_method", "dis", "--frames", frames, "--save_dir", tmp_path, "--workers", 2]
    process = subprocess.Popen(
        [sys.executable, "tool.py", *map(str, words)],
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # As from a terminal; shells start what runs in the background with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("flow/clip/*.png")):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.02)
        assert len(alive(process.pid)) >= 3
        (os.killpg if to_group else os.kill)(process.pid, number)
        _, err = process.communicate(timeout=30)  # ends when nobody holds the pipe any more
        deadline = time.monotonic() + 10
        while alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert alive(process.pid) == []
    finally:
        if alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("*.tmp"))
    made = list(tmp_path.glob("flow/clip/*.png"))
    assert len(made) < 1000
    for path in made:
        with Image.open(path) as image:
            image.load()
    assert number == signal.SIGKILL or "the same command goes on from here" in err
