"""Frames, flow images and masks: what is read, and what is refused."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.errors import DataError
from datasets.images import (
    LazyImages,
    fbms_regions,
    image_size,
    load_flow_image,
    load_frame,
    load_mask,
    load_mask_values,
    require_size,
)
from utils.evaluation.scoring import read_map

RNG = np.random.default_rng(7)
PICTURE = RNG.integers(0, 256, (24, 40, 3), dtype=np.uint8)
SHAPE = np.zeros((24, 40), dtype=np.uint8)
SHAPE[5:15, 8:30] = 1


def save(path: Path, array: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def netpbm(path: Path, array: np.ndarray, maximum: int = 255, comment: bytes = b"") -> Path:
    """A raw .pgm or .ppm, written without PIL."""
    kind = b"P6" if array.ndim == 3 else b"P5"
    path.parent.mkdir(parents=True, exist_ok=True)
    size = f"{array.shape[1]} {array.shape[0]}\n{maximum}\n".encode()
    path.write_bytes(kind + b"\n" + comment + size + array.astype(">u2" if maximum > 255 else np.uint8).tobytes())
    return path


def definition(path: Path, colours: list[int]) -> Path:
    regions = "".join(f"Scale of region {index}:\n{colour}\n" for index, colour in enumerate(colours))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"Ground truth definition file; do not change!\n\nTotal number of regions:\n{len(colours)}\n{regions}\n"
        "Confusion penality matrix:\n0 1\n1 0\n\nTotal number of frames in this shot:\n30\n"
        "Total number of labeled frames for this shot:\n1\nFrame number:\n0\nFile name:\na.ppm\n"
        "Input file name:\na.ppm\n"
    )
    return path


# --- frames and flow --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_frame, load_flow_image])
@pytest.mark.parametrize("suffix", [".png", ".ppm", ".bmp", ".tif"])
def test_lossless_frames_come_back_exactly(tmp_path, load, suffix):
    loaded = load(save(tmp_path / f"a{suffix}", PICTURE))
    assert loaded.dtype == np.uint8 and loaded.flags.writeable
    np.testing.assert_array_equal(loaded, PICTURE)


def test_jpeg_frames_are_rgb_in_that_order(tmp_path):
    red = np.zeros((16, 16, 3), dtype=np.uint8)
    red[..., 0] = 250
    loaded = load_frame(save(tmp_path / "a.jpg", red, quality=95))
    assert np.abs(loaded.astype(int) - red).max() < 6


def test_grey_palette_alpha_and_cmyk_frames_become_rgb(tmp_path):
    grey = PICTURE[..., 0]
    np.testing.assert_array_equal(load_frame(save(tmp_path / "grey.png", grey)), np.dstack([grey] * 3))
    alpha = np.dstack([PICTURE, RNG.integers(0, 256, grey.shape, dtype=np.uint8)])
    np.testing.assert_array_equal(load_frame(save(tmp_path / "alpha.png", alpha)), PICTURE)
    indexed = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), mode="P")
    indexed.putpalette([10, 20, 30, 40, 50, 60])
    indexed.save(tmp_path / "indexed.png")
    np.testing.assert_array_equal(load_frame(tmp_path / "indexed.png"), [[[10, 20, 30], [40, 50, 60]]])
    Image.new("CMYK", (9, 5)).save(tmp_path / "cmyk.jpg")
    assert load_frame(tmp_path / "cmyk.jpg").shape == (5, 9, 3)


def test_exif_orientation_is_ignored_so_that_frames_fit_their_masks(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees for display
    path = save(tmp_path / "a.jpg", PICTURE, exif=exif)
    assert load_frame(path).shape == PICTURE.shape == (*image_size(path), 3)


def test_sixteen_bit_frames_are_refused(tmp_path):
    path = save(tmp_path / "a.png", PICTURE[..., 0].astype(np.uint16) * 200)
    with pytest.raises(DataError, match=r"expected 8-bit RGB or grey\. Save all"):
        load_frame(path)


def encode(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, form)
    return buffer.getvalue()


def sixteen_bit_png(path: Path, colours: np.ndarray) -> Path:
    """A PNG of 16 bits in each of the channels of (H, W, C), as KITTI's flow is stored; Pillow writes none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = colours.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_sixteen_bit_colours_are_no_masks_and_no_flow_images(tmp_path, channels):
    """Pillow drops their lower bits: a mask of 0 and 255 would be empty, and raw flow would pass for colours."""
    path = sixteen_bit_png(tmp_path / "a.png", np.repeat(SHAPE[..., None] * 255, channels, axis=2))
    with pytest.raises(DataError, match=r"a\.png: 16 bits per channel in this mask"):
        load_mask(path, "nonzero")
    with pytest.raises(DataError, match=r"a\.png: 16 bits per channel in this flow image.*colour wheel"):
        load_flow_image(path)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "PPM"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.98])
