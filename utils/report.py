"""`tool.py --tools report`: one HTML page of what was run and what came out, with pictures; it needs no other file.

`utils.evaluation.reading` reads the figures that it shows.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasets.images import load_flow_image, load_frame, load_mask
from datasets.sequences import VideoSequence
from utils.errors import UserError, check_output, number_of
from utils.evaluation.reading import Scores, read_making, read_rows, read_scores, read_written, tells_of
from utils.evaluation.result_maps import KINDS, is_own
from utils.evaluation.scoring import THRESHOLD, read_map, resized_map
from utils.evaluation.tables import COLUMNS
from utils.files import write_text
from utils.inference.maps import of_run
from utils.inference.segment import RECORD
from utils.visualise import outline, overlay

TRUTH = (0, 220, 255)  # cyan beside the overlay's orange: told apart by colour-blind eyes as well
PICTURE_WIDTH = 400
EXAMPLES = 2  # sequences shown from either end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``report``; the folder is ``--save_dir``."""
    group = parser.add_argument_group("report")
    group.add_argument("--report", metavar="FILE", help="the page to write, .html; default: report.html in --save_dir")
    group.add_argument(
        "--log", metavar="FILE", help="log.jsonl of the training run, for its curves; default: beside the checkpoint"
    )


def check(args: argparse.Namespace) -> None:
    """Refuses what `run` would refuse before it looks at scores, for whoever has much to do before.

    Raises:
        UserError: ``--log`` is not there, or ``--report`` is no name of a page.
    """
    if args.log and not Path(args.log).is_file():
        raise UserError(f"--log {args.log}: no such file; expected the log.jsonl of a training run")
    check_output("report", args.report, ".html")


def run(args: argparse.Namespace, sequences_by_dataset: Mapping[str, Sequence[VideoSequence]]) -> Path:
    """``--tools report``, after `check`: the page for what ``--save_dir`` holds after ``eval``; returns its path.

    Raises:
        UserError: no scores there, or none of a data set. DataError: a picture that cannot be read.
    """
    save_dir = Path(args.save_dir)
    _require_newer(save_dir / "evaluation.json", save_dir, sequences_by_dataset)
    log = Path(args.log) if args.log else None
    if log is not None and not _curves_of(log):
        raise UserError(f"--log {log}: has neither losses nor J of two steps; expected the log.jsonl of a training run")
    path = Path(args.report) if args.report else save_dir / "report.html"
    return write_report(path, save_dir, sequences_by_dataset, log=log)


def _require_newer(scores: Path, save_dir: Path, sequences_by_dataset: Mapping[str, Sequence[VideoSequence]]) -> None:
    """Raises UserError where scores are older than a map of theirs: they may be of the map before it."""
    if not scores.is_file():
        return
    time_of_scores = scores.stat().st_mtime_ns
    for dataset, sequences in sequences_by_dataset.items():
        for sequence in sequences:
            for kind in ("probability", "binary", "crf"):
                for stem in sequence.annotated:
                    path = save_dir / kind / dataset / sequence.name / f"{stem}.png"
                    if path.is_file() and path.stat().st_mtime_ns > time_of_scores:
                        raise UserError(
                            f"{scores}: older than {path} and so perhaps of the map that was there before; run --tools "
                            "eval again, with the same --save_dir"
                        )


