"""The colour wheel against torchvision's, and mirroring of flow pictures against colouring the mirrored flow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.utils import flow_to_image as torchvision_flow_to_image

from datasets.flow_colour import (
    colour_wheel,
    flow_to_image,
    flows_to_images,
    mirror_colours,
    turn_colours,
)
from tests.flow_pictures import image_to_flow


def example_flows() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:60j, -1:1:80j].astype(np.float32)
    return {
        "noise": rng.normal(0, 5, (60, 80, 2)).astype(np.float32),
        "all directions and speeds": np.stack([x, y], axis=-1) * 30,
        "tiny": np.stack([x, y], axis=-1) * 1e-6,
        "right": np.stack([np.full_like(x, 3), np.zeros_like(x)], axis=-1),
        "left, the seam of the wheel": np.stack([np.full_like(x, -3), np.zeros_like(x)], axis=-1),
        "a spot moves": np.where(np.hypot(x, y) < 0.1, 7, 0)[..., None].repeat(2, -1).astype(np.float32),
        "none": np.zeros((60, 80, 2), dtype=np.float32),
    }


def assert_same_but_for_wrapping(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal to the byte, but that torchvision turns what rounding takes below 0 into 255, and we into 0."""
    different = found != expected
    assert different.sum() <= 2  # only the fastest pixel can be concerned
    assert (found[different] == 0).all() and (expected[different] == 255).all()


@pytest.mark.parametrize("name", example_flows())
def test_pictures_are_torchvisions_to_the_byte(name: str) -> None:
    flow = example_flows()[name]
    expected = torchvision_flow_to_image(torch.from_numpy(flow).permute(2, 0, 1).contiguous()).permute(1, 2, 0).numpy()
    assert_same_but_for_wrapping(flow_to_image(flow), expected)


def test_every_frame_of_a_clip_is_normalised_by_itself() -> None:
    flows = torch.from_numpy(np.stack(list(example_flows().values()))).permute(0, 3, 1, 2)
    expected = torch.stack([torchvision_flow_to_image(f.contiguous()) for f in flows])
    assert_same_but_for_wrapping(flows_to_images(flows).numpy(), expected.numpy())


def test_no_motion_is_white() -> None:
    assert (flow_to_image(np.zeros((4, 5, 2), dtype=np.float32)) == 255).all()


def test_wheel_is_that_of_torchvision() -> None:
    from torchvision.utils import _make_colorwheel

    np.testing.assert_array_equal(colour_wheel(), _make_colorwheel().numpy())


def test_flow_can_be_read_back_from_its_picture() -> None:
    flow = example_flows()["noise"]
    expected = flow / np.linalg.norm(flow, axis=-1).max()
    assert np.abs(image_to_flow(flow_to_image(flow)) - expected).max() < 0.02


def test_mirrored_picture_is_the_picture_of_the_mirrored_flow() -> None:
    flow = torch.from_numpy(np.stack([example_flows()[n] for n in ("noise", "all directions and speeds")]))
    flow = flow.permute(0, 3, 1, 2)
    mirrored = flow * torch.tensor([-1.0, 1.0])[:, None, None]
    difference = (mirror_colours(flows_to_images(flow)).int() - flows_to_images(mirrored).int()).abs()
    assert difference.float().mean() < 1
    # where the wheel closes, at motion to the left, red jumps by 43 levels; only a sliver of directions touches it
    assert (difference > 5).float().mean() < 0.01


@pytest.mark.parametrize("degrees", [-170, -10, 3, 90, 180])
def test_turned_picture_is_the_picture_of_the_turned_flow(degrees: float) -> None:
    flow = torch.from_numpy(np.stack([example_flows()[n] for n in ("noise", "all directions and speeds")]))
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turned = flow @ torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float32)  # (x, y) -> (cx - sy, sx + cy)
    flow, turned = (part.permute(0, 3, 1, 2) for part in (flow, turned))
    difference = (turn_colours(flows_to_images(flow), np.radians(degrees)).int() - flows_to_images(turned).int()).abs()
    assert difference.float().mean() < 1
    assert (difference > 5).float().mean() < 0.01  # where the wheel closes, as above


def test_turning_leaves_greys_as_they_are() -> None:
    greys = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(turn_colours(greys, 1.0), greys)


def test_mirroring_leaves_white_white_and_undoes_itself() -> None:
    white = torch.full((1, 3, 4, 5), 255, dtype=torch.uint8)
    assert torch.equal(mirror_colours(white), white)
    images = flows_to_images(torch.from_numpy(example_flows()["noise"]).permute(2, 0, 1)[None])
    assert (mirror_colours(mirror_colours(images)).int() - images.int()).abs().float().mean() < 2


@pytest.mark.parametrize(
    "flow", [np.zeros((4, 5)), np.zeros((2, 4, 5)), np.full((4, 5, 2), np.nan), np.full((4, 5, 2), np.inf)]
)
def test_what_is_no_flow_is_refused(flow: np.ndarray) -> None:
    with pytest.raises(ValueError, match="shape|finite"):
        flow_to_image(flow.astype(np.float32))
