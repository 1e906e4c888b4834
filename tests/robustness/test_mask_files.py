"""Masks and images of every kind, made from known ids and colours; hypothesis looks for the case that fails."""

import io
import struct
import zlib
from functools import lru_cache, partial

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageFilter
from scenes import BOOK, NONE, PALETTE, ROAD, SKY, drawing, edges, painting, street

from dataset import fit_pair, read_image
from masks import Colorbook, read_mask

COLORS = PALETTE[:19].astype(int)
few = partial(settings, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
known_ids = st.sampled_from([*range(19), NONE])
small_masks = arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=known_ids)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path, samples, depth=8, palette=None, transparency=b"", interlaced=False):
    """A PNG by the letter of its specification: samples (H, W) or (H, W, 2 to 4) of `depth` bits, palette (n, 3)."""
    samples = samples[..., None] if samples.ndim == 2 else samples
    H, W, channels = samples.shape
    passes = [(0, 0, 1, 1)]
    if interlaced:  # Adam7: first row and column, steps between rows and columns
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    data = b""
    for y, x, down, right in passes:
        for row in samples[y::down, x::right]:
            if row.size:
                bits = row.reshape(-1, 1).astype(np.uint16) >> np.arange(depth - 1, -1, -1) & 1
                data += b"\0" + np.packbits(bits).tobytes()
    color = 3 if palette is not None else {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    head = struct.pack(">IIBBBBB", W, H, depth, color, 0, 0, interlaced)
    extra = chunk(b"PLTE", np.asarray(palette, np.uint8).tobytes()) if palette is not None else b""
    extra += chunk(b"tRNS", transparency) if transparency else b""
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(data))
                     + chunk(b"IEND", b""))


def check_refused(read, path, *words):
    """The error names the file and says what to do."""
    with pytest.raises(ValueError) as error:
        read(path)
    text = str(error.value)
    remedies = "ave it", "Are these", "Paint", "Scale it", "Check the name"
    assert str(path) in text and any(remedy in text for remedy in remedies), text
    assert all(word in text for word in words), text


def mask_of(path):
    return read_mask(path, BOOK)


# ------------------------------------------------------------------------------------------ what is read exactly


@few(max_examples=30)
@given(ids=small_masks, interlaced=st.booleans(),
       form=st.sampled_from(["ids", "palette", "RGB", "RGBA", "RGB 16 bits", "RGBA 16 bits"]))
def test_every_form_of_png(tmp_path, ids, form, interlaced):
    """A mask of any form, with more bits or interlaced, is read exactly."""
    path, rgb = tmp_path / "mask.png", PALETTE[ids]
    if "RGBA" in form:  # below what is transparent there is any colour
        rgb = np.dstack([np.where((ids == NONE)[..., None], 77, rgb), np.where(ids == NONE, 0, 255)])
    depth, samples = (16, rgb.astype(int) * 257) if "16" in form else (8, rgb if "RGB" in form else ids)
    write_png(path, samples, depth, PALETTE if form == "palette" else None, interlaced=interlaced)
    found, kind, snapped = mask_of(path)
    assert np.array_equal(found, ids) and (kind, snapped) == ("colours" if "RGB" in form else form, 0)


@few(max_examples=30)
@given(data=st.data(), depth=st.sampled_from([1, 2, 4, 8]), interlaced=st.booleans())
def test_palettes_of_any_order_and_length(tmp_path, data, depth, interlaced):
    """Colours that a program stored with a palette of its own are read as the classes that they show."""
    size = data.draw(st.integers(1, 2**depth))
    classes = np.array(data.draw(st.lists(known_ids, min_size=size, max_size=size)), np.uint8)  # by entry
    index = data.draw(arrays(np.uint8, (5, 9), elements=st.integers(0, size - 1)))
    assume((classes[index] != index).any())  # else black entries could be ids without a colour
    write_png(tmp_path / "mask.png", index, depth, PALETTE[classes], interlaced=interlaced)
    try:
        assert np.array_equal(mask_of(tmp_path / "mask.png")[0], classes[index])
    except ValueError as error:  # ids of which some have no class look the same
        assert "unknown class ids" in str(error) and (classes[index] == NONE).any()