def write_report(
    path: Path,
    save_dir: Path,
    sequences_by_dataset: Mapping[str, Sequence[VideoSequence]],
    *,
    title: str = "DBSNet: results",
    introduction: Sequence[str] = (),
    log: Path | None = None,
) -> Path:
    """Writes the page and says where it is.

    Args:
        save_dir: holds evaluation.json and its CSV files, and the maps.
        introduction: paragraphs to begin with.
        log: ``log.jsonl`` of the training run whose weights were tested; by default that beside the checkpoint, where
            all maps are of it.

    Raises:
        As `run`.
    """
    if not (save_dir / "evaluation.json").is_file():
        if not is_own(save_dir):
            raise UserError(
                f"{save_dir}: no results of --tools test ({', '.join(KINDS)}), of which the page would be; masks of "
                "others have no page but the comparison that --tools eval writes. Give the --save_dir of a test"
            )
        raise UserError(f"{save_dir}: no evaluation.json to report on; run --tools eval with this --save_dir first")
    document = read_written(save_dir / "evaluation.json", "eval")
    record = read_written(save_dir / RECORD, "test") if (save_dir / RECORD).is_file() else {}
    body = [f"<h1>{_text(title)}</h1>", *(f"<p>{_text(paragraph)}</p>" for paragraph in introduction)]
    scores = [read_scores(save_dir, document, dataset) for dataset in sequences_by_dataset]
    makings = {score.dataset: read_making(save_dir, score) for score in scores}
    if log is None and all(tells_of(record, making) for making in makings.values()):
        beside = Path(record["checkpoint"]).parent / "log.jsonl"
        log = beside if beside.is_file() else None
    body += [_tiles(score) for score in scores]
    body.append(_facts(record, scores, makings))
    for score in scores:
        body.append(f"<h2>{_text(score.dataset)}</h2>")
        body.append(_table(score))
        body.append(_comparison(save_dir, score))
        body.append(_examples(save_dir, score, sequences_by_dataset[score.dataset]))
        body.append(_curves(score))
    if log is not None:
        body.append(_training(log))
    page = _PAGE.format(title=_text(title), body="\n".join(body))
    write_text(path, page)
    print(f"report: {path}", flush=True)
    return path


# ------------------------------------------------------------------------------------------------------------- parts


def _text(words: object) -> str:
    return html.escape(str(words))


def _tiles(score: Scores) -> str:
    """The figures that a reader came for."""
    keys = [("J_mean", "J"), ("F_mean", "F")] if score.measures == "uvos" else [("S", "S"), ("max_F", "max F")]
    tiles = []
    for key, name in keys:
        for label in score.overall:
            value = score.words(score.overall[label].get(key))
            tiles.append(f'<div class="tile"><b>{value}</b>{name}{" after the CRF" if label else ""}</div>')
    number, words = number_of(len(score.sequences[""]), "sequence").split()
    tiles.append(f'<div class="tile"><b>{number}</b>{words} of {_text(score.dataset)}</div>')
    return f'<div class="tiles">{"".join(tiles)}</div>'


def describe_encoders(network: dict[str, Any]) -> str:
    """The backbones of a network's configuration in words: one name, or a name for each stream."""
    own = f"MobileViT-{network['variant'].upper()}"
    encoder = network.get("encoder", "mobilevit")
    if isinstance(encoder, dict):
        return ", ".join(f"{stream} {own if name == 'mobilevit' else name}" for stream, name in encoder.items())
    return own if encoder == "mobilevit" else encoder


def _facts(record: dict[str, Any], scores: Sequence[Scores], makings: Mapping[str, dict[str, dict[str, Any]]]) -> str:
    """What was run, by what, and by which rule it was scored."""
    import torch

    rows: list[tuple[str, str]] = []
    # Runs of several data sets that differ are told one by one.
    runs = [{label: of_run(made) for label, made in making.items()} for making in makings.values()]
    several = any(run != runs[0] for run in runs)
    # Of runs that are alike, one that had a video of another shape tells what became of it.
    told = sorted(makings.items(), key=lambda item: "resized" not in item[1].get("", {}))[:1]
    for dataset, making in makings.items() if several else told:
        prefix = f"{dataset}, " if several else ""
        rows += [(prefix + name, words) for name, words in _run_rows(record, making)]
    for score in scores:
        figures = "J and F" if score.measures == "uvos" else "MAE, S, F and E"
        rows.append((f"{score.dataset}, {figures}", score.counted))
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}, NumPy {np.__version__}"
    rows.append(("page", f"{time.strftime('%Y-%m-%d %H:%M')}; {versions}"))
    cells = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in rows)
    return f"<dl>{cells}</dl>"


