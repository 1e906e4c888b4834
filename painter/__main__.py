"""Paint a mask in the browser and get images of it, on this computer alone.

    python -m painter                                        prints the address of the page; --open opens it as well
    python -m painter --checkpoint runs/idd_lite/checkpoint.pt
    python -m painter --out mine --port 8000

The network, its settings and the images are those of sample.py, which also says what --config, --preset and --set do.
Every drawing leaves a mask, painting_0001.png, and its images in the folder --out; an edited photograph leaves
painting_0001_photo.png and its mask before, painting_0001_before.png, as well. The page shows the command that makes
the same images again. The server listens on 127.0.0.1 only and answers only its own page.
"""

import argparse
import base64
import io
import json
import re
import shlex
import tempfile
import threading
import time
import traceback
import webbrowser
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from config import PROJECT, SETTINGS, add_config_arguments, checked, command
from data.toy.prepare import scene
from dataset import fit, prepare_edit, read_image, to_uint8
from masks import UNLABELLED, Colorbook, check_ids, read_mask, save_mask
from sample import file_of, load_network, make_parser, plan, read_edit, read_masks, resolve, sample_jobs, save

PAGE = Path(__file__).with_name("page.html")
HAND_DRAWN = PROJECT.parent / "data" / "hand_drawn.png"
CANVAS = 512  # pixels of the longer side of the canvas, about: a whole multiple of the network's
MOST_IMAGES, MOST_WAITING, MOST_LISTED = 16, 8, 100  # images of a drawing, drawings in the queue, drawings remembered
MOST_BYTES = 32 * 2**20  # of a request
MOST_PIXELS = 2**24  # of a photograph that is edited: each of its images has as many
LARGEST_SCENE = 1024  # pixels of the longer side of a toy scene, which is drawn four times larger
ENDINGS = {"": "", "image": "_photo", "image_mask": "_before"}  # of the files of a painting, painting_0001*.png
DRAWING_SETTINGS = ("n", "guidance", "steps", "sampler", "seed")
HEADERS = {  # the page loads nothing from elsewhere, and no other page may show or read it
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
                               "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
                               "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin", "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}


class Cancelled(Exception):
    """The drawing was cancelled while it was made."""


class Refused(Exception):
    """A request that is not answered: an HTTP status, and why."""


# --------------------------------------------------------------------------------------------------- drawing


class Drawing:
    """The images that one press of the button asks for, and how far they are."""

    def __init__(self, number, s, shape, edit):
        """number is that of the painting, s the settings; s["mask"] is its file, shape (H, W) that of its images.

        edit is {} or, for a photograph that is edited, {"image": its file, "image_mask": that of its mask before}.
        """
        self.number, self.s, self.painting = number, s, Path(s["mask"]).name
        self.shape, self.edit = shape, edit
        self.state = "waiting"  # then working, then done, failed or cancelled
        self.message, self.files = "", []
        self.preview, self.image_steps, self.started, self.seconds = None, 0, 0.0, 0.0
        self.cancelled = threading.Event()

    def observe(self, t, x, eps, x0):
        """Called by the sampler at every step; x0 (B, 3, H, W) is the image that the network predicts there."""
        if self.cancelled.is_set():
            raise Cancelled
        self.preview = to_uint8(x0)
        self.image_steps += len(x0)

    def describe(self, place, seen):
        """The state as a dict; `seen` is the image_steps of which the page has the previews already."""
        s, done, preview = self.s, self.image_steps, self.preview
        total = s["n"] * s["steps"]
        seconds = time.monotonic() - self.started if self.state == "working" else self.seconds
        new_previews = self.state == "working" and preview is not None and done != seen
        return {"number": self.number, "state": self.state, "message": self.message, "place": place,
                "image_steps": done, "progress": min(1.0, done / total), "seconds": seconds,
                "seconds_left": seconds / done * max(0, total - done) if done else None,
                "painting": self.painting, "files": list(self.files), "shape": self.shape, "keeps": bool(self.edit),
                "previews": [png_url(image) for image in preview] if new_previews else [],
                **{key: s[key] for key in DRAWING_SETTINGS}}


class Studio:
    """The network, and the thread that draws with it: one drawing at a time, in the order they were asked for."""

    def __init__(self, args):
        """args are those of main(). ValueError or OSError as in sample.py."""
        self.args = args
        self.state, s = resolve(sample_arguments(args))
        self.colorbook, self.model, self.diffusion, self.autocast = load_network(self.state, s)
        self.settings, self.size, self.out = s, s["size"], Path(s["out"])
        self.out.mkdir(parents=True, exist_ok=True)
        scale = max(1, round(CANVAS / max(self.size)))
        self.canvas = (self.size[0] * scale, self.size[1] * scale)
        project = Colorbook.load(PROJECT.with_name("colorbook.json"))
        self.knows_streets = self.colorbook.classes == project.classes  # those of the examples
        self.drawings, self.waiting, self.changed = {}, [], threading.Condition()
        self.reading = threading.Lock()  # one file at a time: a large one takes much memory
        self.closed = False
        self.worker = threading.Thread(target=self.work, daemon=True)
        self.worker.start()

    def close(self):
        """End the worker at its next step."""
        with self.changed:
            self.closed = True
            for drawing in self.drawings.values():
                drawing.cancelled.set()
            self.changed.notify()
        self.worker.join()

    # ------------------------------------------------------------------------------------ what the page asks for

    def describe_model(self):
        """What the page has to know: classes, sizes, the settings to begin with, limits."""
        s = self.settings
        shown = {key: min(s[key], MOST_IMAGES) if key == "n" else s[key] for key in DRAWING_SETTINGS}
        return {"classes": [{"name": name, "rgb": rgb} for name, rgb in self.colorbook.classes.items()],
                "unlabelled": UNLABELLED, "size": self.size, "canvas": self.canvas, "settings": shown,
                "samplers": SETTINGS["sample.sampler"][1].removeprefix("one of ").split(", "),
                "T": self.diffusion.T, "most_images": MOST_IMAGES, "most_bytes": MOST_BYTES,
                "checkpoint": str(self.state["path"]), "trained_steps": self.state["step"],
                "device": s["device"].type, "out": str(self.out),
                "examples": self.knows_streets, "scenes": self.knows_streets and max(self.canvas) <= LARGEST_SCENE}

    def ask(self, request):
        """Put a drawing into the queue, and describe it.

        request: "mask", the ids of the canvas as base64, and any of n, guidance, steps, sampler and seed; to redraw
        only what was painted over the mask of a photograph, both files, "photo" and "photo_mask", as base64.
        ValueError for anything else.
        """
        unknown = request.keys() - {"mask", "photo", "photo_mask", *DRAWING_SETTINGS}
        if unknown:
            raise ValueError(f"a drawing has no {', '.join(sorted(unknown))}")
        given = {key: checked(f"sample.{key}", request[key], "the page") for key in DRAWING_SETTINGS if key in request}
        if given.get("n", 1) > MOST_IMAGES:
            raise ValueError(f"{given['n']} images: expected at most {MOST_IMAGES} in one drawing")
        if "guidance" in given:
            given["guidance"] = repr(given["guidance"])
        ids, shape, pngs = self.ids_of(request.get("mask")), self.size, {}
        if "photo" in request or "photo_mask" in request:
            ids, pngs = self.read_photo(request.get("photo"), request.get("photo_mask"), ids)
            shape = ids.shape
        pngs |= {"": self.mask_png(ids)}
        _, s = resolve(sample_arguments(self.args, **given), self.state)
        s |= {"precision": self.settings["precision"], "n": min(s["n"], MOST_IMAGES), "guidance": s["guidances"][0]}
        with self.changed:
            if len(self.waiting) >= MOST_WAITING:
                raise Refused(503, f"{MOST_WAITING} drawings are waiting: cancel one, or wait for one")
            number, paths = self.save_painting(pngs)
            s["mask"] = paths.pop("")
            drawing = self.drawings[number] = Drawing(number, s, shape, paths)
            for finished in list(self.drawings)[:-MOST_LISTED]:
                del self.drawings[finished]
            self.waiting.append(drawing)
            self.changed.notify()
        return self.describe(drawing)

    def describe(self, drawing, seen=None):
        with self.changed:
            place = self.waiting.index(drawing) + 1 if drawing in self.waiting else 0
            return drawing.describe(place, seen) | {"command": sample_command(self.args, drawing)}

    def find(self, number):
        drawing = self.drawings.get(int(number)) if number.isdecimal() and len(number) < 10 else None
        if drawing is None:
            raise Refused(404, f"there is no drawing {number:.20}")
        return drawing

    def cancel(self, number):
        drawing = self.find(number)
        with self.changed:
            drawing.cancelled.set()
            if drawing in self.waiting:
                self.waiting.remove(drawing)
                drawing.state = "cancelled"
        return self.describe(drawing)

    def ids_of(self, text):
        """base64 of class ids, row by row, as an array like the canvas. ValueError: another size, unknown ids."""
        ids = np.frombuffer(decode(text, "the mask, its class ids,"), np.uint8)
        if ids.size != self.canvas[0] * self.canvas[1]:
            raise ValueError(f"the mask has {ids.size} pixels; expected {self.canvas[0]}x{self.canvas[1]}")
        return check_ids(ids.reshape(self.canvas), self.colorbook, "the mask")

    def read(self, path, name):
        """A mask file for the canvas, a line on how it was read, and its own size. ValueError as in masks.py."""
        ids, kind, snapped = read_mask(path, self.colorbook)
        note = f"{name}: a mask in {kind}" + (f", {snapped:.1%} snapped to the nearest class" if snapped else "")
        return {"mask": encode(fit(ids, self.canvas)), "note": note, "shape": ids.shape}

    @contextmanager
    def uploaded(self, body, name):
        """The path of a file of these bytes, for as long as it is read; a ValueError speaks of it as `name`."""
        with self.reading, tempfile.TemporaryDirectory(prefix=".upload-", dir=self.out) as folder:
            path = Path(folder, "file")
            path.write_bytes(body)
            try:
                yield path
            except ValueError as error:
                raise ValueError(str(error).replace(str(path), name)) from None

    def read_upload(self, body):
        with self.uploaded(body, "the file") as path:
            return self.read(path, "the file")

    def read_photo(self, photo, photo_mask, painted):
        """A photograph to be edited: its new mask (H, W), and the PNGs of the photograph and of its mask before.

        Both files come as base64; painted (h, w), on the canvas, began with fit() of that mask. ValueError: they are
        no image and mask of one size, too large, or nothing or all would be redrawn.
        """
        with self.uploaded(decode(photo, "the photo"), "the photo") as path:
            image = read_image(path)
        with self.uploaded(decode(photo_mask, "the photo's mask"), "the photo's mask") as path:
            before = read_mask(path, self.colorbook)[0]
        H, W = before.shape
        if image.shape[:2] != before.shape:
            raise ValueError(f"the photo's mask is {H}x{W} and the photo {image.shape[0]}x{image.shape[1]} (height x "
                             "width): an image and its mask must have one size")
        if H * W > MOST_PIXELS:
            raise ValueError(f"the photo has {H}x{W} pixels, at most {MOST_PIXELS:,} are edited: scale it and its mask")
        after = paint_over(before, painted)
        changed = after != before
        if not changed.any():
            raise ValueError("nothing of the photo's mask has changed: paint over it what is to be new")
        if not prepare_edit(image, after, changed, self.size)["keep"].any():
            raise ValueError("all of the photo's mask has changed: leave some of it, or do not keep the rest")
        return after, {"image": png_bytes(image), "image_mask": self.mask_png(before)}

    def mask_png(self, ids):
        png = io.BytesIO()
        png.name = "mask.png"  # from which Pillow takes the format
        save_mask(ids, png, self.colorbook)
        return png.getvalue()

    def example(self, name):
        """The hand-drawn mask, or by its number a toy scene with its image."""
        if not self.knows_streets or not (name == "hand_drawn" or name.isdecimal() and len(name) < 10):
            raise Refused(404, f"there is no example {name:.20}")
        if name == "hand_drawn":
            return self.read(HAND_DRAWN, HAND_DRAWN.name)
        if max(self.canvas) > LARGEST_SCENE:
            raise Refused(404, f"scenes are drawn for at most {LARGEST_SCENE} pixels a side")
        with self.reading:
            image, ids = scene([int(name), 3], self.canvas)  # the splits of the data set are 0, 1 and 2
        return {"mask": encode(ids), "image": png_url(image), "note": f"toy scene {name}, its image beneath"}

    # ----------------------------------------------------------------------------------------------- the worker

    def work(self):
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.closed)
                if self.closed:
                    return
                drawing = self.waiting.pop(0)
                drawing.state, drawing.started = "working", time.monotonic()
            try:
                self.draw(drawing)
                state = "done"
            except Cancelled:
                state = "cancelled"
            except Exception as error:  # whatever it is, the next drawing is made
                traceback.print_exc()
                state, drawing.message = "failed", str(error) or type(error).__name__
            drawing.seconds = time.monotonic() - drawing.started
            drawing.state, drawing.preview = state, None

    def draw(self, drawing):
        """Make the images of the saved mask as sample.py does, and save each with its settings."""
        s, edits = drawing.s, {}
        if drawing.edit:
            files = argparse.Namespace(**drawing.edit, redraw=None)
            edits = {Path(s["mask"]).stem: read_edit(files, s["mask"], self.colorbook, self.size)}
            masks = {stem: edit["ids"] for stem, edit in edits.items()}
        else:
            masks = read_masks(s["mask"], self.colorbook, self.size)
        jobs = plan(self.state, s, masks, edits=edits)
        for batch, images in sample_jobs(jobs, masks, self.model, self.diffusion, s, self.autocast, edits, show=False,
                                         observe=drawing.observe):
            drawing.preview = None  # it was of these
            for job, image in zip(batch, images):
                save(job, image, self.out)
                drawing.files.append(file_of(job, self.out).name)

    def save_painting(self, pngs):
        """Write {"": the mask} as painting_0001.png, or with the number after the last one of the folder.

        With "image" and "image_mask" *_photo.png and *_before.png too. Returns the number, and the paths by those keys.
        """
        found = [re.match(r"painting_(\d+)", path.name) for path in self.out.glob("painting_*")]
        number = max([0, *self.drawings, *(int(match[1]) for match in found if match)]) + 1
        paths = {}
        for key, png in pngs.items():
            paths[key] = str(self.out / f"painting_{number:04d}{ENDINGS[key]}.png")
            with open(paths[key], "xb") as file:
                file.write(png)
        return number, paths