@pytest.mark.parametrize("load", [load_frame, load_flow_image, load_mask])
def test_truncated_images_are_refused_at_any_length(tmp_path, form, share, load):
    path = tmp_path / f"00003.{form.lower()}"
    whole = encode(form)
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DataError, match="00003"):
        load(path)


@pytest.mark.parametrize("content", [b"", b"not an image at all", b"GIF89a" + bytes(40)])
def test_what_is_no_image_is_refused(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    for read in (load_frame, load_flow_image, load_mask, image_size):
        with pytest.raises(DataError, match="a.jpg"):
            read(path)


def test_links_to_nothing_are_said_to_be_such(tmp_path):
    (tmp_path / "a.png").symlink_to("gone/a.png")
    with pytest.raises(DataError, match=r"a\.png: no such frame, but a link to gone/a\.png, which is not there"):
        load_frame(tmp_path / "a.png")


def test_missing_files_and_folders_are_refused(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        for read in (load_frame, load_mask, image_size, lambda path: load_mask(path, "fbms")):
            with pytest.raises(DataError):
                read(path)


def test_require_size_names_both_files_and_both_sizes(tmp_path):
    require_size("m.png", (4, 6), (4, 6, 3), "f.jpg")
    with pytest.raises(DataError, match=r"m\.png: 6×4 .*expected 8×4.*f\.jpg"):
        require_size("m.png", (4, 6), (4, 8, 3), "f.jpg")


def test_images_of_a_video_are_of_the_size_of_the_first(tmp_path):
    """Whichever is asked for first: a batch of two sizes could not be stacked, and flow would be of another frame."""
    sizes = ((4, 6), (4, 6), (6, 4))
    paths = [save(tmp_path / f"{t}.png", np.full((*size, 3), t, np.uint8)) for t, size in enumerate(sizes)]
    images = LazyImages(paths, load_frame)
    with pytest.raises(DataError, match=r"2\.png: 4×6 pixels .*expected 6×4, the size of .*0\.png"):
        images[2]
    assert len(images) == 3 and (images[1] == 1).all() and images[1].shape == (4, 6, 3)
    with pytest.raises(DataError, match=r"gone\.png"):
        LazyImages([paths[0], tmp_path / "gone.png"], load_frame)[1]


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["nonzero", "above_128"])
def test_binary_masks_of_every_storage_mean_the_same(tmp_path, rule):
    one_bit = tmp_path / "1.png"
    Image.fromarray(SHAPE * 255).convert("1").save(one_bit)
    assert Image.open(one_bit).mode == "1"
    paths = [
        one_bit,
        save(tmp_path / "0_255.png", SHAPE * 255),
        save(tmp_path / "0_1.png", SHAPE),
        save(tmp_path / "rgb.png", np.dstack([SHAPE * 255] * 3)),
        save(tmp_path / "rgba.png", np.dstack([*[SHAPE * 255] * 3, np.full_like(SHAPE, 255)])),
        save(tmp_path / "grey.pgm", SHAPE * 255),
    ]
    for path in paths:
        mask = load_mask(path, rule)
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, SHAPE, err_msg=path.name)


def davis_palette(image: Image.Image) -> Image.Image:
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    return image


def test_objects_of_any_colour_are_foreground(tmp_path):
    """As YouTube-VOS's masks come out of a tool that drops the palette: red, green, yellow … on black."""
    colours = np.zeros((2, 3, 3), np.uint8)
    colours[0] = (236, 0, 0), (0, 95, 0), (1, 1, 0)
    Image.fromarray(colours).save(tmp_path / "00000.png")
    np.testing.assert_array_equal(load_mask(tmp_path / "00000.png", "nonzero"), [[1, 1, 1], [0, 0, 0]])


@pytest.mark.parametrize("rule", ["nonzero", "above_128"])
def test_indexed_masks_are_merged_by_index(tmp_path, rule):
    objects = np.array([[0, 1, 2, 3]] * 3, dtype=np.uint8)
    davis_palette(Image.fromarray(objects, mode="P")).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_mask(tmp_path / "a.png", rule), np.minimum(objects, 1))