def _run_rows(record: dict[str, Any], making: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """The checkpoint, the network and the options that made the maps of a data set, as far as it is known."""
    if "" not in making:
        return [("maps", "do not say how they were made")]
    rows = []
    settings, known = making[""], tells_of(record, making)
    if known:
        settings, network = record["settings"], record["network"]
        notes = ", ".join(f"{key} {value}" for key, value in record["notes"].items())
        rows += [
            ("checkpoint", f"{record['checkpoint']} (SHA-256 {record['sha256']}…{'; ' + notes if notes else ''})"),
            ("network", f"{describe_encoders(network)}, {record['parameters']:,} parameters"),
        ]
    else:
        other = f" ({RECORD} tells of another run)" if record else ""
        rows.append(("checkpoint", f"SHA-256 {settings['weights']}…{other}"))
    rows.append(
        (
            "test",
            f"{settings['size'][0]}×{settings['size'][1]}, "
            + ("videos of another shape in theirs, " if "resized" in making[""] else "")
            + (f"clips of {settings['clip_len']}" if settings["clip_len"] else "whole video")
            + (", flip" if settings["flip"] else "")
            + (f", scales {settings['scales']}" if settings["scales"] != [1.0] else "")
            + (f", {settings['amp']}" if settings["amp"] != "none" else "")
            + (f", without {settings['without']}" if settings.get("without") else "")
            + (", zoom" if settings.get("zoom") else "")
            + (", consensus of frames" if settings.get("consensus") else "")
            + (", smoothed" if settings.get("smooth") else "")
            + (", optional motion" if settings.get("optional_motion") else "")
            + (f", flow of {settings['flow_dir']}" if settings.get("flow_dir") else "")
            + (f", flow {making['']['flow']}" if making[""].get("flow") else ""),
        )
    )
    if known:
        rate = f", {record['frames_per_second']} frames/s" if record["frames_per_second"] else ""
        rows.append(("run", f"{record['date']} on {record['device']}{rate}"))
    if "crf" in making:
        rows.append(("CRF", ", ".join(f"{key} {value:g}" for key, value in of_run(making["crf"]).items())))
    return rows


def _html_table(first: str, titles: Sequence[str], lines: Sequence[str]) -> str:
    head = "".join(f"<th>{_text(title)}</th>" for title in (first, *titles))
    body = "".join(lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _table(score: Scores) -> str:
    """A line per sequence, the worst last; with the CRF's figures beside the plain ones."""
    percent = score.measures == "uvos"
    wanted = ("J_mean", "F_mean", "J_recall", "J_decay", "F_recall", "F_decay") if percent else None
    columns = [c for c in COLUMNS[score.measures] if c.key in score.overall[""] and (wanted is None or c.key in wanted)]
    extra = [c for c in columns if c.key in ("J_mean", "F_mean", "S", "MAE")] if "crf" in score.overall else []
    lines = []
    for name in [None, *score.ranked]:
        plain = score.overall[""] if name is None else score.sequences[""][name]
        refined = score.overall.get("crf", {}) if name is None else score.sequences.get("crf", {}).get(name, {})
        cells = "".join(f"<td>{c.format(plain.get(c.key))}</td>" for c in columns)
        cells += "".join(f"<td>{c.format(refined.get(c.key))}</td>" for c in extra)
        label = f"all {len(score.sequences[''])}" if name is None else _text(name)
        lines.append(f"<tr{' class=all' if name is None else ''}><th>{label}</th>{cells}</tr>")
    titles = [*(c.title for c in columns), *(f"{c.title} + CRF" for c in extra)]
    note = f'<p class="note">{"Percent. " if percent else ""}Best sequence first.</p>'
    return note + _html_table("sequence", titles, lines)


def _comparison(save_dir: Path, score: Scores) -> str:
    """The ranks among published methods that ``eval`` wrote into comparison.csv; nothing where it compared with none,
    or where the file is of other figures than these.
    """
    if not (save_dir / "comparison.csv").is_file():
        return ""
    keys = [column.key for column in COLUMNS[score.measures]]
    needed = ("dataset", "measures", "rank", "method", "published", *keys, "source", "of")
    rows = [
        row
        for row in read_rows(save_dir / "comparison.csv", needed, *keys)
        if (row["dataset"], row["measures"]) == (score.dataset, score.measures)
    ]
    own = [float(row[score.key]) for row in rows if row["published"] == "no" and row[score.key]]
    if score.overall[""][score.key] not in own or len(own) == len(rows):
        return ""
    columns = [c for c in COLUMNS[score.measures] if any(row[c.key] for row in rows)]
    lines = []
    for row in rows:
        cells = "".join(f"<td>{c.format(float(row[c.key]) if row[c.key] else None)}</td>" for c in columns)
        kind = " class=all" if row["published"] == "no" else ""
        name = f"{row['rank'] or '–'} {row['method']}" + (f", {row['of']}" if row["of"] else "")
        lines.append(f"<tr{kind}><th>{_text(name)}</th>{cells}</tr>")
    sources = dict.fromkeys(row["source"] for row in rows if row["source"])
    note = f'<p class="note">Quoted, not measured here: {_text("; ".join(sources))}.</p>'
    return "<h3>Beside published figures</h3>" + note + _html_table("method", [c.title for c in columns], lines)


def _examples(save_dir: Path, score: Scores, sequences: Sequence[VideoSequence]) -> str:
    """Pictures of the best and the worst sequences: flow, and the best, the median and the worst frame."""
    order = score.ranked
    count = min(EXAMPLES, max(1, len(order) // 2))
    chosen = {"best": order[:count], "worst": order[len(order) - count :] if len(order) > count else []}
    by_name = {sequence.name: sequence for sequence in sequences}
    parts = []
    for kind, names in chosen.items():
        for name in names:
            if name not in by_name:
                continue
            value = f"{score.frame_key} {score.words(score.sequences[''][name][score.key])}"
            parts.append(f"<h3>{_text(name)} <small>{kind}, {value}</small></h3>")
            pictures = _pictures(save_dir, score, by_name[name])
            parts.append(f'<div class="pictures">{"".join(pictures)}</div>')
    legend = (
        '<p class="note"><span class="key" style="background:#ff7800"></span>prediction '
        '<span class="key" style="background:#00dcff"></span>outline of the ground truth</p>'
    )
    return legend + "".join(parts)


def _pictures(save_dir: Path, score: Scores, sequence: VideoSequence) -> list[str]:
    values = score.frames[""][sequence.name]
    stems = sorted(values, key=lambda stem: -values[stem])
    picked = dict(zip(("best frame", "median frame", "worst frame"), (stems[0], stems[len(stems) // 2], stems[-1])))
    if len(stems) < 3:
        picked = {"frame": stems[0]}
    frames = {frame.stem: frame for frame in sequence.frames}
    unknown = [stem for stem in picked.values() if stem not in frames]
    if unknown:
        raise UserError(
            f"{sequence.dataset}/{sequence.name}: has no frame {unknown[0]}, though evaluation.json has its score; the "
            "data is not what was scored: give the same --data_dir, or run --tools test eval again"
        )
    parts = []
    middle = list(picked.values())[len(picked) // 2]
    if middle in sequence.flows:
        parts.append(_figure(load_flow_image(sequence.flows[middle]), f"flow of frame {middle}"))
    for name, stem in picked.items():
        place = Path(sequence.dataset, sequence.name, f"{stem}.png")
        found = [save_dir / kind / place for kind in ("binary", "probability", "crf")]
        path = next((path for path in found if path.is_file()), None)
        if path is None:
            raise UserError(f"{found[0]}: no such map, though evaluation.json has its score; run --tools test again")
        picture = load_frame(frames[stem])
        size = picture.shape[:2]  # masks may have another (eval --resize)
        mask = resized_map(*read_map(path), size) > THRESHOLD
        truth = resized_map(load_mask(sequence.mask_path(stem), sequence.mask_rule), "0/1", size) > 0
        picture = overlay(picture, mask, contour=False)
        picture[outline(truth, max(1, round(picture.shape[0] / 200)))] = TRUTH
        parts.append(_figure(picture, f"{name} {stem}: {score.frame_key} {score.words(values[stem])}"))
    return parts


def _figure(image: np.ndarray, caption: str) -> str:
    """A picture within the page, (H, W, 3) uint8, at most `PICTURE_WIDTH` wide."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    if picture.width > PICTURE_WIDTH:
        height = max(1, round(picture.height * PICTURE_WIDTH / picture.width))
        picture = picture.resize((PICTURE_WIDTH, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<figure><img alt="{_text(caption)}" width="{picture.width}" height="{picture.height}" '
        f'src="data:image/jpeg;base64,{data}"><figcaption>{_text(caption)}</figcaption></figure>'
    )


# ------------------------------------------------------------------------------------------------------------ curves


def _curves(score: Scores) -> str:
    """One small diagram per sequence: J of each frame, and of each frame after the CRF."""
    parts = []
    for name in score.ranked:
        stems = list(score.frames[""][name])
        lines = {}
        for label, frames in score.frames.items():
            lines["crf" if label else "plain"] = [frames.get(name, {}).get(stem) for stem in stems]
        caption = f"{name}, {number_of(len(stems), 'frame')}"
        figure = chart(lines, name=f"{score.frame_key} of each frame of {name}")
        parts.append(f"<figure>{figure}<figcaption>{_text(caption)}</figcaption></figure>")
    legend = '<p class="note"><span class="key plain"></span>as predicted'
    legend += ' <span class="key crf"></span>after the CRF' if "crf" in score.frames else ""
    return f'<h3>{score.frame_key} of each frame</h3>{legend}</p><div class="curves">{"".join(parts)}</div>'


def _training(log: Path) -> str:
    """Loss over the steps, and J on the sequences held out where there were any."""
    parts = []
    for name, points in _curves_of(log).items():
        steps, values = zip(*points)
        top = 1.0 if name.startswith("J") else max(values)
        figure = chart({"plain": list(values)}, name=f"{name} over the steps", top=top, positions=list(steps))
        caption = f"{name}: {values[0]:.3f} at step {steps[0]}, {values[-1]:.3f} at step {steps[-1]}"
        parts.append(f"<figure>{figure}<figcaption>{_text(caption)}</figcaption></figure>")
    if not parts:
        return ""
    return f'<h2>Training</h2><p class="note">{_text(log)}</p><div class="curves">{"".join(parts)}</div>'


def _curves_of(log: Path) -> dict[str, list[tuple[float, float]]]:
    """What a log has two values of or more, as (step, value). Lines that are none of `RunLog` are passed over, such as
    the last one of a run that was cut off.
    """
    curves: dict[str, list[tuple[float, float]]] = {"loss": [], "J on held-out sequences": []}
    kinds = {"train": ("loss", "loss"), "val": ("J on held-out sequences", "J")}
    for line in log.read_bytes().decode("utf-8", "replace").splitlines():
        try:
            entry = json.loads(line)
            name, key = kinds[entry["kind"]]
            point = entry["step"], entry[key]
        except (ValueError, KeyError, TypeError):
            continue
        if all(isinstance(number, (int, float)) and math.isfinite(number) for number in point):
            curves[name].append(point)
    return {name: points for name, points in curves.items() if len(points) > 1}


def chart(
    lines: Mapping[str, Sequence[float | None]],
    *,
    name: str,
    top: float = 1.0,
    positions: Sequence[float] | None = None,
) -> str:
    """An SVG of curves from 0 to ``top``; a line's name is its CSS class, None a gap.

    Args:
        name: what it shows, for who does not see it.
        positions: of the values along the horizontal axis; evenly spaced by default.
    """
    width, height, left, right, border = 280, 110, 30, 6, 8
    top = top if top > 0 else 1.0
    count = max(len(values) for values in lines.values())
    positions = list(range(count)) if positions is None else list(positions)
    span = (positions[-1] - positions[0]) or 1

    def x(position: float) -> float:
        return left + (position - positions[0]) / span * (width - left - right)

    def y(value: float) -> float:
        return border + (1 - min(max(value / top, 0), 1)) * (height - 2 * border)

    parts = []
    for part in (0, 0.5, 1):
        at, label = y(part * top), f"{part * top:.3g}"
        parts.append(f'<path class="grid" d="M{left} {at:.1f}H{width - right}"/>')
        parts.append(f'<text x="{left - 4}" y="{at + 3:.1f}" text-anchor="end">{label}</text>')
    for kind, values in lines.items():
        runs: list[list[str]] = [[]]
        for position, value in zip(positions, values):
            if value is None:
                runs.append([])
            else:
                runs[-1].append(f"{x(position):.1f} {y(value):.1f}")
        # A single point has a length, so that its round end is seen.
        path = "".join(f"M{run[0]}" + ("L" + " ".join(run[1:]) if run[1:] else "h.1") for run in runs if run)
        parts.append(f'<path class="line {kind}" d="{path}"/>')
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_text(name)}">{"".join(parts)}</svg>'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1d2430; --dim: #5d6778; --page: #fff; --soft: #f2f4f7; --rule: #d5dae2;
  --plain: #2563b8; --crf: #c2570c; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e4e8ee; --dim: #9aa5b5; --page: #14181f; --soft: #1f2530;
  --rule: #37404e; --plain: #6ba7f5; --crf: #f0944d; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 1rem; max-width: 64rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.6rem; margin: .5rem 0 1rem; }}
h2 {{ font-size: 1.25rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--rule); }}
h3 {{ font-size: 1rem; margin: 1.4rem 0 .4rem; }}
h3 small, .note, figcaption {{ color: var(--dim); font-size: .85rem; font-weight: 400; }}
.tiles {{ display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; }}
.tile {{ background: var(--soft); border-radius: .5rem; padding: .5rem .9rem; min-width: 7rem; font-size: .85rem; }}
.tile b {{ display: block; font-size: 1.7rem; line-height: 1.2; font-variant-numeric: tabular-nums; }}
dl {{ display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .15rem 1rem; font-size: .9rem; }}
dt {{ color: var(--dim); }}
dd {{ margin: 0; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }}
th:first-child {{ text-align: left; }}
tbody th {{ font-weight: 400; }}
tr.all th, tr.all td {{ font-weight: 700; background: var(--soft); }}
figure {{ margin: 0; }}
figcaption {{ line-height: 1.3; padding-top: .2rem; }}
.pictures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .7rem; }}
.pictures img {{ width: 100%; height: auto; display: block; border-radius: .3rem; }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: 1rem; }}
.key {{ display: inline-block; width: .9rem; height: .6rem; margin: 0 .3rem 0 .6rem; border-radius: .15rem; }}
.key.plain {{ background: var(--plain); }}
.key.crf {{ background: var(--crf); }}
svg {{ width: 100%; height: auto; display: block; }}
svg text {{ font: 9px system-ui, sans-serif; fill: var(--dim); }}
svg .grid {{ stroke: var(--rule); stroke-width: 1; }}
svg .line {{ fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; }}
svg .plain {{ stroke: var(--plain); }}
svg .crf {{ stroke: var(--crf); }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