@pytest.mark.parametrize("void", [(0, 0, 0), (255, 255, 255), (224, 224, 192)])
@pytest.mark.parametrize("ids", [street(), np.full((4, 4), NONE, np.uint8), np.zeros((4, 4), np.uint8)],
                         ids=["street", "none", "road"])
def test_unlabelled_may_have_any_colour_in_a_palette(tmp_path, ids, void):
    """Id 255 is unlabelled in a palette that shows it in black, white, or cream as PASCAL VOC does."""
    write_png(tmp_path / "mask.png", ids, 8, np.concatenate([PALETTE[:255], [void]]))
    assert np.array_equal(mask_of(tmp_path / "mask.png")[0], ids)


@pytest.mark.parametrize("ids", [np.zeros((3, 4), np.uint8), street()], ids=["road only", "street"])
def test_grey_palette_is_ids(tmp_path, ids):
    """Ids with a palette of greys are ids, also where black is all that is shown."""
    write_png(tmp_path / "mask.png", ids, 8, np.arange(256)[:, None].repeat(3, axis=1))
    assert np.array_equal(mask_of(tmp_path / "mask.png")[0], ids)


@pytest.mark.parametrize("form", ["palette", "other palette", "ids", "RGB", "RGBA"])
def test_transparent_is_unlabelled(tmp_path, form):
    """What was erased is unlabelled, whatever colour or id lies below."""
    ids, path = street(), tmp_path / "mask.png"
    expected = np.where(ids == SKY, NONE, ids)
    if form == "palette":
        write_png(path, ids, 8, PALETTE, bytes(0 if k == SKY else 255 for k in range(256)))
    elif form == "other palette":
        write_png(path, 255 - ids, 8, PALETTE[::-1], bytes(0 if k == 255 - SKY else 255 for k in range(256)))
    elif form == "RGBA":
        write_png(path, np.dstack([PALETTE[ids], np.where(ids == SKY, 127, 128)]))
    else:  # one grey or colour is transparent
        value = [SKY] if form == "ids" else PALETTE[SKY].tolist()
        write_png(path, ids if form == "ids" else PALETTE[ids], transparency=struct.pack(f">{len(value)}H", *value))
    assert np.array_equal(mask_of(path)[0], expected)


@few(max_examples=25)
@given(ids=arrays(np.uint8, (4, 6), elements=st.integers(0, 255)), K=st.integers(1, 255), palette=st.booleans())
def test_ids_out_of_range(tmp_path, ids, K, palette):
    """An id without a class is refused with how often it occurs; all others are read."""
    book = Colorbook({str(k): [k + 1, 255 - k, 7] for k in range(K)})
    write_png(tmp_path / "mask.png", ids, 8, np.concatenate([book.colors, np.zeros((256 - K, 3))]) if palette else None)
    odd = ids[(ids >= K) & (ids != NONE)]
    if len(odd):
        check_refused(lambda path: read_mask(path, book), tmp_path / "mask.png",
                      f"{odd.min()} ({(odd == odd.min()).sum()} pixels)", f"0..{K - 1}")
    else:
        assert np.array_equal(read_mask(tmp_path / "mask.png", book)[0], ids)


# ------------------------------------------------------------------------------ modes, formats, and broken files


def saved(mode, suffix, path, **options):
    """The street in colours as an image of that mode and format, or in ids where the mode has a single channel."""
    path = path / f"mask.{suffix}"
    single = mode in ("1", "L", "LA", "P", "I;16", "I", "F")
    image = Image.fromarray(street() if single else PALETTE[street()])
    if mode == "P":
        image.putpalette(PALETTE.tobytes())
    elif mode == "I;16":
        image = Image.fromarray(street().astype(np.uint16))
    elif mode in ("PA", "LAB"):
        image = Image.new(mode, (64, 48))
    else:
        image = image.convert(mode)
    image.save(path, **options)
    return path


