"""The painter's page in a real browser: chromium, driven by selenium; skipped where either is missing.

    apt-get install chromium chromium-driver && pip install selenium
"""
# ruff: noqa: E402, F401, F811 (selenium may be missing; `gate` is a fixture)

import base64
import io
import json
import shutil
import threading
import time

import numpy as np
import pytest
from PIL import Image, ImageDraw

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.actions.pointer_input import PointerInput
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from painter import __main__ as painter
from scenes import BOOK, CAR, CITYSCAPES, NAMES, NONE, PERSON, ROAD, SKY
from test_painter import arguments, gate, make_checkpoint, png_bytes, until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no chromium with its chromedriver")
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--window-size=1300,900"]
SIDE = 512  # of the canvas


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    folder = tmp_path_factory.mktemp("downloads")
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=DRIVER))
    driver.downloads = folder
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """A painter of 19 classes in this process; studio.requests holds what Draw has sent."""
    folder = tmp_path_factory.mktemp("painter")
    studio = painter.Studio(arguments(make_checkpoint(folder / "net.pt", CITYSCAPES, (16, 16)), folder / "out"))
    server = painter.start_server(studio, 0)
    threading.Thread(target=server.serve_forever, args=[.05]).start()
    studio.requests, real = [], studio.ask

    def ask(request):
        studio.requests.append(request)
        return real(request)

    studio.ask = ask
    studio.address = f"http://127.0.0.1:{server.server_port}"
    yield studio
    server.shutdown()
    server.server_close()
    studio.close()


