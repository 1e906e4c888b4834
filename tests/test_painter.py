"""The painter's server: what it draws is what sample.py draws; what it refuses; what it survives."""

import base64
import http.client
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLASSES
from PIL import Image

import sample
from checkpoint import save_checkpoint
from config import load_config
from masks import Colorbook
from painter import __main__ as painter
from scenes import CITYSCAPES
from unet import UNet

H, W = 336, 504  # the canvas of a network of 16x24: 21 times as large


def make_checkpoint(path, classes=CLASSES, size=(16, 24), conditional=True):
    """Weights of a network that learnt nothing: its images are as good as any to compare."""
    settings = [f"data.size={list(size)}", "model.hidden_dim=4", "model.emb_dim=8", "diffusion.T=20", "sample.steps=3",
                "sample.n=2", "sample.precision=fp32", "sample.eta=0.5", f"model.conditional={conditional}"]
    torch.manual_seed(1)
    save_checkpoint(path, {"ema": UNet(len(classes) if conditional else 0, 4, 8).state_dict(), "step": 7,
                           "config": load_config(overrides=settings),
                           "colorbook": {name: list(rgb) for name, rgb in classes.items()}})
    return path


def arguments(checkpoint, out, **given):
    absent = {"config": None, "preset": None, "set": [], "device": "cpu"}
    return SimpleNamespace(**absent | {"checkpoint": checkpoint and str(checkpoint), "out": str(out)} | given)


@pytest.fixture
def serve(tmp_path):
    """serve(checkpoint, ...) starts a painter in this process and returns it as a Client."""
    running = []

    def start(checkpoint=None, **given):
        checkpoint = checkpoint or make_checkpoint(tmp_path / "net.pt")
        studio = painter.Studio(arguments(checkpoint, tmp_path / "out", **given))
        server = painter.start_server(studio, 0)
        threading.Thread(target=server.serve_forever, args=[.05]).start()
        running.append(server)
        return Client(server)

    yield start
    for server in running:
        server.shutdown()
        server.server_close()
        server.studio.close()


class Client:
    def __init__(self, server):
        self.server, self.studio, self.port = server, server.studio, server.server_port

    def ask(self, method, path, body=None, headers=()):
        """Status, headers and body of a request; without a Host in `headers`, of one from the page."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return answer.status, answer.headers, text

    def get(self, path):
        status, _, text = self.ask("GET", path)
        assert status == 200, text
        return json.loads(text)

    def draw(self, ids, **settings):
        status, _, text = self.ask("POST", "/draw", json.dumps({"mask": encode(ids)} | settings))
        assert status == 200, text
        return json.loads(text)

    def finished(self, number):
        """The description of a drawing once it is no longer waiting or worked on."""
        for _ in range(1000):
            drawing = self.get(f"/drawing/{number}")
            if drawing["state"] not in ("waiting", "working"):
                return drawing
            time.sleep(.02)
        raise AssertionError(f"not finished: {drawing}")

    def alive(self):
        return self.get("/model")["size"] == [16, 24]


def encode(ids):
    return base64.b64encode(ids.tobytes()).decode()


def painted():
    """Sky above road, with a car, a person that the network's pixels do not line up with, and a bit of nothing."""
    ids = np.zeros((H, W), np.uint8)
    ids[:150], ids[200:280, 60:200], ids[170:290, 333:371], ids[320:] = 1, 2, 3, 255
    return ids


@pytest.fixture
def gate(monkeypatch):
    """A semaphore that every pass of the network takes once; `gate.failing` set, a pass raises instead."""
    semaphore, real = threading.Semaphore(0), UNet.forward
    semaphore.failing = False

    def forward(self, *args, **kwargs):
        assert semaphore.acquire(timeout=20)
        if semaphore.failing:
            semaphore.failing = False
            raise RuntimeError("the network broke")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(UNet, "forward", forward)
    yield semaphore
    semaphore.release(10_000)


def until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(.01)
    raise AssertionError("waited in vain")


# ------------------------------------------------------------------------------------------------- what it draws