READ = [("L", "png"), ("L", "tif"), ("L", "bmp"), ("P", "png"), ("P", "tif"), ("P", "bmp"), ("P", "gif"),
        ("RGB", "png"), ("RGB", "tif"), ("RGB", "bmp"), ("RGBA", "png"), ("RGBA", "tif")]
REFUSED = [("1", "png"), ("1", "tif"), ("1", "bmp"), ("LA", "png"), ("LA", "tif"), ("PA", "tif"), ("I;16", "png"),
           ("I;16", "tif"), ("I", "tif"), ("F", "tif"), ("CMYK", "tif"), ("CMYK", "jpg"), ("LAB", "tif"), ("L", "jpg")]


@pytest.mark.parametrize("mode, suffix", READ)
def test_modes_that_are_read(tmp_path, mode, suffix):
    """A mask in a format that keeps every pixel is read exactly."""
    assert np.array_equal(mask_of(saved(mode, suffix, tmp_path))[0], street())


@pytest.mark.parametrize("mode, suffix", REFUSED)
def test_modes_that_are_refused(tmp_path, mode, suffix):
    """An image whose values are neither ids nor colours, or no longer exactly, is refused with what to do."""
    check_refused(mask_of, saved(mode, suffix, tmp_path), "8-bit PNG")


def test_grey_tiff_with_loss(tmp_path):
    """Ids that were compressed with loss are refused."""
    check_refused(mask_of, saved("L", "tif", tmp_path, compression="jpeg"), "8-bit PNG")


def test_grey_tiff_where_white_is_zero(tmp_path):
    """Ids that a TIFF stores upside down are read as they were."""
    path = saved("L", "tif", tmp_path, tiffinfo={262: 0})
    with Image.open(path) as image:
        assert image.tag_v2[262] == 0
    assert np.array_equal(mask_of(path)[0], street())


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_ids_of_few_bits(tmp_path, depth):
    """Grey of fewer than 8 bits is refused: readers scale it to 0..255, id 1 to 17 or 85, which may be ids too."""
    for ids in np.arange(12).reshape(3, 4) % 2**depth, np.eye(4, dtype=int), np.eye(4, dtype=int) * (2**depth - 1):
        write_png(tmp_path / "mask.png", ids, depth)
        check_refused(mask_of, tmp_path / "mask.png", "8-bit PNG")