def sample_arguments(args, **given):
    """The arguments of sample.py that belong to those of this program, and to a request."""
    return argparse.Namespace(**vars(make_parser().parse_args([])) | vars(args) | {"mask": "painting"} | given)


def sample_command(args, drawing):
    """The command that makes the same images again."""
    words, s = ["python", "sample.py"], drawing.s
    for key, path in drawing.edit.items():
        words += [f"--{key.replace('_', '-')}", path]
    words += ["--mask", s["mask"], "--n", s["n"], "--seed", s["seed"], "--guidance",
              s["guidances"][0], "--sampler", s["sampler"], "--steps", s["steps"]]
    for flag in ("checkpoint", "device", "config", "preset"):
        if getattr(args, flag):
            words += [f"--{flag}", getattr(args, flag)]
    for text in args.set:
        words += ["--set", text]
    return shlex.join(map(str, words))


def paint_over(before, painted):
    """A mask `before` (H, W) with what was painted (h, w) over its fit(); each pixel takes the nearest one of those."""
    (H, W), (h, w) = before.shape, painted.shape
    scale = min(H / h, W / w)  # the centre of the mask is what fit() shows
    rows, columns = (np.floor((np.arange(n) + 0.5 - n / 2) / scale + m / 2).astype(int) for n, m in ((H, h), (W, w)))
    y, x = np.flatnonzero((rows >= 0) & (rows < h)), np.flatnonzero((columns >= 0) & (columns < w))
    shown, nearest = np.ix_(y, x), np.ix_(rows[y], columns[x])
    new = painted != fit(before, painted.shape)
    after = before.copy()
    after[shown] = np.where(new[nearest], painted[nearest], before[shown])
    return after