@pytest.mark.parametrize("options, settings", [
    ({}, {}),
    ({}, {"n": 3, "guidance": 1.5, "steps": 4, "sampler": "plms", "seed": 2**53 - 1}),
    ({"set": ["sample.batch_size=2", "sample.guidance=2.25"]}, {"n": 5, "sampler": "ddim", "steps": 5, "seed": 40}),
    ({}, {"n": 1, "sampler": "ddpm", "guidance": 0}),
])
def test_the_command_line_gives_the_same_files(serve, tmp_path, monkeypatch, options, settings):
    """The command that the page shows makes the same files, byte for byte: pixels and settings."""
    page = serve(**options)
    drawing = page.finished(page.draw(painted(), **settings)["number"])
    assert drawing["state"] == "done" and drawing | settings == drawing, drawing
    words = shlex.split(drawing["command"])
    assert words[:2] == ["python", "sample.py"]
    monkeypatch.setattr(sys, "argv", [*words[1:], "--out", str(tmp_path / "again")])
    sample.main()
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").glob("*_seed*.png")}
    assert again == {name: (tmp_path / "out" / name).read_bytes() for name in drawing["files"]}
    assert len(again) == settings.get("n", 2) and len(set(again.values())) == len(again)
    for name in drawing["files"]:
        assert page.ask("GET", f"/files/{name}")[2] == again[name]
        written = json.loads(Image.open(io.BytesIO(again[name])).text["settings"])
        assert {key: written[key] for key in settings if key != "n" and key != "seed"} == {
            key: value for key, value in settings.items() if key != "n" and key != "seed"}


def test_the_painting_is_the_mask_that_was_sent(serve, tmp_path):
    """A drawing leaves its mask as a palette PNG of exactly the ids that were sent; the next has the next number."""
    page, ids = serve(), painted()
    assert [page.finished(page.draw(ids)["number"])["painting"] for _ in range(2)] == [
        "painting_0001.png", "painting_0002.png"]
    for png in ((tmp_path / "out" / "painting_0002.png").read_bytes(), page.ask("GET", "/files/painting_0002.png")[2],
                page.ask("POST", "/mask.png", json.dumps({"mask": encode(ids)}))[2]):
        image = Image.open(io.BytesIO(png))
        assert image.mode == "P" and (np.array(image) == ids).all()
        assert image.getpalette()[:12] == [value for rgb in CLASSES.values() for value in rgb]