def test_void_beside_objects_is_no_object(tmp_path):
    """Index 255 of DAVIS-2017's unsupervised annotations; a mask of 0 and 255 alone is binary, and greys are greys."""
    colours = [0, 0, 0, 128, 0, 0] + [90, 30, 10] * 253 + [224, 224, 192]
    greys = np.repeat(np.arange(256), 3).tolist()
    for name, indices, palette, expected in (
        ("void", [0, 1, 255], colours, [0, 1, 0]),
        ("binary", [0, 255, 255], colours, [0, 1, 1]),
        ("grey palette", [0, 1, 255], greys, [0, 1, 1]),
        ("grey", [0, 1, 255], None, [0, 1, 1]),
    ):
        image = Image.fromarray(np.array([indices], dtype=np.uint8), mode="P" if palette else "L")
        if palette:
            image.putpalette(palette)
        image.save(tmp_path / "a.png")
        assert Image.open(tmp_path / "a.png").mode == ("P" if palette else "L")
        np.testing.assert_array_equal(load_mask(tmp_path / "a.png"), [expected], err_msg=name)


def test_a_grey_palette_is_read_by_its_greys_above_128(tmp_path):
    """Optimisers store a grey image as indices in any order; index 0 may be the white."""
    image = Image.fromarray(1 - SHAPE, mode="P")
    image.putpalette([255, 255, 255, 0, 0, 0])
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_mask(tmp_path / "a.png", "above_128"), SHAPE)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_object_in_the_transparency_alone_is_refused(tmp_path, mode):
    """Its colours say that all of the frame is object."""
    image = Image.new(mode, SHAPE.shape[::-1], "white")
    image.putalpha(Image.fromarray(SHAPE * 255))
    image.save(tmp_path / "a.png")
    with pytest.raises(DataError, match="in the transparency alone"):
        load_mask(tmp_path / "a.png")
    opaque = Image.fromarray(SHAPE * 255).convert(mode)
    opaque.save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_mask(tmp_path / "a.png"), SHAPE)
    opaque.putalpha(Image.fromarray(SHAPE * 255))  # which says the same as the values
    opaque.save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_mask(tmp_path / "a.png"), SHAPE)


def test_thresholds(tmp_path):
    greys = np.array([[0, 1, 127, 128, 129, 255]], dtype=np.uint8)
    path = save(tmp_path / "a.png", greys)
    np.testing.assert_array_equal(load_mask(path, "above_128"), greys > 128)
    np.testing.assert_array_equal(load_mask(path, "nonzero"), greys > 0)


def test_sixteen_bit_masks_by_rule(tmp_path):
    path = save(tmp_path / "a.png", SHAPE.astype(np.uint16) * 300)
    np.testing.assert_array_equal(load_mask(path, "nonzero"), SHAPE)
    assert load_mask_values(path)[0].max() == 300
    with pytest.raises(DataError, match="16-bit"):
        load_mask(path, "above_128")


def test_maps_of_floating_point_values_are_refused(tmp_path):
    """As another method may have saved its probabilities."""
    path = save(tmp_path / "a.tif", SHAPE.astype(np.float32))
    for read in (load_mask, read_map):
        with pytest.raises(DataError, match=r"a\.tif: a mask of floating-point values; expected"):
            read(path)


def test_an_unknown_rule_is_an_error(tmp_path):
    with pytest.raises(DataError, match="nonzero, above_128, objects, fbms"):
        load_mask(save(tmp_path / "a.png", SHAPE), "positive")


# --- FBMS -------------------------------------------------------------------------------------------------------------

REGIONS = np.zeros((6, 9), dtype=np.uint8)  # region numbers
REGIONS[1:3, 1:4] = 1
REGIONS[4:5, 2:8] = 2


def paint(colours: list) -> np.ndarray:
    return np.array(colours, dtype=np.uint16 if np.max(colours) > 255 else np.uint8)[REGIONS]


def test_fbms_colour_masks_have_a_white_background(tmp_path):
    path = netpbm(tmp_path / "cats01_0001_gt.ppm", paint([(255, 255, 255), (200, 0, 0), (0, 0, 0)]))
    np.testing.assert_array_equal(load_mask(path, "fbms"), REGIONS > 0)


def test_fbms_grey_masks_have_a_black_background_and_dark_objects_count(tmp_path):
    path = netpbm(tmp_path / "cars1_01.pgm", paint([0, 15, 254]), comment=b"# made by hand\n")
    np.testing.assert_array_equal(load_mask(path, "fbms"), REGIONS > 0)