@pytest.fixture
def page(driver, studio):
    """The page with an empty mask; afterwards, nothing went wrong in it that the test did not look at."""
    studio.requests.clear()
    driver.get_log("browser")
    page = Page(driver, studio)
    page.open()
    page.click("clear")
    yield page
    assert [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == page.expected


class Page:
    def __init__(self, driver, studio):
        self.driver, self.studio, self.expected = driver, studio, []

    def open(self):
        self.driver.get(self.studio.address)
        self.wait(lambda: self.run("return document.documentElement.dataset.ready"))

    def run(self, script, *args):
        return self.driver.execute_script(script, *args)

    def wait(self, condition):
        return WebDriverWait(self.driver, 20, .03).until(lambda _: condition())

    def find(self, id):
        return self.driver.find_element(By.ID, id)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def click(self, id):
        self.find(id).click()

    def choose(self, tool=None, name=None):
        """A tool and a class, by a click on what can be seen."""
        for group, text in (("tools", tool), ("palette", name)):
            if text:
                self.driver.find_element(By.XPATH, f"//*[@id='{group}']/label[contains(., '{text}')]").click()

    def set(self, id, value):
        self.run("""const input = document.getElementById(arguments[0]); input.value = arguments[1];
                    input.dispatchEvent(new Event('input')); input.dispatchEvent(new Event('change'))""", id, value)

    def at(self, x, y):
        """The point of the window, in whole pixels, that shows the point (x, y) of the mask."""
        box = self.run("return document.getElementById('sheet').getBoundingClientRect().toJSON()")
        return round(box["x"] + x * box["width"] / SIDE), round(box["y"] + y * box["height"] / SIDE)

    def of(self, x, y):
        """The point of the mask at a point of the window."""
        box = self.run("return document.getElementById('sheet').getBoundingClientRect().toJSON()")
        return (x - box["x"]) / box["width"] * SIDE, (y - box["y"]) / box["height"] * SIDE

    def drag(self, *points, kind="mouse", button=0):
        """Press at the first point of the mask, move along the others, release; a single point is a click."""
        pointer = PointerInput(kind, kind)
        actions = ActionBuilder(self.driver, mouse=pointer, duration=0)
        actions.pointer_action.move_to_location(*self.at(*points[0])).pointer_down(button)
        for point in points[1:]:
            actions.pointer_action.move_to_location(*self.at(*point))
        actions.pointer_action.pointer_up(button)
        actions.perform()

    def keys(self, *keys):
        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def command(self, key, shift=False):
        chain = ActionChains(self.driver, duration=0).key_down(Keys.CONTROL)
        chain = chain.key_down(Keys.SHIFT).send_keys(key).key_up(Keys.SHIFT) if shift else chain.send_keys(key)
        chain.key_up(Keys.CONTROL).perform()

    def ids(self):
        """The mask as the canvas shows it: (512, 512), every colour exactly that of a class, or transparent."""
        time.sleep(.06)  # shown with the next frame
        url = self.run("return document.getElementById('mask').toDataURL()")
        rgba = np.array(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGBA"))
        known = {(0, 0, 0, 0): NONE} | {(*rgb, 255): k for k, rgb in enumerate(CITYSCAPES.values())}
        colors, index = np.unique(rgba.view(np.uint32), return_inverse=True)
        return np.array([known[tuple(c.tobytes())] for c in colors], np.uint8)[index].reshape(SIDE, SIDE)

    def status(self):
        return self.find("status").text

    def drop(self, **files):
        """Drop files, {stem: bytes of a PNG}, onto the page."""
        self.run("""const transfer = new DataTransfer();
                    for (const [stem, data] of Object.entries(arguments[0])) {
                      const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
                      transfer.items.add(new File([bytes], `${stem}.png`, {type: 'image/png'}));
                    }
                    document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: transfer, bubbles: true}))""",
                 {stem: base64.b64encode(data).decode() for stem, data in files.items()})


def capsule(a, b, size):
    """Which pixels (512, 512) have their centre within size / 2 of the line from a to b."""
    centres = np.stack(np.meshgrid(np.arange(SIDE) + .5, np.arange(SIDE) + .5), axis=-1)
    a, way = np.array(a), np.array(b) - a
    share = ((centres - a) @ way / max(way @ way, 1e-9)).clip(0, 1)
    return np.linalg.norm(centres - a - share[..., None] * way, axis=-1) <= size / 2


def alike(ids, expected):
    """All but a rounding of coordinates: at most 1 in 1000 pixels differ."""
    return (ids != expected).mean() < .001


def only(where, label):
    return np.where(where, label, NONE).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------- painting


def test_a_stroke_arrives_in_the_request(page, studio):
    """A brush stroke shows and is sent in exactly the class that was chosen, round, and without soft edges."""
    page.choose("Brush", "car")
    size = int(page.find("size-value").text)
    ends = [page.of(*page.at(x, y)) for x, y in ((100, 120), (380, 300))]
    page.drag((100, 120), (380, 300))
    shown = page.ids()
    assert set(np.unique(shown)) == {CAR, NONE} and alike(shown, only(capsule(*ends, size), CAR))
    page.click("draw")
    page.wait(lambda: studio.requests)
    sent = np.frombuffer(base64.b64decode(studio.requests[0]["mask"]), np.uint8).reshape(SIDE, SIDE)
    assert (sent == shown).all()


def test_the_other_tools(page):
    """Line, rectangle and polygon paint their shapes, fill its area, and pick takes the class that is there."""
    expected = Image.new("L", (SIDE, SIDE), NONE)
    pen = ImageDraw.Draw(expected)
    page.choose("Rectangle", "road")
    page.drag((20.5, 300.5), (400, 200), (300.5, 480.5))  # what lay under the way is not painted
    pen.rectangle([20, 300, 300, 480], ROAD)
    page.choose("Polygon", "person")
    for corner in ((100, 40), (200, 40), (150, 140), (100, 40)):  # the first corner again
        page.drag(corner)
    pen.polygon([(100, 40), (200, 40), (150, 140)], PERSON)
    page.choose("Line", "car")
    page.drag((400, 60), (350, 400), (400, 400))
    expected = np.where(capsule((400, 60), (400, 400), int(page.find("size-value").text)), CAR, np.array(expected))
    ids = page.ids()
    assert set(np.unique(ids)) == {ROAD, PERSON, CAR, NONE} and (ids != expected).mean() < .01
    page.choose("Fill", "sky")
    page.drag((10, 10))
    assert (page.ids() == np.where(ids == NONE, SKY, ids)).all()
    page.choose("Pick")
    page.drag((150, 60))
    assert page.run("return document.querySelector('[name=class]:checked').value") == str(PERSON)
    assert page.run("return document.querySelector('[name=tool]:checked').value") == "fill"  # the tool before
    page.drag((30, 310))
    assert (page.ids()[ids == ROAD] == PERSON).all()


def test_undo_and_redo(page):
    """Every step can be undone to the first and done again, by buttons and by keys; painting anew ends the redo."""
    page.choose("Rectangle", "road")
    states = [page.ids()]
    for i in range(12):
        page.choose(name=NAMES[i])
        page.drag((10 + 40 * i, 10), (40 + 40 * i, 200 + i))
        states.append(page.ids())
    assert len({state.tobytes() for state in states}) == 13
    for state in states[-2::-1]:
        page.command("z")
        assert (page.ids() == state).all()
    for state in states[1:7]:
        page.command("z", shift=True)
        assert (page.ids() == state).all()
    page.click("redo")
    assert (page.ids() == states[7]).all()
    page.click("undo")
    page.drag((10, 300), (500, 400))
    assert not page.find("redo").is_enabled()
    page.click("clear")
    assert (page.ids() == NONE).all()


def test_a_reload_loses_nothing(page):
    """The painting and the drawings are there again after a reload."""
    page.choose("Rectangle", "bus")
    page.drag((50, 50), (300, 200))
    before = page.ids()
    cards = len(page.all(".drawing")) + 1
    page.click("draw")
    page.wait(lambda: len(page.all(".drawing")) == cards and not page.all(".drawing.working"))
    page.open()
    assert (page.ids() == before).all()
    page.wait(lambda: len(page.all(".drawing")) == cards)
    assert all(image.get_property("naturalWidth") == 16 for image in page.all(".drawing:first-child .tile.ready img"))


def test_wheel_and_zoom(page):
    """The wheel sizes the brush, with Ctrl it zooms, the right button moves; a stroke lands under the pointer."""
    def turn(delta, ctrl):
        page.run("""const [deltaY, ctrlKey] = arguments, stage = document.getElementById('stage');
                    const box = stage.getBoundingClientRect(), clientX = box.x + 100, clientY = box.y + 120;
                    stage.dispatchEvent(new WheelEvent('wheel', {deltaY, ctrlKey, clientX, clientY, cancelable: true}))
                 """, delta, ctrl)

    size = int(page.find("size-value").text)
    turn(-100, False)
    assert int(page.find("size-value").text) > size
    turn(100, False)
    turn(100, False)
    assert int(page.find("size-value").text) < size
    page.set("size", 100)
    assert page.find("size-value").text == "200"
    page.set("size", 40)
    stage = page.run("return document.getElementById('stage').getBoundingClientRect().toJSON()")
    point = (stage["x"] + 100, stage["y"] + 120)
    before = page.of(*point)
    for _ in range(4):
        turn(-100, True)
    assert page.find("zoom-fit").text != "100%" and page.of(*point) == pytest.approx(before, abs=.5)
    a, b = page.of(stage["x"] + 200, stage["y"] + 200), page.of(stage["x"] + 300, stage["y"] + 260)
    page.choose("Brush", "sky")
    page.drag(a, b)
    assert alike(page.ids(), only(capsule(a, b, int(page.find("size-value").text)), SKY))
    page.drag(a, b, button=2)
    assert page.of(stage["x"] + 300, stage["y"] + 260) == pytest.approx(a, abs=1)
    page.click("zoom-fit")
    assert page.find("zoom-fit").text == "100%"


def test_pen_and_touch(page, driver):
    """A pen and a finger paint; two fingers zoom and paint nothing, not even what the first has begun."""
    page.choose("Brush", "terrain")
    size = int(page.find("size-value").text)

    def touch(kind, *points):
        spots = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(points)]
        driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": spots})

    a, b = page.at(100, 100), page.at(300, 100)
    touch("touchStart", a)
    touch("touchMove", b)
    touch("touchEnd")
    painted = page.ids()
    assert alike(painted, only(capsule(page.of(*a), page.of(*b), size), NAMES.index("terrain")))
    c = page.at(200, 300)
    touch("touchStart", c)
    touch("touchStart", c, (c[0] + 60, c[1]))
    for apart in (70, 90, 120):
        touch("touchMove", c, (c[0] + apart, c[1]))
    touch("touchEnd")
    assert (page.ids() == painted).all() and page.find("zoom-fit").text == "200%"
    page.click("zoom-fit")
    page.drag((100, 400), (300, 400), kind="pen")
    assert (page.ids() != painted).sum() > 200 * size * .9


def test_the_keyboard_alone(page, studio):
    """Classes, tools, painting and Draw without a pointer."""
    page.run("document.getElementById('stage').focus()")
    page.keys("4", "r", *[Keys.ARROW_LEFT] * 10, " ", *[Keys.ARROW_DOWN] * 15, *[Keys.ARROW_RIGHT] * 5, " ")
    ids = page.ids()
    assert set(np.unique(ids)) == {3, NONE} and (ids == 3).sum() == 60 * 20
    ActionChains(page.driver, duration=0).key_down(Keys.SHIFT).send_keys("4").key_up(Keys.SHIFT).perform()
    page.keys("p")
    for way in (Keys.ARROW_UP, Keys.ARROW_RIGHT, Keys.ARROW_DOWN):
        page.keys(" ", *[way] * 20)
    page.keys(Keys.ENTER)
    assert (page.ids() == CAR).sum() == 80 * 79 / 2  # without the diagonal
    page.keys("e", "f", *[Keys.ARROW_UP] * 3, " ")
    page.command(Keys.ENTER)
    page.wait(lambda: studio.requests)


def test_escape_gives_up_a_shape(page):
    """Escape in the middle of a shape leaves the mask as it was."""
    page.choose("Polygon", "car")
    page.drag((100, 100))
    page.drag((300, 100))
    page.drag((200, 300))
    page.keys(Keys.ESCAPE, Keys.ENTER)
    assert (page.ids() == NONE).all() and page.find("marks").get_attribute("innerHTML").count("polyline") == 0


# ------------------------------------------------------------------------------------------------------- images


def test_images_come(page, studio, gate):
    """Previews show while it works, with the time that is left; then the images, as they are in the folder."""
    page.click("hand-drawn")
    page.wait(lambda: (page.ids() != NONE).all())
    for key, value in {"n": 3, "guidance": 1, "steps": 4, "seed": 11}.items():
        page.set(key, value)
    Select(page.find("sampler")).select_by_value("ddim")
    page.click("draw")
    gate.release(2)
    card = page.wait(lambda: page.all(".drawing.working"))[0]
    page.wait(lambda: "left" in card.text and "50 %" in card.text)
    page.wait(lambda: len([image for image in card.find_elements(By.CSS_SELECTOR, ".tiles img")
                           if image.is_displayed() and image.get_property("src").startswith("data:")]) == 3)
    gate.release(10_000)
    page.wait(lambda: not page.all(".drawing.working"))
    request = studio.requests[-1]
    assert {key: request[key] for key in ("n", "guidance", "steps", "seed", "sampler")} == {
        "n": 3, "guidance": 1, "steps": 4, "seed": 11, "sampler": "ddim"}
    images = card.find_elements(By.CSS_SELECTOR, ".tile.ready img")
    assert [image.get_property("alt").split(", ")[1] for image in images] == ["seed 11", "seed 12", "seed 13"]
    for image, seed in zip(images, (11, 12, 13)):
        assert image.get_property("naturalWidth") == 16
        file = image.get_property("src").split("/")[-1]
        assert file.endswith(f"_w1_seed{seed}.png")
        assert json.loads(Image.open(studio.out / file).text["settings"])["sampler"] == "ddim"
    images[1].click()
    assert "sample.py" in page.find("large-command").text and "seed 12" in page.find("large-text").text
    page.click("use-seed")
    assert page.find("seed").get_property("value") == "12" and not page.all("dialog[open]")


def test_cancel(page, gate):
    """Cancel ends a drawing, one that works and one that waits."""
    page.set("guidance", 1)
    page.click("draw")
    page.click("draw")
    cards = page.wait(lambda: len(page.all(".drawing.working")) == 2 and page.all(".drawing.working"))
    page.wait(lambda: "waiting" in cards[0].text and "starting" in cards[1].text)
    for card in cards:
        card.find_element(By.CSS_SELECTOR, ".cancel").click()
    page.wait(lambda: "cancelled" in cards[0].text)
    gate.release(10_000)
    page.wait(lambda: "cancelled" in cards[1].text)
    assert not any(card.find_elements(By.CSS_SELECTOR, ".tile.ready") for card in cards)


def test_what_the_server_refuses_is_said(page, studio, gate):
    """A full queue is a message on the page."""
    numbers = [studio.ask({"mask": base64.b64encode(bytes([NONE]) * SIDE * SIDE).decode()})["number"]]
    until(lambda: not studio.waiting)
    for _ in range(painter.MOST_WAITING):
        numbers.append(studio.ask({"mask": base64.b64encode(bytes([NONE]) * SIDE * SIDE).decode()})["number"])
    page.click("draw")
    page.wait(lambda: "are waiting" in page.status())
    assert "bad" in page.find("status").get_attribute("class")
    page.expected = [f"{studio.address}/draw - Failed to load resource: the server responded with a status of 503 "
                     "(Service Unavailable)"]
    for number in numbers:
        studio.cancel(str(number))


# -------------------------------------------------------------------------------------------------------- files


def a_mask():
    ids = np.full((SIDE, SIDE), SKY, np.uint8)
    ids[300:], ids[250:350, 100:250] = ROAD, CAR
    return ids


def test_a_dropped_mask(page):
    """A palette PNG that is dropped is the mask, exactly."""
    image = Image.fromarray(a_mask())
    image.putpalette(BOOK.palette.tobytes())
    page.drop(mine=png_bytes(image))
    page.wait(lambda: "mine.png" in page.status())
    assert (page.ids() == a_mask()).all()
    page.command("z")
    assert (page.ids() == NONE).all()


def refused(page, *routes):
    """What the browser's console says of requests to these routes, or to /read, that were answered with 400."""
    return [f"{page.studio.address}/{route} - Failed to load resource: the server responded with a status of 400 "
            "(Bad Request)" for route in routes or ["read"]]


def test_a_dropped_photograph_and_its_mask(page):
    """A photograph lies beneath, its centre in the ratio of the mask, with a slider for the mask over it."""
    photo = np.zeros((100, 300, 3), np.uint8)
    photo[:, 100:200, 0], photo[:, :100, 1] = np.arange(100, 200), np.arange(150, 250)
    mask = Image.fromarray(a_mask())
    mask.putpalette(BOOK.palette.tobytes())
    page.drop(street=png_bytes(Image.fromarray(photo), "jpeg"), its_mask=png_bytes(mask))
    page.wait(lambda: page.find("photo").is_displayed() and (page.ids() == a_mask()).all())
    red, green = page.run("""const photo = document.getElementById('photo').getContext('2d');
                             return [...photo.getImageData(256, 256, 1, 1).data].slice(0, 2)""")
    assert abs(red - 150) < 8 and green < 12
    page.set("opacity", 30)
    assert page.run("return getComputedStyle(document.getElementById('mask')).opacity") == "0.3"
    page.click("no-photo")
    assert not page.find("photo").is_displayed() and not page.find("opacity").is_displayed()
    page.expected = refused(page)


@pytest.mark.parametrize("data", [b"no image", png_bytes(Image.fromarray(a_mask()))[:300]], ids=["text", "cut off"])
def test_a_broken_file(page, data):
    """A file that cannot be read is said by its name, and the mask stays as it was."""
    page.choose("Rectangle", "car")
    page.drag((50, 50), (300, 200))
    before = page.ids()
    page.drop(broken=data)
    page.wait(lambda: page.status().startswith("broken.png"))
    assert "not readable" in page.status() and "bad" in page.find("status").get_attribute("class")
    assert (page.ids() == before).all()
    page.expected = refused(page)


def test_chosen_and_saved_files(page, driver, tmp_path):
    """A mask that is chosen is opened, and Save mask writes it as the palette PNG that it was."""
    rgb = np.array(list(CITYSCAPES.values()), np.uint8)[a_mask()]
    Image.fromarray(rgb).save(tmp_path / "chosen.png")
    page.find("mask-file").send_keys(str(tmp_path / "chosen.png"))
    page.wait(lambda: "chosen.png" in page.status())
    page.click("save")
    page.wait(lambda: (driver.downloads / "mask.png").exists())
    saved = Image.open(driver.downloads / "mask.png")
    assert saved.mode == "P" and (np.array(saved) == a_mask()).all()
    assert saved.getpalette()[:57] == [value for color in CITYSCAPES.values() for value in color]


def test_a_scene_with_its_image(page):
    """A random street fills the mask, and its image lies beneath."""
    page.click("scene")
    page.wait(lambda: "toy scene" in page.status() and page.find("photo").is_displayed())
    assert (page.ids() != NONE).all() and len(np.unique(page.ids())) > 3


# ----------------------------------------------------------------------------------------------- editing a photo


def a_photo(shape=(SIDE, SIDE)):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


def mask_png(ids):
    image = Image.fromarray(ids)
    image.putpalette(BOOK.palette.tobytes())
    return png_bytes(image)


def test_a_photo_is_edited(page, studio):
    """With a photo and its mask the choice to keep the rest is on, and what comes is the photo with the change."""
    photo = a_photo((256, 384))
    mask = np.full((256, 384), SKY, np.uint8)
    mask[150:] = ROAD
    page.drop(street=png_bytes(Image.fromarray(photo)))
    page.wait(lambda: page.find("photo").is_displayed())
    keep = page.find("keep")
    assert keep.is_displayed() and not keep.is_enabled() and "Open its mask" in page.find("keep-note").text
    page.drop(its_mask=mask_png(mask))
    page.wait(lambda: keep.is_selected())
    assert keep.is_enabled() and "nothing else" in page.find("keep-note").text
    assert keep.accessible_name == "Keep the rest of the photo"
    page.choose("Rectangle", "car")
    page.drag((200, 250), (300, 330))  # of the canvas, which shows columns 64 to 320, twice as large
    for key, value in {"n": 2, "guidance": 1, "seed": 5}.items():
        page.set(key, value)
    cards = len(page.all(".drawing"))
    page.click("draw")
    page.wait(lambda: len(page.all(".drawing")) == cards + 1 and len(page.all(".drawing:first-child .tile.ready")) == 2)
    card = page.all(".drawing:first-child")[0]
    assert "photo kept" in card.text
    images = card.find_elements(By.CSS_SELECTOR, ".tile.ready img")
    assert [image.get_property("naturalWidth") for image in images] == [384, 384]
    for image in images:
        result = np.array(Image.open(studio.out / image.get_property("src").split("/")[-1]))
        far, inner = np.ones((256, 384), bool), (slice(128, 162), slice(167, 211))
        far[105:185, 144:234] = False
        assert (result[far] == photo[far]).all() and (result[inner] != photo[inner]).mean() > .9
    images[0].click()
    words = page.find("large-command").text
    assert "_photo.png" in words and "--image-mask" in words and "_before.png" in words
    page.click("close-look")

    card.find_element(By.CSS_SELECTOR, ".tile.mask").click()  # painting on does not make this the photo's own mask
    page.wait(lambda: "painting_" in page.status())
    page.click("draw")
    page.wait(lambda: len(studio.requests) == 2)
    assert base64.b64decode(studio.requests[1]["photo_mask"]) == mask_png(mask)
    page.click("keep")
    page.click("draw")
    page.wait(lambda: len(studio.requests) == 3)
    assert "photo" not in studio.requests[2]
    page.click("no-photo")
    assert not keep.is_displayed()
    page.expected = refused(page)


@pytest.mark.parametrize("case, words", [("no change", "nothing of the photo's mask has changed"),
                                         ("all", "all of the photo's mask has changed")])
def test_edits_that_are_none_are_said(page, case, words):
    """A mask that is still the photo's own, and one that is new everywhere, are a message on the page."""
    page.drop(mine=mask_png(a_mask()), street=png_bytes(Image.fromarray(a_photo())))
    page.wait(lambda: page.find("keep").is_selected())
    if case == "all":
        page.click("clear")
    cards = len(page.all(".drawing"))
    page.click("draw")
    page.wait(lambda: words in page.status())
    assert "bad" in page.find("status").get_attribute("class") and len(page.all(".drawing")) == cards
    page.expected = refused(page, "read", "draw")


def test_a_mask_of_another_size_is_said(page):
    """A photo and a mask of different sizes are told with both sizes, and the rest cannot be kept."""
    page.drop(street=png_bytes(Image.fromarray(a_photo((256, 384)))), its_mask=mask_png(a_mask()))
    page.wait(lambda: "512 × 512" in page.find("keep-note").text)
    assert "384 × 256" in page.find("keep-note").text and not page.find("keep").is_enabled()
    page.click("hand-drawn")
    page.wait(lambda: not page.find("keep").is_displayed())
    page.drop(street=png_bytes(Image.fromarray(a_photo())))  # the example is not its mask, though its size would fit
    page.wait(lambda: "Open its mask" in page.find("keep-note").text)
    page.expected = refused(page, "read", "read")


def test_a_scene_is_edited(page, studio):
    """A random street comes with its image and its mask, so that it can be edited at once."""
    page.click("scene")
    page.wait(lambda: page.find("keep").is_selected())
    page.choose("Rectangle", "person")
    page.drag((200, 200), (240, 300))
    cards = len(page.all(".drawing"))
    page.click("draw")
    page.wait(lambda: len(page.all(".drawing")) == cards + 1 and page.all(".drawing:first-child .tile.ready"))
    assert page.all(".drawing:first-child .tile.ready img")[0].get_property("naturalWidth") == SIDE


# ------------------------------------------------------------------------------------------------ for everybody


def test_everything_has_a_name(page):
    """What can be pressed or filled in has a name for a screen reader, and can be reached by the Tab key."""
    controls = [element for element in page.all("button, input, select, a[href], #stage, progress")
                if element.is_displayed() or element.get_attribute("class") == "unseen"]
    assert len(controls) > 40
    nameless = [element for element in controls if not element.accessible_name.strip()]
    assert [element.get_attribute("outerHTML")[:80] for element in nameless] == []
    assert not page.all("[tabindex='-1']")


def test_small_windows_and_darkness(page, driver):
    """On a telephone nothing is wider than the window and everything is there; dark is dark, light is light."""
    def brightness():
        color = page.run("return getComputedStyle(document.body).backgroundColor")
        return np.mean([float(v) for v in color[color.index("(") + 1:-1].split(",")])

    try:
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                               {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True})
        assert page.run("return document.documentElement.scrollWidth") == 360
        page.open()
        page.keys(Keys.SHIFT, "e")
        assert page.run("return scrollY") == 0  # the list of classes has scrolled, not the page
        for id in ("stage", "tools", "palette", "draw", "results"):
            box = page.run("return document.getElementById(arguments[0]).getBoundingClientRect().toJSON()", id)
            assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["height"] > 30
        page.choose("Brush", "road")
        page.drag((100, 100), (200, 200))
        assert (page.ids() == ROAD).any()
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    seen = {}
    for scheme in ("light", "dark"):
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia",
                               {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        seen[scheme] = brightness()
    assert seen["light"] > 200 > 60 > seen["dark"]
    page.click("theme")
    assert brightness() == seen["light"]
    page.run("localStorage.removeItem('theme')")


def test_nothing_comes_from_elsewhere(page, studio):
    """All that the page has loaded came from its own server."""
    page.click("draw")
    page.wait(lambda: page.all(".tile.ready"))
    loaded = page.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len(loaded) > 3 and all(name.startswith((studio.address, "data:")) for name in loaded)