def test_numbers_go_on_after_a_restart(serve, tmp_path):
    """What an earlier painter left in the folder stays as it is, images without their mask too."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "painting_0007_w2_seed1.png").write_bytes(b"mine")
    (tmp_path / "out" / "painting_of_mine.png").write_bytes(b"mine")
    page = serve()
    assert page.draw(painted())["painting"] == "painting_0008.png"
    assert (tmp_path / "out" / "painting_0007_w2_seed1.png").read_bytes() == b"mine"


def test_previews_while_it_works(serve, gate):
    """After each step come the predicted images, the share that is done and the time that is left."""
    page = serve()
    number = page.draw(painted(), n=3, steps=4, guidance=1)["number"]
    before, seen = set(), ""
    for step in range(1, 4):
        gate.release()
        until(lambda step=step: page.get(f"/drawing/{number}")["progress"] == step / 4)
        drawing = page.get(f"/drawing/{number}/{seen}")
        sizes = {Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size for url in drawing["previews"]}
        assert len(drawing["previews"]) == 3 and sizes == {(24, 16)}
        assert drawing["seconds_left"] == pytest.approx(drawing["seconds"] * (4 - step) / step)
        assert not before & set(drawing["previews"])
        before, seen = set(drawing["previews"]), drawing["image_steps"]
        assert page.get(f"/drawing/{number}/{seen}")["previews"] == []
    gate.release()
    assert page.finished(number)["state"] == "done"


def test_one_at_a_time(serve, gate, tmp_path):
    """Others wait in their order; a full queue refuses; what is cancelled leaves it; all that is left is made."""
    page, ids = serve(), painted()
    first = page.draw(ids, guidance=1)["number"]
    until(lambda: page.get(f"/drawing/{first}")["state"] == "working")
    waiting = [page.draw(ids, guidance=1)["number"] for _ in range(painter.MOST_WAITING)]
    places = [page.get(f"/drawing/{number}")["place"] for number in waiting]
    assert places == list(range(1, painter.MOST_WAITING + 1))
    status, _, text = page.ask("POST", "/draw", json.dumps({"mask": encode(ids)}))
    assert status == 503 and b"are waiting" in text
    assert json.loads(page.ask("POST", f"/cancel/{waiting[0]}", "")[2])["state"] == "cancelled"
    assert page.get(f"/drawing/{waiting[1]}")["place"] == 1
    page.draw(ids, guidance=1)
    gate.release(10_000)
    assert page.finished(first)["state"] == "done"
    assert all(page.finished(number)["state"] == "done" for number in waiting[1:])
    assert not list((tmp_path / "out").glob(f"painting_{waiting[0]:04d}_*"))


def test_cancel_while_it_works(serve, gate):
    """A drawing that is cancelled ends at its next step without images, and the next one is made."""
    page = serve()
    first, second = (page.draw(painted(), guidance=1)["number"] for _ in range(2))
    gate.release()
    until(lambda: page.get(f"/drawing/{first}")["progress"] > 0)
    page.ask("POST", f"/cancel/{first}", "")
    gate.release(10_000)
    assert page.finished(first) | {"state": "cancelled", "files": []} == page.finished(first)
    assert page.finished(second)["state"] == "done"


def test_a_failure_is_told_and_the_next_is_made(serve, gate, capsys):
    """An error of the network is the message of its drawing, with a traceback on the terminal; the worker goes on."""
    page = serve()
    gate.failing = True
    first, second = (page.draw(painted())["number"] for _ in range(2))
    gate.release(10_000)
    assert page.finished(first)["state"] == "failed" and page.finished(first)["message"] == "the network broke"
    assert "Traceback" in capsys.readouterr().err
    assert page.finished(second)["state"] == "done"
    assert [drawing["state"] for drawing in page.get("/drawings")] == ["failed", "done"]


# ---------------------------------------------------------------------------------------------- editing a photograph


def photograph(shape):
    """Noise, (*shape, 3), and its mask: sky above road, a car, and a corner of nothing."""
    ids = np.zeros(shape, np.uint8)
    ids[: shape[0] // 2], ids[shape[0] // 2 :, : shape[1] // 4], ids[:3, :4] = 1, 2, 255
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8), ids


def mask_bytes(ids):
    image = Image.fromarray(ids)
    image.putpalette(Colorbook(CLASSES).palette.tobytes())
    return png_bytes(image)


def on_canvas(ids):
    """A mask as the canvas shows it when it is opened: the centre in the ratio of the canvas."""
    scale = min(ids.shape[0] / H, ids.shape[1] / W)
    rows, columns = (((np.arange(n) + .5 - n / 2) * scale + m / 2).astype(int) for n, m in zip((H, W), ids.shape))
    return ids[rows[:, None], columns]


def edit_of(image, before, painted, **settings):
    """A request to keep a photograph but for what was painted over its mask."""
    files = {"photo": png_bytes(Image.fromarray(image)), "photo_mask": mask_bytes(before)}
    return {"mask": encode(painted)} | {key: base64.b64encode(data).decode() for key, data in files.items()} | settings


@pytest.mark.parametrize("shape, box, settings", [
    ((16, 24), (5, 11, 14, 20), {"n": 2, "seed": 7}),                  # the network's own size
    ((336, 504), (200, 230, 90, 140), {"n": 2, "guidance": 1}),        # the canvas's
    ((120, 300), (40, 70, 100, 150), {"n": 1, "sampler": "ddim"}),     # another ratio: its centre is on the canvas
    ((400, 600), (300, 320, 400, 440), {"n": 1, "seed": 2**40}),       # larger than the canvas
])
def test_only_what_was_painted_is_redrawn(serve, tmp_path, monkeypatch, shape, box, settings):
    """The images are those of sample.py for the same files, bit for bit, and far from the change the photo's pixels."""
    page, (image, before) = serve(), photograph(shape)
    expected = before.copy()
    expected[box[0] : box[1], box[2] : box[3]] = 3
    painted = on_canvas(expected)
    status, _, text = page.ask("POST", "/draw", json.dumps(edit_of(image, before, painted, **settings)))
    assert status == 200, text
    drawing = page.finished(json.loads(text)["number"])
    assert drawing["state"] == "done" and drawing["keeps"] and drawing["shape"] == list(shape), drawing
    after = np.array(Image.open(tmp_path / "out" / "painting_0001.png"))
    differs = after != expected
    inner = np.zeros(shape, bool)
    inner[box[0] + 2 : box[1] - 2, box[2] + 2 : box[3] - 2] = True
    assert not differs[inner].any() and differs.mean() < .01  # the canvas may be coarser than the photograph
    assert page.ask("GET", f"/files/{drawing['painting']}")[0] == 200
    assert page.ask("GET", "/files/painting_0001_photo.png")[0] == 404

    for name, pixels in {"own.png": image, "own_before.png": before}.items():
        Image.fromarray(pixels).save(tmp_path / name)
    Image.fromarray(after).save(tmp_path / "painting_0001.png")
    own = {"--image": tmp_path / "own.png", "--image-mask": tmp_path / "own_before.png",
           "--mask": tmp_path / "painting_0001.png"}
    words = shlex.split(drawing["command"])
    again = words[words.index("--n") :]
    for folder, arguments in (("again", words[2:]), ("own", [*map(str, sum(own.items(), ())), *again])):
        monkeypatch.setattr(sys, "argv", ["sample.py", *arguments, "--out", str(tmp_path / folder)])
        sample.main()
    near = np.zeros(shape, bool)
    reach = 3 * max(1, (box[1] - box[0]) // 8, (box[3] - box[2]) // 12)  # of the margin, in pixels of the window
    near[max(0, box[0] - reach) : box[1] + reach, max(0, box[2] - reach) : box[3] + reach] = True
    assert len(drawing["files"]) == settings["n"] and not near.all()
    for name in drawing["files"]:
        made = (tmp_path / "out" / name).read_bytes()
        assert made == (tmp_path / "again" / name).read_bytes() == page.ask("GET", f"/files/{name}")[2]
        result = np.array(Image.open(io.BytesIO(made)))
        assert (result == np.array(Image.open(tmp_path / "own" / name))).all()
        assert (result[~near] == image[~near]).all() and (result[inner] != image[inner]).mean() > .9


def test_a_photograph_of_any_kind(serve, tmp_path):
    """A JPEG that is turned by its EXIF, and a mask in colours with soft edges, are read as sample.py reads them."""
    page, (image, before) = serve(), photograph((40, 60))
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turn right
    Image.fromarray(np.rot90(image)).save(turned, "jpeg", exif=exif, quality=95)
    colors = np.zeros((256, 3), np.uint8)
    colors[:4] = list(CLASSES.values())
    soft = Image.fromarray(colors[before]).resize((600, 400), Image.Resampling.NEAREST).resize((60, 40))
    painted = on_canvas(before)
    painted[200:260, 300:380] = 3
    request = edit_of(image, before, painted) | {"photo": base64.b64encode(turned.getvalue()).decode(),
                                                 "photo_mask": base64.b64encode(png_bytes(soft)).decode()}
    number = json.loads(page.ask("POST", "/draw", json.dumps(request))[2])["number"]
    assert page.finished(number)["state"] == "done"
    saved = [np.array(Image.open(tmp_path / "out" / f"painting_0001{end}.png")) for end in ("_photo", "_before")]
    assert saved[0].shape == (40, 60, 3) and np.abs(saved[0].astype(int) - image).mean() < 60
    assert (saved[1] == before).mean() > .97


def edit_request(case):
    """A request to edit with one mistake."""
    image, before = photograph((40, 60))
    painted = on_canvas(before)
    painted[200:260, 300:380] = 3
    if case == "no change":
        return edit_of(image, before, on_canvas(before))
    if case == "all changed":
        return edit_of(image, before, np.full((H, W), 3, np.uint8))
    if case == "other size":
        return edit_of(image[:32], before, painted)
    if case == "only a photo":
        return {key: value for key, value in edit_of(image, before, painted).items() if key != "photo_mask"}
    if case == "not base64":
        return edit_of(image, before, painted) | {"photo": "!!!"}
    whole = png_bytes(Image.fromarray(image))
    data = {"no image": b"hello", "cut off": whole[:300], "too large": whole}[case]
    return edit_of(image, before, painted) | {"photo": base64.b64encode(data).decode()}


@pytest.mark.parametrize("case, words", [
    ("no change", "nothing of the photo's mask has changed"), ("all changed", "all of the photo's mask has changed"),
    ("other size", "the photo's mask is 40x60 and the photo 32x60"), ("too large", "40x60 pixels, at most 2,000"),
    ("only a photo", "expected the photo's mask as base64"), ("not base64", "base64"),
    ("no image", "the photo (5 bytes)"), ("cut off", "the photo (300 bytes): not readable")])
def test_mistakes_of_an_edit(refusing, monkeypatch, case, words):
    """A photograph that cannot be edited is a message about it, and leaves no file and no drawing."""
    monkeypatch.setattr(painter, "MOST_PIXELS", 2000 if case == "too large" else 2400)
    files = sorted(path.name for path in refusing.studio.out.iterdir())
    status, _, text = refusing.ask("POST", "/draw", json.dumps(edit_request(case)))
    assert status == 400 and words in text.decode() and "/" not in text.decode().split("masks.py")[0], text
    assert refusing.get("/drawings") == [] and sorted(path.name for path in refusing.studio.out.iterdir()) == files


# --------------------------------------------------------------------------------------------- masks and examples


def png_bytes(image, kind="png"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_a_mask_file_fits_the_canvas(serve, tmp_path):
    """A mask of any size becomes ids of the canvas, its centre cropped to the ratio; no file of it is left."""
    page = serve()
    colors = np.array(list(CLASSES.values()), np.uint8)
    tall = colors[np.repeat(np.arange(3), 16)[:, None].repeat(24, axis=1)]  # 48x24: road, sky, car
    status, _, text = page.ask("POST", "/read", png_bytes(Image.fromarray(tall)))
    answer = json.loads(text)
    assert status == 200 and "colours" in answer["note"]
    assert set(base64.b64decode(answer["mask"])) == {1} and len(base64.b64decode(answer["mask"])) == H * W
    assert list((tmp_path / "out").iterdir()) == []


def test_files_that_are_no_masks(serve, tmp_path, capsys):
    """A photograph, a broken file and no image at all are refused in the words of masks.py, without a server's path."""
    page = serve()
    rng = np.random.default_rng(0)
    photo = png_bytes(Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)))
    for body, words in ((photo, "in no class"), (photo[:200], "not readable"), (b"hello", "(5 bytes)"), (b"", "(0 b")):
        status, _, text = page.ask("POST", "/read", body)
        assert status == 400 and words in text.decode() and text.startswith(b"the file")
        assert str(tmp_path).encode() not in text.split(b"masks.py --colorbook")[0]
    huge = png_bytes(Image.new("1", (10_000, 10_000)))
    assert page.ask("POST", "/read", huge)[0] == 400
    assert page.alive() and list((tmp_path / "out").iterdir()) == []