def test_fbms_definition_file_says_what_is_background(tmp_path):
    """Background 85, and a colour that the table lacks counts as background, as in cats04_0020."""
    definition(tmp_path / "marple7Def.dat", [85, 0])
    path = netpbm(tmp_path / "marple7_001.pgm", paint([85, 0, 40]))
    np.testing.assert_array_equal(load_mask(path, "fbms"), REGIONS == 1)

    colours = [(10, 20, 30), (255, 255, 255), (1, 2, 3)]
    definition(tmp_path / "c" / "cats04Def.dat", [r * 65536 + g * 256 + b for r, g, b in colours])
    path = netpbm(tmp_path / "c" / "cats04_0020_gt.ppm", paint(colours))
    np.testing.assert_array_equal(load_mask(path, "fbms"), REGIONS > 0)


def test_fbms_definition_file_of_something_else(tmp_path):
    """A table of colours beside grey masks: read by it, they would be without any object."""
    path = netpbm(tmp_path / "cats01_0001_gt.pgm", SHAPE * 90)
    definition(tmp_path / "cats01Def.dat", [0xFFFFFF, 120 * 256])
    with pytest.raises(DataError, match=r"cats01_0001_gt\.pgm: no pixel .* cats01Def\.dat \(16777215, 30720,"):
        load_mask(path, "fbms")


def test_fbms_definition_file_of_an_archive_made_on_macos(tmp_path):
    """It has a `._` file beside each file; and where the file system knows no case, names come in capitals."""
    path = netpbm(tmp_path / "cars1_01.pgm", SHAPE * 90 + 10)
    definition(tmp_path / "CARS1DEF.DAT", [10, 100])
    (tmp_path / "._CARS1DEF.DAT").write_bytes(b"\x00\x05\x16\x07")
    np.testing.assert_array_equal(load_mask(path, "fbms"), SHAPE)
    definition(tmp_path / "other.dat", [10, 100])
    with pytest.raises(DataError, match="2 definition files"):
        load_mask(path, "fbms")


def test_fbms_values_are_not_stretched_to_255(tmp_path):
    """PIL turns 20 of 40 into 127; the table lists 20."""
    definition(tmp_path / "cars1Def.dat", [0, 20, 40])
    path = netpbm(tmp_path / "cars1_01.pgm", paint([0, 20, 40]), maximum=40)
    np.testing.assert_array_equal(load_mask(path, "fbms"), REGIONS > 0)
    deep = netpbm(tmp_path / "cars1_02.pgm", paint([0, 20, 400]), maximum=65535)
    np.testing.assert_array_equal(load_mask(deep, "fbms"), REGIONS == 1)


def test_fbms_marple2_takes_dark_greys_as_background(tmp_path):
    path = netpbm(tmp_path / "marple2_001.pgm", paint([0, 102, 103]))
    np.testing.assert_array_equal(load_mask(path, "fbms"), REGIONS == 2)


def test_fbms_text_form_and_truncation(tmp_path):
    path = tmp_path / "a_1.pgm"
    path.write_bytes(b"P2\n2 2\n255\n0 9\n0 8\n")
    np.testing.assert_array_equal(load_mask(path, "fbms"), [[0, 1], [0, 1]])
    path.write_bytes(b"P2\n2 2\n255\n0 9\n0\n")
    with pytest.raises(DataError, match="truncated: 3 of 4"):
        load_mask(path, "fbms")
    whole = netpbm(tmp_path / "b_1.ppm", paint([(0, 0, 0)] * 3)).read_bytes()
    (tmp_path / "b_1.ppm").write_bytes(whole[:-1])
    with pytest.raises(DataError, match="truncated"):
        load_mask(tmp_path / "b_1.ppm", "fbms")
    with pytest.raises(DataError, match="not a .pgm"):
        load_mask(save(tmp_path / "c_1.png", SHAPE), "fbms")


def test_fbms_definition_files_are_parsed_or_refused(tmp_path):
    assert fbms_regions(definition(tmp_path / "aDef.dat", [16777215, 0, 128])) == (16777215, 0, 128)
    broken = tmp_path / "bDef.dat"
    for text in ("", "Total number of regions:\n3\nScale of region 0:\n0\n", "Total number of regions:\n0\n"):
        broken.write_text(text)
        fbms_regions.cache_clear()
        with pytest.raises(DataError, match="bDef.dat"):
            fbms_regions(broken)
    netpbm(tmp_path / "a_1.pgm", REGIONS)
    with pytest.raises(DataError, match="2 definition files"):
        load_mask(tmp_path / "a_1.pgm", "fbms")
