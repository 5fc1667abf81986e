"""Motion as an option: what the network says of a video and, with a third of the say, of the same frames at rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import datasets.images
import models.predictor
from datasets.flow_colour import flow_to_image
from models import DBSNet, Predictor
from models.optional_motion import NO_MOTION, weigh
from tests.test_predictor import as_clip, collect, exact, make_net, make_video

SIZE = (64, 96)


@pytest.fixture(scope="module")
def net() -> DBSNet:
    return make_net()


def logits(net: DBSNet, frames: list[np.ndarray], flows: list[np.ndarray]) -> np.ndarray:
    """The network's logits of a whole clip, (T, H, W)."""
    with torch.inference_mode():
        return net(as_clip(frames), as_clip(flows))[0, :, 0].numpy()


def at_rest(flows: list[np.ndarray]) -> list[np.ndarray]:
    return [np.full_like(flow, 255) for flow in flows]


def weighed(moving: np.ndarray, resting: np.ndarray) -> np.ndarray:
    return (2 * moving + resting) / 3


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_no_motion_has_the_colour_that_flow_images_give_it() -> None:
    flow = np.zeros((2, 3, 2), np.float32)
    flow[0, 0] = (1, 0)
    assert (flow_to_image(flow)[1] == NO_MOTION).all() and datasets.images.NO_MOTION == NO_MOTION


@pytest.mark.parametrize("options", [
    {}, {"batch_size": 1}, {"batch_size": 5, "piece": 3}, {"host_memory": 0}, {"fold": False}, {"channels_last": False},
])  # fmt: skip
@pytest.mark.parametrize("length", [1, 11])
def test_both_have_their_say(net: DBSNet, length: int, options: dict[str, Any]) -> None:
    frames, flows = make_video(length)
    moving, resting = logits(net, frames, flows), logits(net, frames, at_rest(flows))
    result = collect(exact(net, optional_motion=True, **options)(frames, flows))
    np.testing.assert_allclose(result, sigmoid(weighed(moving, resting)), atol=2e-5)
    for alone in (moving, resting):  # neither of the two decides alone
        assert np.abs(result - sigmoid(alone)).max() > 0.01


def test_logits_in_half_precision_lose_nothing_more() -> None:
    moving, resting = torch.randn(2, 3, 1, 4, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.testing.assert_close(weigh(moving, resting), (2 * moving.float() + resting.float()) / 3)  # in float32


def test_in_clips(net: DBSNet) -> None:
    frames, flows = make_video(4)
    both = weighed(logits(net, frames, flows), logits(net, frames, at_rest(flows)))
    result = collect(exact(net, optional_motion=True, clip_len=4)(frames, flows))
    np.testing.assert_allclose(result, sigmoid(both), atol=2e-5)


def test_in_each_pass(net: DBSNet) -> None:
    frames, flows = make_video(5)

    def once(mirror: bool) -> np.ndarray:
        x, y = ([image[:, ::-1] for image in images] if mirror else images for images in (frames, flows))
        result = sigmoid(weighed(logits(net, x, y), logits(net, x, at_rest(y))))
        return result[..., ::-1] if mirror else result

    result = collect(exact(net, optional_motion=True, flip=True)(frames, flows))
    np.testing.assert_allclose(result, (once(False) + once(True)) / 2, atol=2e-5)


def test_votes_are_of_both(net: DBSNet, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[torch.Tensor] = []
    agree = models.predictor.agree

    def watched(batches, *rest):
        return agree((given.append(batch.clone()) or batch for batch in batches), *rest)

    monkeypatch.setattr(models.predictor, "agree", watched)
    frames, flows = make_video(12)
    voted = collect(exact(net, optional_motion=True, consensus=True)(frames, flows))
    both = weighed(logits(net, frames, flows), logits(net, frames, at_rest(flows)))
    small = F.interpolate(torch.cat(given), size=SIZE, mode="bilinear")[:, 0].numpy()
    np.testing.assert_allclose(small, both, atol=1e-4)
    assert np.abs(voted - sigmoid(both)).max() > 0.01


def test_a_closer_look_follows_both(net: DBSNet, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    extents = models.predictor.extents
    monkeypatch.setattr(models.predictor, "extents", lambda found: seen.append(found.clone()) or extents(found))
    frames, flows = make_video(3, (96, 160))
    collect(exact(net, optional_motion=True, zoom=True)(frames, flows))
    small = [
        F.interpolate(as_clip(images)[0], size=(64, 96), mode="bilinear", antialias=True)
        for images in (frames, flows, at_rest(flows))
    ]
    with torch.inference_mode():
        both = weighed(*(net(small[0][None], flow[None])[0, :, 0] for flow in small[1:]))
    np.testing.assert_allclose(torch.cat(seen), both.sigmoid(), atol=2e-5)


def test_each_frame_is_encoded_once_and_rest_once(net: DBSNet, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = dict.fromkeys(net.streams, 0)
    maps = DBSNet.encoder_maps

    def counted(self, frames, flows):
        for stream, images in zip(self.streams, (frames, flows)):
            counts[stream] += len(images)
        return maps(self, frames, flows)

    monkeypatch.setattr(DBSNet, "encoder_maps", counted)
    encoded: list[int] = []
    collect(Predictor(net, optional_motion=True, on_encoded=encoded.append)(*make_video(9)))
    assert counts == {"appearance": 9, "motion": 9} and sum(encoded) == 9


@pytest.mark.parametrize("stream", ["appearance", "motion"])
def test_it_needs_both_streams(stream: str) -> None:
    with pytest.raises(ValueError, match="optional_motion needs a network of both streams"):
        Predictor(make_net(streams=(stream,)), optional_motion=True)