def test_examples_of_streets(serve, tmp_path):
    """A network of the 19 classes is offered the hand-drawn mask, and scenes that fit their image and their number."""
    page = serve(make_checkpoint(tmp_path / "streets.pt", CITYSCAPES, (16, 16)))
    assert page.get("/model")["examples"] and page.get("/model")["scenes"]
    ids = np.frombuffer(base64.b64decode(page.get("/example/hand_drawn")["mask"]), np.uint8).reshape(512, 512)
    drawn = np.array(Image.open("data/hand_drawn.png").convert("RGB"))
    colors = np.array(list(CITYSCAPES.values()))
    exact = (drawn[:, :, None] == colors).all(axis=3)  # (H, W, 19)
    assert exact.any(axis=2).mean() > .8
    assert (exact.argmax(axis=2) == ids)[exact.any(axis=2)].mean() > .999
    first, again, other = (page.get(f"/example/{number}") for number in (5, 5, 6))
    assert first == again and first["mask"] != other["mask"]
    image = np.array(Image.open(io.BytesIO(base64.b64decode(first["image"].partition(",")[2]))))
    ids = np.frombuffer(base64.b64decode(first["mask"]), np.uint8).reshape(512, 512)
    assert image.shape == (512, 512, 3) and len(np.unique(ids)) > 3
    for name in ("7777777777", "../hand_drawn", "-1", ""):
        assert page.ask("GET", f"/example/{name}")[0] == 404