@pytest.mark.parametrize("read", [mask_of, read_image])
def test_files_that_are_no_image(tmp_path, read):
    """An empty, missing or foreign file is refused by name."""
    files = {"empty.png": b"", "text.png": b"version https://git-lfs.github.com", "page.jpg": b"<html>404</html>"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        check_refused(read, tmp_path / name, f"{len(content)} bytes")
    (tmp_path / "folder.png").mkdir()
    check_refused(read, tmp_path / "folder.png")
    check_refused(read, tmp_path / "nowhere.png", "No such file")


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_image_without_pixels(tmp_path, size):
    """An image of no pixels is refused by name."""
    write_png(tmp_path / "mask.png", np.zeros((*size, 3), np.uint8))
    check_refused(mask_of, tmp_path / "mask.png")
    check_refused(read_image, tmp_path / "mask.png")


@pytest.mark.parametrize("side", [9_500, 20_000, 60_000])
@pytest.mark.filterwarnings("error")
def test_huge_images(tmp_path, side):
    """A file that unpacks to gigabytes is refused before it does, with its size, the limit and what to do."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    limit = f"at most {Image.MAX_IMAGE_PIXELS:,} pixels"
    check_refused(mask_of, tmp_path / "bomb.png", str(side**2), limit, "Scale it down")
    check_refused(read_image, tmp_path / "bomb.png", str(side**2))


@pytest.mark.parametrize("suffix", ["png", "gif", "tif", "webp"])
def test_several_frames(tmp_path, suffix):
    """An animation or a document of several pages is refused."""
    pages = [Image.new("RGB", (8, 8), tuple(color)) for color in PALETTE[:3].tolist()]
    pages[0].save(tmp_path / f"pages.{suffix}", save_all=True, append_images=pages[1:])
    check_refused(mask_of, tmp_path / f"pages.{suffix}", "3 frames")
    check_refused(read_image, tmp_path / f"pages.{suffix}", "3 frames")


SUFFIXES = ("png", "bmp", "tif", "webp", "gif", "jpg")


@lru_cache
def encoded(suffix):
    """The bytes of a street as a mask in that format."""
    buffer = io.BytesIO()
    options = {"webp": {"lossless": True}, "jpg": {"quality": 90}}.get(suffix, {})
    image = Image.fromarray(PALETTE[street(96, 128)])
    image.save(buffer, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix), **options)
    return buffer.getvalue()


def same_or_refused(read, path, expected):
    try:
        assert np.array_equal(read(path), expected)
    except ValueError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_files(tmp_path, suffix):
    """A download that stopped half-way is read completely or refused."""
    whole, path = encoded(suffix), tmp_path / f"cut.{suffix}"
    path.write_bytes(whole)
    expected = read_image(path)
    for cut in {*range(0, len(whole), max(1, len(whole) // 25)), *range(len(whole) - 12, len(whole))}:
        path.write_bytes(whole[:cut])
        same_or_refused(read_image, path, expected)
        same_or_refused(lambda p: mask_of(p)[0], path, street(96, 128))


@few(max_examples=50)
@given(at=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_damaged_png(tmp_path, at, flip):
    """A PNG with a changed byte is read as before or refused by its check sums."""
    damaged = bytearray(encoded("png"))
    damaged[int(at * len(damaged))] ^= flip
    (tmp_path / "mask.png").write_bytes(damaged)
    same_or_refused(lambda path: mask_of(path)[0], tmp_path / "mask.png", street(96, 128))


@few(max_examples=30)
@given(suffix=st.sampled_from(SUFFIXES), value=st.integers(0, 255),
       at=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4))
def test_no_damage_crashes(tmp_path, suffix, at, value):
    """Any damage ends in a result or a ValueError that names the file."""
    damaged = bytearray(encoded(suffix))
    for where in at:
        damaged[int(where**2 * len(damaged))] = value  # more often in the header
    (tmp_path / f"mask.{suffix}").write_bytes(damaged)
    for read in (mask_of, read_image):
        try:
            read(tmp_path / f"mask.{suffix}")
        except ValueError as error:
            assert f"mask.{suffix}" in str(error)


# --------------------------------------------------------------------------------------------------- rotation

TURNS = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
         5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
         8: np.rot90}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_rotation(tmp_path, orientation):
    """Images and masks are turned as their EXIF says."""
    exif = Image.Exif()
    exif[0x112] = orientation
    ids = street()
    upright = TURNS[orientation](ids)
    mask = Image.fromarray(ids)
    mask.putpalette(PALETTE.tobytes())
    mask.save(tmp_path / "palette.png", exif=exif)
    Image.fromarray(PALETTE[ids]).save(tmp_path / "colours.png", exif=exif)
    Image.fromarray(PALETTE[ids]).save(tmp_path / "photo.jpg", exif=exif, quality=95, subsampling=0)
    Image.fromarray(ids.astype(np.uint16) * 257).save(tmp_path / "deep.png", exif=exif)
    Image.fromarray(PALETTE[ids]).save(tmp_path / "colours.tif", tiffinfo={0x112: orientation})
    for name in ("palette.png", "colours.png", "colours.tif"):
        assert np.array_equal(mask_of(tmp_path / name)[0], upright), name
    assert np.array_equal(read_image(tmp_path / "deep.png")[..., 0], upright)
    image = read_image(tmp_path / "photo.jpg")
    assert np.abs(image.astype(int) - PALETTE[upright]).mean() < 4
    fit_pair(image, mask_of(tmp_path / "palette.png")[0], (8, 8), None, "pair")  # they have one size


# ----------------------------------------------------------------------------------------------------- images


@few(max_examples=40)
@given(values=arrays(np.uint16, st.tuples(st.integers(1, 9), st.integers(1, 9))), interlaced=st.booleans())
@example(values=np.array([[0, 128, 129, 255, 256, 257, 32768, 65279, 65406, 65407, 65535]], np.uint16),
         interlaced=False)
def test_16_bit_images_are_scaled(tmp_path, values, interlaced):
    """16 bits are scaled to 8 and rounded."""
    expected = np.floor(values / 257 + 0.5)
    write_png(tmp_path / "grey.png", values, 16, interlaced=interlaced)
    assert np.array_equal(read_image(tmp_path / "grey.png"), expected[..., None].repeat(3, axis=2))
    Image.fromarray(values).save(tmp_path / "grey.tif")
    assert np.array_equal(read_image(tmp_path / "grey.tif"), expected[..., None].repeat(3, axis=2))
    rgb = np.dstack([values, values[::-1], 65535 - values])
    write_png(tmp_path / "rgb.png", rgb, 16, interlaced=interlaced)
    assert np.abs(read_image(tmp_path / "rgb.png") - rgb / 257).max() <= 1


CONVERTED = {"1": (255, 255, 255), "L": (77, 77, 77), "LA": (77, 77, 77), "P": (200, 30, 90), "RGB": (200, 30, 90),
             "RGBA": (200, 30, 90), "CMYK": (200, 30, 90), "YCbCr": (200, 30, 90)}


SAVED = {"png": ("1", "L", "LA", "P", "RGB", "RGBA"), "tif": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"),
         "jpg": ("1", "L", "RGB", "CMYK", "YCbCr"), "bmp": ("1", "L", "P", "RGB", "RGBA"), "webp": ("RGB", "RGBA")}


@pytest.mark.parametrize("mode, suffix", [(mode, suffix) for suffix, modes in SAVED.items() for mode in modes])
def test_modes_of_images(tmp_path, mode, suffix):
    """Grey, CMYK and palette images are read in the colours that they show."""
    image = Image.new("RGB", (16, 16), CONVERTED[mode]).convert(mode, palette=Image.Palette.ADAPTIVE)
    image.save(tmp_path / f"image.{suffix}", **{"webp": {"lossless": True}, "jpg": {"quality": 95}}.get(suffix, {}))
    assert np.abs(read_image(tmp_path / f"image.{suffix}").astype(int) - CONVERTED[mode]).max() <= 3


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_images_of_unknown_range(tmp_path, mode):
    """Images whose range is not known are refused."""
    Image.new(mode, (8, 8)).save(tmp_path / "image.tif")
    check_refused(read_image, tmp_path / "image.tif", mode, "8-bit PNG")


@pytest.mark.parametrize("form", ["RGBA", "LA", "palette", "associated"])
def test_transparent_images_are_black_there(tmp_path, form):
    """Transparent parts of an image are black, whatever colour lies below."""
    path = tmp_path / "image.png"
    alpha = np.array([[0, 51, 255]], np.uint8)
    if form == "palette":
        write_png(path, np.array([[0, 1, 2]]), 8, [[200, 100, 50]] * 3, bytes(alpha[0]))
    elif form == "LA":
        write_png(path, np.dstack([np.full((1, 3), 200), alpha]))
    elif form == "RGBA":
        write_png(path, np.dstack([np.broadcast_to([200, 100, 50], (1, 3, 3)), alpha]))
    else:  # a TIFF whose colours are multiplied by alpha already
        path = tmp_path / "image.tif"
        Image.fromarray(np.array([[[0, 0, 0, 0], [40, 20, 10, 51], [200, 100, 50, 255]]], np.uint8)).save(path)
        tag, associated = (struct.pack("<HHIH", 338, 3, 1, kind) for kind in (2, 1))
        assert tag in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(tag, associated))
    expected = np.array([[[0, 0, 0], [40, 20, 10], [200, 100, 50]]])
    assert np.abs(read_image(path) - (expected[..., :1] if form == "LA" else expected)).max() <= 1


def test_phone_photo_with_a_second_image(tmp_path):
    """A photo of a phone (MPO) is read although a small second image is in the file."""
    pages = [Image.new("RGB", size, color) for size, color in (((32, 16), "red"), ((8, 4), "blue"))]
    pages[0].save(tmp_path / "photo.jpg", "MPO", save_all=True, append_images=pages[1:])
    image = read_image(tmp_path / "photo.jpg")
    assert image.shape == (16, 32, 3) and np.abs(image - [254, 0, 0]).max() <= 3


# ------------------------------------------------------------------------------ colours at, near, between classes


@few(max_examples=40)
@given(color=st.one_of(
    st.tuples(*[st.integers(0, 255)] * 3),
    st.builds(lambda k, d: tuple(np.clip(COLORS[k] + d, 0, 255).tolist()),  # near a class
              st.integers(0, 18), arrays(int, 3, elements=st.integers(-14, 14))),
    st.builds(lambda a, b, t: tuple((COLORS[a] + t * (COLORS[b] - COLORS[a])).astype(int).tolist()),  # between two
              st.integers(0, 18), st.integers(0, 18), st.floats(0, 1))),
       ground=st.lists(known_ids, min_size=1, max_size=2))
def test_painted_colours(tmp_path, color, ground):
    """A painted spot becomes the class that it is within reach of, and is refused if there is none."""
    rgb = PALETTE[np.repeat(np.resize(np.array(ground, np.uint8), 2), 12)[None].repeat(24, axis=0)]
    rgb[6:18, 6:18] = color
    write_png(tmp_path / "mask.png", rgb)
    distance = np.linalg.norm(np.concatenate([COLORS, [[0, 0, 0], [255, 255, 255]]]) - color, axis=1)
    best = np.append(np.arange(19), [NONE, NONE])[distance.argmin()]
    if distance.min() > 20:
        check_refused(mask_of, tmp_path / "mask.png", str(color), "144 pixels")
        return
    ids = mask_of(tmp_path / "mask.png")[0]
    spot = ids[6:18, 6:18]
    assert (spot[1:-1, 1:-1] == best).all()
    assert set(np.unique(spot)) <= {best, *ground}
    away = ids.copy()
    away[5:19, 5:19] = 99
    assert set(np.unique(away)) <= {*ground, 99}


# ------------------------------------------------------------------------------------------------- soft brushes


def in_linear_light(image, size):
    """An image shrunk to a quarter by averaging light, as some paint programs do: edges turn out brighter."""
    light = (np.array(image) / 255) ** 2.2
    light = light.reshape(size[1], 4, size[0], 4, 3).mean(axis=(1, 3))
    return Image.fromarray((255 * light ** (1 / 2.2)).round().astype(np.uint8))


def airbrush(image, size, radius):
    return image.filter(ImageFilter.GaussianBlur(4 * radius)).resize(size, Image.Resampling.BOX)


BRUSHES = {  # how it is painted; the least share of pixels that is right, of all and within 2 pixels of an edge
    "lanczos": (lambda image, size: image.resize(size, Image.Resampling.LANCZOS), 0.993, 0.95),
    "box": (lambda image, size: image.resize(size, Image.Resampling.BOX), 0.993, 0.95),
    "bicubic": (lambda image, size: image.resize(size, Image.Resampling.BICUBIC), 0.993, 0.95),
    "linear light": (in_linear_light, 0.99, 0.94),
    "airbrush of 1 pixel": (lambda image, size: airbrush(image, size, 1), 0.985, 0.92),
    "airbrush of 2 pixels": (lambda image, size: airbrush(image, size, 2), 0.98, 0.87),
}


def naive(rgb):
    """The nearest class of each pixel, the simplest way to read soft edges."""
    colors = np.concatenate([COLORS, [[0, 0, 0]]])
    return np.append(np.arange(19), NONE)[np.stack([((rgb - c) ** 2).sum(axis=2) for c in colors]).argmin(axis=0)]


@pytest.mark.parametrize("brush", BRUSHES)
def test_soft_brushes(tmp_path, brush):
    """Soft edges are read right to 99.3 % of all pixels and 95 % near a border, without rims of other classes."""
    paint, least, least_at_edges = BRUSHES[brush]
    right, rims = [], []
    for seed in range(3):
        large = painting(seed)
        truth = large[2::4, 2::4]
        image = paint(Image.fromarray(PALETTE[large]), (192, 144))
        image.save(tmp_path / "mask.png")
        ids, edge = mask_of(tmp_path / "mask.png")[0], edges(truth)
        simple = naive(np.array(image).astype(int))
        right.append([(x == truth)[where].mean() for x in (ids, simple) for where in (slice(None), edge)])
        rims.append([np.isin(x, np.unique(truth), invert=True).mean() for x in (ids, simple)])
    (ours, ours_at_edges, simple, simple_at_edges), (rim, simple_rim) = np.mean(right, axis=0), np.mean(rims, axis=0)
    print(f"{brush}: right {ours:.2%}, at edges {ours_at_edges:.1%} (nearest colour: {simple:.2%}, "
          f"{simple_at_edges:.1%}); in a class that is not in the mask {rim:.3%} ({simple_rim:.3%})")
    assert ours >= least and ours_at_edges >= least_at_edges and rim <= simple_rim / 5
    assert 1 - ours_at_edges <= 0.65 * (1 - simple_at_edges)


@pytest.mark.parametrize("radius", [4, 8])
def test_wide_airbrush(tmp_path, radius):
    """Masks of a wide airbrush are read where every class can be seen."""
    hard = drawing(512, (SKY, 8, 2, 13, ROAD))
    Image.fromarray(PALETTE[hard]).filter(ImageFilter.GaussianBlur(radius)).save(tmp_path / "mask.png")
    ids = mask_of(tmp_path / "mask.png")[0]
    assert (ids == hard).mean() >= 0.97 and np.isin(ids, np.unique(hard)).mean() >= 0.99


@few(max_examples=10)
@given(seed=st.integers(0, 59), quality=st.integers(50, 95), subsampling=st.sampled_from([0, 2]))
def test_jpeg_of_any_quality(tmp_path, seed, quality, subsampling):
    """A JPEG of quality 50 or more is read right; the worst of 60 small ones, with chroma at half the size, to 94 %."""
    truth = painting(seed, shapes=6)[2::4, 2::4]
    Image.fromarray(PALETTE[truth]).save(tmp_path / "mask.jpg", quality=quality, subsampling=subsampling)
    ids = mask_of(tmp_path / "mask.jpg")[0]
    assert (ids == truth).mean() >= 0.93 and np.isin(ids, np.unique(truth)).mean() >= 0.99


def test_jpeg_of_low_quality(tmp_path):
    """Small masks in JPEG of quality 50 with chroma at half the size are read to 97 % in the mean."""
    right = []
    for seed in range(12):
        truth = painting(seed, shapes=6)[2::4, 2::4]
        Image.fromarray(PALETTE[truth]).save(tmp_path / "mask.jpg", quality=50, subsampling=2)
        right.append((mask_of(tmp_path / "mask.jpg")[0] == truth).mean())
    assert np.mean(right) >= 0.97 and min(right) >= 0.93


def test_jpeg_of_common_quality(tmp_path):
    """A mask that went through a chat program is read."""
    for seed in range(8):
        truth = painting(seed, shapes=6)[2::4, 2::4]
        Image.fromarray(PALETTE[truth]).save(tmp_path / "mask.jpg", quality=85)
        assert (mask_of(tmp_path / "mask.jpg")[0] == truth).mean() >= 0.96


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_unknown_colour_in_a_lossy_file(tmp_path, suffix):
    """A painted colour of no class is refused in compressed files, too, although their edges ring."""
    rgb = PALETTE[painting(3, shapes=6)[2::4, 2::4]]
    rgb[40:64, 50:74] = 255, 0, 255
    Image.fromarray(rgb).save(tmp_path / f"mask.{suffix}", quality=80)
    check_refused(mask_of, tmp_path / f"mask.{suffix}", "in no class")