def encode(ids):
    return base64.b64encode(ids.tobytes()).decode()


def decode(text, name):
    """The bytes of a base64 text. ValueError for anything else, in which it is `name`."""
    if not isinstance(text, str):
        raise ValueError(f"expected {name} as base64")
    return base64.b64decode(text, validate=True)


def png_bytes(image):
    png = io.BytesIO()
    Image.fromarray(image).save(png, "png", compress_level=1)  # quickly, for a photograph of many megapixels
    return png.getvalue()


def png_url(image):
    """An image (H, W, 3) uint8 as a data URL."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()


# ---------------------------------------------------------------------------------------------------- server


class Handler(BaseHTTPRequestHandler):
    """Answers the page; self.server has the studio and its own addresses."""

    timeout = 30  # seconds that a silent client keeps a thread

    def do_GET(self):
        self.answer({"": self.get_page, "model": self.get_model, "drawings": self.get_drawings,
                     "drawing": self.get_drawing, "example": self.get_example, "files": self.get_file})

    def do_POST(self):
        self.answer({"draw": self.post_draw, "cancel": self.post_cancel, "read": self.post_read,
                     "mask.png": self.post_mask})

    def answer(self, routes):
        """Call the route that the path names; whatever goes wrong is a status and one line, and the server goes on."""
        try:
            self.check_sender()
            route, _, rest = urlsplit(self.path).path.removeprefix("/").partition("/")
            if route not in routes:
                raise Refused(404, f"there is no {self.path:.40}")
            status, (kind, body) = 200, routes[route](rest)
        except Refused as refused:
            status, kind, body = refused.args[0], "text/plain; charset=utf-8", refused.args[1].encode()
        except (ValueError, OSError, RecursionError) as error:
            status, kind, body = 400, "text/plain; charset=utf-8", str(error).encode()
        except Exception as error:
            traceback.print_exc()
            status, kind, body = 500, "text/plain; charset=utf-8", f"{type(error).__name__}: {error}".encode()
        try:
            self.send_response(status)
            for name, value in (HEADERS | {"Content-Type": kind, "Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # the client has left
            self.close_connection = True

    def check_sender(self):
        """Refused, unless the browser is at our own address (no other name that leads here) and on our own page."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or hosts[0] not in self.server.hosts:
            raise Refused(403, f"the host {hosts} is not {' or '.join(self.server.hosts)}")
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "none")
        if origin not in (None, f"http://{hosts[0]}") or site not in ("none", "same-origin"):
            raise Refused(403, f"the page {origin} is not ours")

    def read_body(self):
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused(411, "expected a Content-Length")
        if int(length[:12]) > MOST_BYTES:
            raise Refused(413, f"expected at most {MOST_BYTES >> 20} MB")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ValueError("the request was cut off")
        return body

    def read_json(self):
        """The body as a dict."""
        request = json.loads(self.read_body())
        if not isinstance(request, dict):
            raise ValueError("expected a JSON object")
        return request

    def log_message(self, *args):
        """Requests are not printed: the page asks several times a second."""

    # each of these takes the rest of the path and returns a content type and bytes

    def get_page(self, rest):
        return "text/html; charset=utf-8", PAGE.read_bytes()

    def get_model(self, rest):
        return as_json(self.server.studio.describe_model())

    def get_drawings(self, rest):
        studio = self.server.studio
        return as_json([studio.describe(drawing) for drawing in list(studio.drawings.values())])

    def get_drawing(self, rest):
        number, _, seen = rest.partition("/")
        studio = self.server.studio
        return as_json(studio.describe(studio.find(number), int(seen[:9]) if seen.isdecimal() else None))

    def get_example(self, rest):
        return as_json(self.server.studio.example(rest))

    def get_file(self, rest):
        """A mask or image that this server has made: only those names are known, so none leads out of the folder."""
        studio = self.server.studio
        if not any(rest and rest in (drawing.painting, *drawing.files) for drawing in list(studio.drawings.values())):
            raise Refused(404, f"there is no image {rest:.40}")
        return "image/png", (studio.out / rest).read_bytes()

    def post_draw(self, rest):
        return as_json(self.server.studio.ask(self.read_json()))

    def post_cancel(self, rest):
        return as_json(self.server.studio.cancel(rest))

    def post_read(self, rest):
        return as_json(self.server.studio.read_upload(self.read_body()))

    def post_mask(self, rest):
        studio = self.server.studio
        return "image/png", studio.mask_png(studio.ids_of(self.read_json().get("mask")))


def as_json(value):
    return "application/json", json.dumps(value).encode()


def start_server(studio, port):
    """A server on 127.0.0.1; port 0 takes a free one. OSError where the port is taken."""
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise OSError(f"port {port}: {error}; take another with --port, or a free one with --port 0") from error
    server.studio = studio
    server.hosts = [f"{name}:{server.server_port}" for name in ("127.0.0.1", "localhost")]
    return server


def run(args):
    studio = Studio(args)
    server = start_server(studio, args.port)
    address = f"http://{server.hosts[0]}"
    print(f"{studio.state['path']}: images of {studio.size[0]}x{studio.size[1]}, saved in {studio.out}\n"
          f"Paint at {address}   (Ctrl-C ends it)", flush=True)
    if args.open:
        webbrowser.open(address)
    try:
        server.serve_forever()
    finally:
        studio.close()
        server.server_close()


def main():
    parser = argparse.ArgumentParser(prog="python -m painter", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="default: the run that config.yaml names, or toy weights")
    parser.add_argument("--out", default="out/painted", help="folder for masks and images; default: %(default)s")
    parser.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"])
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one; default: %(default)s")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    add_config_arguments(parser)
    command(run, parser.parse_args())


if __name__ == "__main__":
    main()