def test_no_examples_for_other_classes(serve):
    """A network of other classes is offered none."""
    page = serve()
    assert not page.get("/model")["examples"] and page.ask("GET", "/example/hand_drawn")[0] == 404


# -------------------------------------------------------------------------------------------------------- safety


def test_only_this_computer_is_listened_to(serve):
    """The socket is bound to 127.0.0.1."""
    assert serve().server.socket.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize("path", ["/", "/model", "/draw", "/files/painting_0001.png"])
@pytest.mark.parametrize("headers", [
    {"Host": "evil.example"}, {"Host": "evil.example:{port}"}, {"Host": "127.0.0.1"}, {"Host": "127.0.0.1:1"},
    {"Host": "127.0.0.1:{port}.evil.example"}, {"Host": ""}, {"Host": "0.0.0.0:{port}"},
    {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "https://127.0.0.1:{port}"},
    {"Origin": "http://127.0.0.1:1"}, {"Origin": "http://localhost:{port}"}, {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
], ids=lambda headers: " ".join(map(": ".join, headers.items())))
def test_other_pages_and_names_are_refused(refusing, path, headers):
    """A request under another Host, or from another Origin or site, is refused on every path, and draws nothing."""
    headers = {name: value.format(port=refusing.port) for name, value in headers.items()}
    method, body = ("POST", json.dumps({"mask": encode(painted())})) if path == "/draw" else ("GET", None)
    status, _, text = refusing.ask(method, path, body, headers)
    assert status == 403 and text
    assert refusing.get("/drawings") == []


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    """One painter for all tests of what is refused."""
    folder = tmp_path_factory.mktemp("refusing")
    (folder / "out").mkdir()
    (folder / "out" / "secret.png").write_bytes(b"secret")
    studio = painter.Studio(arguments(make_checkpoint(folder / "net.pt"), folder / "out"))
    server = painter.start_server(studio, 0)
    threading.Thread(target=server.serve_forever, args=[.05]).start()
    yield Client(server)
    server.shutdown()
    server.server_close()
    studio.close()


def test_a_request_without_or_with_two_hosts(refusing):
    """Host is asked for, and one of it."""
    for hosts in ([], ["127.0.0.1:{port}", "evil.example"]):
        connection = http.client.HTTPConnection("127.0.0.1", refusing.port, timeout=30)
        connection.putrequest("GET", "/model", skip_host=True)
        for host in hosts:
            connection.putheader("Host", host.format(port=refusing.port))
        connection.endheaders()
        assert connection.getresponse().status == 403
        connection.close()


def test_our_own_page_is_answered(refusing):
    """Under both names of this computer, from its own origin, and without one, as a typed address is."""
    for host in (f"127.0.0.1:{refusing.port}", f"localhost:{refusing.port}"):
        for more in ({}, {"Origin": f"http://{host}"}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}):
            assert refusing.ask("GET", "/model", headers={"Host": host} | more)[0] == 200


GOOD = {"mask": encode(painted())}


@pytest.mark.parametrize("change, words", [
    ({"n": 0}, "sample.n"), ({"n": 17}, "at most 16"), ({"n": 1.5}, "sample.n"), ({"n": "3"}, "sample.n"),
    ({"n": True}, "sample.n"), ({"n": None}, "sample.n"), ({"n": 10**30}, "sample.n"), ({"seed": -1}, "sample.seed"),
    ({"seed": 2**63}, "sample.seed"), ({"steps": 0}, "sample.steps"), ({"steps": 21}, "expected 1..20"),
    ({"guidance": float("nan")}, "sample.guidance"), ({"guidance": -1}, "sample.guidance"),
    ({"guidance": float("inf")}, "sample.guidance"), ({"guidance": "1,2,3"}, "sample.guidance"),
    ({"guidance": [1]}, "sample.guidance"), ({"sampler": "euler"}, "dpm_solver, plms"), ({"out": "/tmp"}, "has no out"),
    ({"checkpoint": "x.pt"}, "has no checkpoint"), ({"mask": ""}, "0 pixels"), ({"mask": None}, "base64"),
    ({"mask": "!!!"}, "base64"), ({"mask": GOOD["mask"][:-8]}, "pixels; expected 336x504"),
    ({"mask": encode(np.full((H, W), 4, np.uint8))}, "unknown class ids 4"),
], ids=lambda value: str(value)[:40])
def test_settings_out_of_bounds(refusing, change, words):
    """A setting or a mask that is wrong is refused with what was expected, and nothing is drawn."""
    status, _, text = refusing.ask("POST", "/draw", json.dumps(GOOD | change))
    assert status == 400 and words in text.decode(), text
    assert refusing.get("/drawings") == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"mask": {}}'], ids=repr)
def test_requests_that_are_no_requests(refusing, body):
    """A body of any kind is answered with 400, and the server goes on."""
    assert refusing.ask("POST", "/draw", body)[0] == 400
    assert refusing.alive()


@pytest.mark.parametrize("length, status", [
    (None, 411), ("-1", 411), ("many", 411), (str(painter.MOST_BYTES + 1), 413), ("9" * 40, 413)])
def test_bodies_out_of_bounds(refusing, length, status):
    """The length of a body has to be given and is bounded; nothing is read of one that is too long."""
    connection = http.client.HTTPConnection("127.0.0.1", refusing.port, timeout=30)
    connection.putrequest("POST", "/read")
    if length:
        connection.putheader("Content-Length", length)
    connection.endheaders()
    assert connection.getresponse().status == status
    connection.close()


def test_a_client_that_leaves(refusing, capsys):
    """A body that is cut off, and a client that does not wait for its answer, leave the server as it was."""
    connection = http.client.HTTPConnection("127.0.0.1", refusing.port, timeout=30)
    connection.putrequest("POST", "/read")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"half")
    connection.close()
    assert refusing.alive()


@pytest.mark.parametrize("path", [
    "/files/secret.png", "/files/../net.pt", "/files/%2e%2e/net.pt", "/files//etc/passwd", "/files/", "/files/.",
    "/net.pt", "/../net.pt", "/config.yaml", "/painter/__main__.py", "/drawing/99", "/drawing/x", "/drawing/", "/draw"])
def test_no_other_file_is_read(refusing, path):
    """What this server did not make is not there, in its folder or outside."""
    assert refusing.ask("GET", path)[0] == 404


def test_an_error_inside_is_answered(refusing, monkeypatch, capsys):
    """An error that nobody foresaw is status 500 with a traceback on the terminal, and the server goes on."""
    with monkeypatch.context() as patch:
        patch.setattr(refusing.studio, "describe_model", lambda: 1 / 0)
        status, _, text = refusing.ask("GET", "/model")
    assert status == 500 and b"ZeroDivisionError" in text and "Traceback" in capsys.readouterr().err
    assert refusing.alive()


def test_the_page_loads_nothing_from_elsewhere(refusing):
    """The page is one file without an address in it, and its headers forbid every other source."""
    status, headers, text = refusing.ask("GET", "/")
    assert status == 200 and headers["Content-Type"].startswith("text/html")
    page = text.decode().replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert not re.search(r"https?:|src=[\"']?[/h]|@import|url\(|<link (?!rel=\"icon\" href=\"data:)", page)
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'" and policy["img-src"] == "'self' data: blob:"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin" and headers["X-Content-Type-Options"] == "nosniff"


# ---------------------------------------------------------------------------------------------------- the program


def test_a_fresh_clone(tmp_path, monkeypatch):
    """Without a run and a checkpoint that is named, it paints with the weights that come with the project."""
    monkeypatch.chdir(tmp_path)
    studio = painter.Studio(arguments(None, "out"))
    studio.close()
    model = studio.describe_model()
    assert Path(model["checkpoint"]) == sample.TOY_WEIGHTS and model["examples"] and len(model["classes"]) == 19


def test_a_network_without_masks(tmp_path):
    """A network that was trained without masks is refused at the start."""
    checkpoint = make_checkpoint(tmp_path / "net.pt", conditional=False)
    with pytest.raises(ValueError, match="trained without masks"):
        painter.Studio(arguments(checkpoint, tmp_path / "out"))


def test_a_port_that_is_taken(refusing, monkeypatch):
    """It is a message with the remedy."""
    with pytest.raises(OSError, match=f"port {refusing.port}.*--port 0"):
        painter.start_server(refusing.studio, refusing.port)


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C of another process")
def test_the_program(tmp_path):
    """`python -m painter` prints its address, serves the page there, and ends at Ctrl-C."""
    checkpoint = make_checkpoint(tmp_path / "net.pt")
    words = [sys.executable, "-m", "painter", "--port", "0", "--out", tmp_path / "out", "--checkpoint", checkpoint]
    with subprocess.Popen(words, cwd=Path(painter.__file__).parents[1], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            found = re.search(r"Paint at http://127\.0\.0\.1:(\d+)", line)
            if found:
                break
        page = Client(SimpleNamespace(studio=None, server_port=int(found[1])))
        assert page.alive() and b"<!doctype html>" in page.ask("GET", "/")[2]
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
