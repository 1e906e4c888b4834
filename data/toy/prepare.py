"""Toy street scenes, drawn by this file, each with its exact mask in the 19 classes of Cityscapes and BDD100K.

    python -m data.toy.prepare --out data/toy/prepared --train 1000 --val 100 --test 100 --size 48x48 --seed 0

A scene is laid out in metres: x to the right of the middle of the road, y up from the ground, z ahead of the camera.
Painter draws every shape on a canvas of colours and on a canvas of class ids alike: that is why the mask is exact.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from config import command
from data.common import parse_size, write_dataset
from masks import Colorbook

(ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, VEGETATION, TERRAIN, SKY, PERSON, RIDER, CAR, TRUCK, BUS,
 TRAIN, MOTORCYCLE, BICYCLE) = range(19)  # the order of colorbook.json

SIZE = (48, 48)  # height, width of a scene: that of the preset toy in config.yaml
SCALE = 4  # everything is drawn so many times larger than asked for, then averaged: smooth edges
NEAR = 6  # distance in metres of the ground at the lower edge of the image
GRAIN = {ROAD: (.05, .05), SIDEWALK: (.05, .04), BUILDING: (.03, .04), WALL: (.07, .06), FENCE: (.05, .03),
         VEGETATION: (.08, .16), TERRAIN: (.07, .12)}  # strength of the fine and of the coarse noise of a class
TIMES = {  # how often, sky above, sky at the horizon, clouds, light; colours are fractions of white
    "day": (.48, (.25, .50, .88), (.74, .87, .97), (1, 1, 1), (1, 1, 1)),
    "overcast": (.17, (.62, .66, .71), (.82, .84, .86), (.93, .94, .96), (.84, .87, .92)),
    "dusk": (.17, (.33, .27, .52), (1, .60, .30), (.95, .50, .48), (.80, .60, .56)),
    "night": (.18, (.03, .04, .14), (.13, .15, .32), (.08, .09, .18), (.36, .39, .56)),
}
PAINT = [(200, 30, 35), (235, 235, 235), (35, 38, 45), (150, 155, 165), (30, 70, 165), (240, 195, 40), (30, 115, 75),
         (225, 110, 30), (95, 175, 215), (110, 30, 50), (150, 80, 150), (205, 190, 160)]
FACADES = [(176, 92, 72), (205, 180, 140), (222, 208, 180), (140, 120, 110), (150, 165, 180), (200, 150, 90),
           (110, 125, 150), (215, 160, 150), (160, 180, 150), (232, 222, 205)]
LEAVES = [(66, 122, 48), (88, 140, 55), (48, 98, 58), (120, 140, 50)]
AUTUMN = [(200, 120, 40), (185, 70, 40), (215, 180, 60), (235, 175, 190)]  # and, in pink, spring
SKIN = [(245, 205, 175), (225, 175, 140), (170, 115, 80), (105, 70, 50)]
GLASS, TYRE, LAMP, WHITE = (60, 78, 98), (24, 24, 27), (255, 205, 120), (240, 240, 234)


def pick(rng, colours, spread=14):
    """One of the colours, never twice the same."""
    return (colours[rng.integers(len(colours))] + rng.normal(0, spread, 3)).clip(0, 255)


def noise(rng, size, cells):
    """Smooth noise (H, W) around 0 with about `cells` bumps from top to bottom."""
    H, W = size
    coarse = rng.normal(0, 1, (cells, max(2, cells * W // H))).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((W, H), Image.Resampling.BICUBIC))


class Painter:
    """A pinhole camera and three canvases: colours, class ids, and lamps, which shine by themselves."""

    def __init__(self, rng, size):
        H, W = size
        self.rng, self.size, self.unit, self.aspect = rng, size, H * SCALE, W / H  # unit: the height of the canvas
        self.time = rng.choice(list(TIMES), p=[row[0] for row in TIMES.values()])
        self.dark, self.sun, self.fog = self.time in ("dusk", "night"), rng.choice([-1, 1]), rng.choice([.2, .45, .8])
        self.horizon, self.vanish = rng.uniform(.36, .54), self.aspect * rng.uniform(.3, .7)
        self.curve = rng.normal(0, .18) if rng.random() < .5 else 0
        self.metre = rng.uniform(.17, .23) * min(1, self.aspect) ** .5  # a metre at the lower edge
        self.side = rng.uniform(-2, .5)  # from the camera to the middle of the road
        self.haze = [min(255, 255 * c / light) for c, light in zip(TIMES[self.time][2], TIMES[self.time][4])]
        self.canvases = [Image.new(mode, (W * SCALE, H * SCALE), fill) for mode, fill in
                         (("RGB", 0), ("L", SKY), ("RGB", 0))]
        self.pens = [ImageDraw.Draw(canvas, mode) for canvas, mode in zip(self.canvases, ("RGBA", "L", "RGB"))]
        self.autumn = pick(rng, AUTUMN)

    def point(self, x, y, z):
        """Where a point of the world falls on the canvas."""
        t = NEAR / z
        bend = self.curve * (1 - t) ** 2 if t < 1 else 0
        return ((self.vanish + bend + (x + self.side) * self.metre * t) * self.unit,
                (self.horizon + (1 - self.horizon - y * self.metre) * t) * self.unit)

    def draw(self, shape, xy, z, colour, label, glow=0):
        """Draw on all canvases. Without a label it is a shadow: it darkens the colours and leaves the ids alone."""
        if label is None:
            getattr(self.pens[0], shape)(xy, fill=(15, 15, 30, 110))
            return
        fade = self.fog * (1 - NEAR / z) ** 3 if z > NEAR else 0
        rgb = [min(255, int(c + (h - c) * fade)) for c, h in zip(colour, self.haze)]
        getattr(self.pens[0], shape)(xy, fill=tuple(rgb))
        getattr(self.pens[1], shape)(xy, fill=int(label))
        if self.dark:
            getattr(self.pens[2], shape)(xy, fill=tuple(int(c * glow) for c in colour))

    def poly(self, points, colour, label, glow=0):
        xy = [self.point(*p) for p in points]
        if max(xy)[0] > 0 and min(xy)[0] < self.unit * self.aspect:  # not beside the image
            self.draw("polygon", xy, points[0][2], colour, label, glow)

    def rect(self, x0, x1, y0, y1, z, colour, label, glow=0):
        self.poly([(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)], colour, label, glow)

    def oval(self, x, y, rx, ry, z, colour, label, glow=0):
        xy = [*self.point(x - rx, y + ry, z), *self.point(x + rx, y - ry, z)]
        self.draw("ellipse", xy, z, colour, label, glow)

    def band(self, a, b, z0, z1, colour, label):
        """Sweep the line between (x, y) = a and b from distance z0 to z1: flat a road, upright a wall."""
        zs = (1 / np.linspace(1 / z1, 1 / z0, 3 + int(48 * (1 / z0 - 1 / z1)))).tolist()
        for far, near in zip(zs, zs[1:]):
            self.poly([(*a, far), (*b, far), (*b, near), (*a, near)], colour, label)

    def box(self, x, width, y0, y1, z0, z1, colour, label, top=None, inset=0):
        """A box around x, `inset` narrower at the top; returns the x of the side that is seen, in sun or in shade."""
        side = -1 if self.point(x, 0, z1)[0] < self.point(x, 0, z0)[0] else 1
        w, v, near, far = side * width / 2, side * (width / 2 - inset), z0 + inset, z1 - inset
        self.poly([(x + w, y0, z0), (x + w, y0, z1), (x + v, y1, far), (x + v, y1, near)],
                  np.array(colour) * (1.12 if side == self.sun else .72), label)
        self.poly([(x - v, y1, near), (x + v, y1, near), (x + v, y1, far), (x - v, y1, far)],
                  np.array(colour if top is None else top) * 1.15, label)
        self.poly([(x - w, y0, z0), (x + w, y0, z0), (x + v, y1, near), (x - v, y1, near)], colour, label)
        return x + w

    def panes(self, a, b, y0, y1, cols, rows, colour, label, lit=0.0, gap=.2):
        """Windows in columns and rows on the upright face over the ground line from a to b, both (x, z)."""
        if abs(self.point(a[0], 0, a[1])[0] - self.point(b[0], 0, b[1])[0]) < .02 * cols * self.unit:
            return
        for i in range(cols):
            (xa, za), (xb, zb) = ([p + (q - p) * (i + k) / cols for p, q in zip(a, b)] for k in (gap, 1 - gap))
            for j in range(rows):
                low, high = (y0 + (y1 - y0) * (j + k) / rows for k in (gap, 1 - gap))
                on, shade = self.rng.random() < lit, self.rng.uniform(.8, 1.25)
                self.poly([(xa, low, za), (xb, low, zb), (xb, high, zb), (xa, high, za)],
                          LAMP if on else [c * shade for c in colour], label, .4 * on)


def sky(p):
    """A gradient from above to the horizon, clouds, and at night stars and sometimes the moon."""
    (H, W), (_, top, low, white, _) = p.size, TIMES[p.time]
    top = np.clip(top + p.rng.normal(0, .02, 3) + p.rng.normal(0, .04), 0, 1)
    down = np.clip(np.arange(H) / H / p.horizon, 0, 1)[:, None, None]
    image = top + (low - top) * down ** 1.3 * np.ones((1, W, 1))
    if p.time == "night":
        image += (p.rng.random((H, W, 1)) > .99) * p.rng.uniform(.2, .7, (H, W, 1)) * (1 - down)
    clouds = noise(p.rng, p.size, 5) + noise(p.rng, p.size, 11) * .6 + noise(p.rng, p.size, 22) * .25
    image += (np.array(white) - image) * np.clip(clouds - p.rng.uniform(-.3, 1.2), 0, 1)[..., None] * .8
    gradient = Image.fromarray((image * 255).clip(0, 255).astype(np.uint8))
    p.canvases[0].paste(gradient.resize(p.canvases[0].size, Image.Resampling.BILINEAR))
    if p.time == "night" and p.rng.random() < .5:
        p.oval(*p.rng.uniform((-30, 28), (30, 45)), 4, 4, 95, (240, 240, 215), SKY, .5)


def far_away(p, city):
    """What closes the view at the horizon: a skyline, or hills and the edge of a wood."""
    for x in np.arange(-100, 100, 12) * max(1, p.aspect):
        if city and p.rng.random() < .7:
            height, colour = p.rng.uniform(6, 26), pick(p.rng, FACADES)
            p.rect(x, x + p.rng.uniform(9, 16), 0, height, 110, colour, BUILDING)
        else:
            p.oval(x, 0, p.rng.uniform(10, 26), p.rng.uniform(4, 11), 110, pick(p.rng, LEAVES) * .9, VEGETATION)


def street(p, half, pavement, city):
    """The ground from the fields to the road, with its markings."""
    slabs = pick(p.rng, [(176, 168, 160), (190, 180, 165), (150, 152, 158)], 6)
    grass = pick(p.rng, [(116, 150, 66), (140, 160, 80), (172, 158, 90)])
    for edge, colour, label in ((400, grass, TERRAIN), (25 * city, slabs * .93, SIDEWALK),
                                (half + pavement, slabs, SIDEWALK), (half + .15, slabs * .7, SIDEWALK),
                                (half, pick(p.rng, [(88, 88, 94), (108, 106, 108), (72, 74, 82)], 6), ROAD)):
        if label != SIDEWALK or pavement:
            p.band((-edge, 0), (edge, 0), 2.5, 200, colour, label)
    paint = WHITE if p.rng.random() < .75 else (235, 190, 60)
    for z in np.arange(p.rng.uniform(2.5, 6), 45, 6):
        p.band((-.1, 0), (.1, 0), z, z + 3, paint, ROAD)
    if p.rng.random() < .6:
        for x in (.3 - half, half - .3):
            p.band((x - .08, 0), (x + .08, 0), 2.5, 70, WHITE, ROAD)
    if pavement and p.rng.random() < .35:  # a zebra crossing
        z = p.rng.uniform(7, 14)
        for x in np.arange(.3 - half, half - .3, .95):
            p.band((x, 0), (x + .5, 0), z, z + 3, WHITE, ROAD)


def building(p, x, width, z0, z1, house):
    """A facade along the street and one towards the camera, with windows, and shops or a roof."""
    rng, colour = p.rng, pick(p.rng, FACADES, 18)
    floors = int(rng.integers(1, 3) if house else rng.integers(2, 6))
    y, cols, lit = 3 * floors + rng.uniform(0, .8), int((z1 - z0) / 3), {"dusk": .15, "night": .45}.get(p.time, 0)
    glass = pick(rng, [GLASS, (90, 115, 140), (50, 45, 50)])
    side = p.box(x, width, 0, y, z0, z1, colour, BUILDING)
    p.panes((side, z0), (side + np.sign(x) * 8, z0), .4, y - .4, 3, floors, glass, BUILDING, lit)
    if house:
        roof = pick(rng, [(150, 70, 50), (95, 80, 80), (120, 85, 60)])
        p.poly([(side, y, z0), (side, y, z1), (x, y + 2.5, z1), (x, y + 2.5, z0)], roof, BUILDING)
        p.poly([(x - width / 2, y, z0), (x + width / 2, y, z0), (x, y + 2.5, z0)], colour * .9, BUILDING)
        p.rect(x - .6, x + .6, 0, 2.2, z0, pick(rng, PAINT) * .7, BUILDING)  # the door
    else:
        p.panes((side, z0), (side, z1), .2, 2.4, cols, 1, glass, BUILDING, lit * 1.6, .1)
        p.band((side, 2.4), (side, 3), z0, z1, pick(rng, PAINT), BUILDING)
    p.panes((side, z0), (side, z1), 0 if house else 3, y - .4, cols, floors - (not house), glass, BUILDING, lit)


def tree(p, x, z):
    """A round tree, a fir or a bush: dark below, bright above and towards the sun."""
    kind = p.rng.choice(["round", "fir", "bush"], p=[.6, .2, .2])
    leaves = pick(p.rng, [p.autumn, *LEAVES])
    height, wide = (.8, .9) if kind == "bush" else p.rng.uniform((3.5, 1.1), (6.5, 1.8))
    p.oval(x, 0, wide * .9, .25, z, TYRE, None)
    p.rect(x - .18, x + .18, 0, height * .6, z, (92, 66, 48), VEGETATION)
    for i in range(4 if kind == "fir" else 7):
        if kind == "fir":
            y, w = height * (.2 + .2 * i), wide * (1 - .2 * i)
            p.poly([(x - w, y, z), (x + w, y, z), (x, y + height * .4, z)], leaves * (.7 + .1 * i), VEGETATION)
        else:
            dx, y = p.rng.uniform(-.6, .6) * wide, height * .75 + (i / 6 - .4) * wide * 1.1
            shade = .68 + .08 * i + .2 * p.sun * dx / wide
            p.oval(x + dx, y, wide * .62, wide * .55, z, leaves * shade, VEGETATION)


def barrier(p, x, z0, z1, label):
    """Along the street a WALL with joints and a coping, or a FENCE of posts and rails."""
    colour, height = pick(p.rng, FACADES), p.rng.uniform(1.2, 1.6 if label == FENCE else 2.6)
    parts = ((0, 1, .5), (.25, .4, 1), (.7, .85, 1)) if label == FENCE else ((0, 1, .9), (.45, .5, .6), (.9, 1, 1.2))
    for low, high, shade in parts:
        p.band((x, low * height), (x, high * height), z0, z1, colour * shade, label)
    for z in np.arange(z0, min(z1, 25), .8) if label == FENCE else ():
        p.poly([(x, 0, z), (x, 0, z + .25), (x, height * 1.08, z + .25), (x, height * 1.08, z)], colour, label)


def post(p, x, z, kind):
    """A street lamp, a traffic light, or a sign: forbidding, ordering, warning or guiding."""
    steel, y = (92, 96, 104), 4.6 if kind == "lamp" else 2.8
    p.rect(x - .11, x + .11, 0, y, z, steel, POLE)
    if kind == "lamp":
        arm = -1.4 * np.sign(x)
        p.rect(min(x, x + arm), max(x, x + arm), y - .12, y + .08, z, steel, POLE)
        p.oval(x + arm, y - .15, .42, .2, z, (255, 225, 160) if p.dark else (225, 228, 230), POLE, 1)
    elif kind == "light":
        p.rect(x - .4, x + .4, 2.3, 4.3, z, (34, 36, 38), LIGHT)
        on = p.rng.integers(3)
        for i, colour in enumerate([(40, 235, 110), (255, 190, 30), (255, 45, 35)]):
            p.oval(x, 2.64 + .66 * i, .27, .27, z, np.array(colour) * (1 if i == on else .25), LIGHT, i == on)
    else:
        red, blue, green = (215, 25, 35), (25, 80, 180), (20, 110, 70)
        rim, face = {"round": [(red, WHITE), (WHITE, blue)], "warning": [(red, WHITE), (red, (250, 200, 40))],
                     "board": [(WHITE, green), (WHITE, blue)]}[kind][p.rng.integers(2)]
        for r, colour in ((.65, rim), (.42, face)):
            if kind == "round":
                p.oval(x, y, r, r, z, colour, SIGN)
            elif kind == "warning":
                p.poly([(x - 1.1 * r, y - .8 * r, z), (x + 1.1 * r, y - .8 * r, z), (x, y + 1.2 * r, z)], colour, SIGN)
            else:
                p.rect(x - r - .3, x + r + .3, y - r + .1, y + r - .1, z, colour, SIGN)


def person(p, x, z):
    rng, step, s = p.rng, p.rng.uniform(.05, .3), p.rng.uniform(.85, 1.1)
    coat, trousers = pick(rng, PAINT), pick(rng, [(45, 55, 85), (35, 35, 40), (120, 105, 85)])
    p.oval(x, 0, .5, .12, z, TYRE, None)
    for way in (-1, 1):
        p.poly([(x + way * .2 * s, .85 * s, z), (x - way * .02, .85 * s, z), (x + way * (step - .1), 0, z),
                (x + way * (step + .12), 0, z)], trousers * (1 + .15 * way), PERSON)
    p.oval(x, 1.15 * s, .33 * s, .45 * s, z, coat, PERSON)
    p.oval(x, 1.66 * s, .18 * s, .2 * s, z, pick(rng, SKIN), PERSON)


def cycle(p, x, z, label, ridden):
    """A BICYCLE or a MOTORCYCLE from the side or askew, parked or with its rider."""
    motor, turn = label == MOTORCYCLE, p.rng.choice([-1, 1]) * p.rng.uniform(.5, 1.2)
    colour, coat = pick(p.rng, PAINT), pick(p.rng, PAINT)
    frame = [[(xa - .07, ya - .07), (xa + .07, ya + .07), (xb + .07, yb + .07), (xb - .07, yb - .07)] for xa, ya, xb, yb
             in ((-.62, .46, 0, .95), (0, .5, .5, 1), (-.1, 1, .5, 1), (.62, .46, .45, 1.25))]
    rider = [[(-.3, 1), (.25, .95), (.1, .3), (-.05, .3)], [(.2, 1.6), (.3, 1.4), (.55, 1.15)],
             [(-.42, .95), (-.02, .9), (.38, 1.5), (.1, 1.78), (-.2, 1.6)]]  # leg, arm, body
    p.oval(x, 0, abs(turn), .15, z, TYRE, None)
    for end in (-.62 * turn, .62 * turn):
        p.oval(x + end, .46, .46 * abs(turn), .46, z, TYRE, label)
        p.oval(x + end, .46, .3 * abs(turn), .3, z, (150, 152, 156), label)
    if motor:
        p.oval(x + turn * .05, .75, .55 * abs(turn), .3, z, colour, label)
        p.oval(x + turn * .66, 1, .14, .14, z, (255, 240, 200), label, 1)
    for corners, paint, kind in [(c, colour, label) for c in frame] + [(c, coat, RIDER) for c in rider * ridden]:
        p.poly([(x + turn * dx, y, z) for dx, y in corners], paint, kind)
    if ridden:
        p.oval(x + turn * .25, 1.9, .2, .22, z, pick(p.rng, PAINT if motor else SKIN), RIDER)


def vehicle(p, x, z, label, front):
    """A CAR, TRUCK, BUS or TRAIN (a tram), from the front or from behind."""
    rng, colour, w = p.rng, pick(p.rng, PAINT), p.rng.uniform(.88, 1) if label == CAR else 1.25
    length = {CAR: 4, TRUCK: 8, BUS: 9, TRAIN: 18}[label]
    p.poly([(x + dx, 0, z + dz) for dx, dz in ((-w - .1, -.3), (w + .1, -.3), (w + .1, length), (-w - .1, length))],
           TYRE, None)
    if label == CAR:
        back = z + (1.1 if front else rng.uniform(.1, .6))
        side = p.box(x, 2 * w, .28, .88, z, z + 4, colour, CAR)
        p.box(x, 1.84 * w, .86, rng.uniform(1.4, 1.8), back, back + 2.5, GLASS, CAR, top=colour, inset=.2)
        p.rect(x - .26, x + .26, .44, .6, z, WHITE, CAR)
    elif label == TRUCK:
        load = pick(rng, PAINT)
        side = p.box(x, 2 * w, .4, 3.3, z + 2.3 * front, z + 6 + 2 * front, load, TRUCK)
        if front:
            p.box(x, 2 * w, .4, 2.5, z, z + 2.2, colour, TRUCK)
            p.rect(x - 1.05, x + 1.05, 1.5, 2.3, z, GLASS, TRUCK)
        else:
            p.rect(x - .05, x + .05, .8, 3.2, z, load * .6, TRUCK)
    else:
        side = p.box(x, 2 * w, .3, 3, z, z + length, colour, label)
        p.panes((side, z), (side, z + length), 1.2, 2.6, 5, 1, GLASS, label, p.dark, .1)
        p.rect(x - 1.08, x + 1.08, 1.35, 2.4, z, LAMP if p.dark else GLASS, label, .3)
        p.rect(x - .8, x + .8, 2.5, 2.8, z, (250, 170, 40), label, .3)
        if label == TRAIN:
            p.rect(x - w, x + w, .85, 1.15, z, WHITE, label)
            p.poly([(x - .7, 3.6, z), (x + .7, 3.6, z), (x, 3, z)], GLASS, label)
    angles = np.linspace(0, 2 * np.pi, 9)
    for middle in (z + .18 * length, z + .82 * length):
        p.poly([(side, .34 + .34 * np.sin(a), middle + .36 * np.cos(a)) for a in angles], TYRE, label)
    for way in (-.8, .8):
        x0, x1 = x + w * (way - .17), x + w * (way + .17)
        p.rect(x0, x1, 0, .45, z, TYRE, label)
        p.rect(x0, x1, .55, .8, z, (255, 244, 205) if front else (225, 30, 25), label, 1)


def scene(seed, size=SIZE):
    """One street scene: image (H, W, 3) uint8 RGB and its exact mask (H, W) uint8 of class ids.

    seed: a whole number >= 0 or a sequence of them; the same seed and size always give the same bytes.
    """
    if min(size) < 16:
        raise ValueError(f"a scene needs at least 16x16 pixels, got {size[0]}x{size[1]} (height x width)")
    rng = np.random.default_rng(seed)
    p = Painter(rng, size)
    place = rng.choice(["city", "suburb", "country"], p=[.5, .3, .2])
    city, country = place == "city", place == "country"
    half, pavement = rng.uniform(2.9, 4.8), 0 if country else rng.uniform(1.6, 3.2)
    sky(p)
    far_away(p, city)
    street(p, half, pavement, city)

    behind, ahead = [], []  # (z, what to draw, its arguments): beyond the pavements, and on the street
    for way in (-1, 1):
        edge, z = half + pavement + .4, rng.uniform(2.5, 7)
        while z < 55:  # the row of buildings and trees along this side
            length = rng.uniform(7, 15)
            if rng.random() < {"city": .85, "suburb": .55, "country": .12}[place]:
                width, setback = (25, rng.uniform(0, .8)) if city else (8, rng.uniform(2, 6))
                behind.append((z, building, way * (edge + setback + width / 2), width, z, z + length - .5, not city))
            else:
                for at in rng.uniform(z, z + length, rng.integers(1, 4)):
                    behind.append((at, tree, way * (edge + rng.uniform(1.5, 9)), at))
            z += length
        if rng.random() < (.3 if city else .55):
            z = rng.uniform(4, 14)
            behind.append((0, barrier, way * edge, z, z + rng.uniform(10, 40), rng.choice([WALL, FENCE])))
        for z in rng.uniform((8, 13, 22), (11, 20, 40)):
            kind = rng.choice(["lamp", "light", "round", "warning", "board"], p=[.4, .25, .15, .12, .08])
            if rng.random() < (.35 if country else .6):
                ahead.append((z, post, way * (half + .45), z, kind))
        if pavement:
            for z in rng.uniform(7.5, 20, rng.poisson(1.5)):
                ahead.append((z, person, way * (half + rng.uniform(.4, pavement)), z))
            for z in rng.uniform(7.5, 15, rng.poisson(.35)):
                ahead.append((z, cycle, way * (half + .7), z, rng.choice([BICYCLE, MOTORCYCLE]), False))
            if rng.random() < .4:
                ahead += [(z, tree, way * (half + pavement * .6), z) for z in rng.uniform(9, 16) + np.arange(0, 40, 12)]
        z = rng.uniform(8, 15)
        while z < 60:  # the traffic keeps to the right: in the left lane it comes towards the camera
            label = rng.choice([CAR, TRUCK, BUS, CAR if country else TRAIN, BICYCLE, MOTORCYCLE],
                               p=[.64, .08, .07, .07, .07, .07])
            x = way * half * .5 + rng.uniform(-.25, .25)
            if label in (BICYCLE, MOTORCYCLE):
                ahead.append((z, cycle, x + way * .3, z, label, True))
            else:
                z += 2 * (label != CAR)
                ahead.append((z, vehicle, x, z, label, way < 0))
            z += {TRUCK: 9, BUS: 10, TRAIN: 20}.get(label, 5) + rng.uniform(1, 14)
    if pavement and rng.random() < .25:  # somebody crosses
        z = rng.uniform(6.8, 8)
        ahead += [(z, person, x, z) for x in rng.uniform(-half, half, rng.integers(1, 4))]
    for layer in behind, ahead:
        for _, draw, *args in sorted(layer, key=lambda item: -item[0]):
            draw(p, *args)
    return finish(p)


def finish(p):
    """Average the colours down, pick ids at the centres of pixels, then add grain, the light of the hour and lamps."""
    image, lamps = (p.canvases[i].reduce(SCALE) for i in (0, 2))
    large = np.asarray(p.canvases[1])
    ids = large[SCALE // 2::SCALE, SCALE // 2::SCALE].copy()
    strength = np.array([GRAIN.get(label, (0, 0)) for label in range(19)])[ids]
    grain = strength[..., 0] * p.rng.normal(0, 1, p.size) + strength[..., 1] * noise(p.rng, p.size, 20)
    near, wide = (np.asarray(lamps.filter(ImageFilter.GaussianBlur(p.size[0] * r))) / 255 for r in (.02, .08))
    light = np.minimum(TIMES[p.time][4] + near + 3 * wide, 1)
    open_sky = np.asarray(Image.fromarray((large == SKY).astype(np.uint8) * 255).reduce(SCALE))[..., None] / 255
    light = light + (1 - light) * open_sky  # the sky has its own light
    image = np.asarray(image) / 255 * (1 + grain[..., None]) * light + .3 * np.asarray(lamps) / 255 + .4 * near
    return (image.clip(0, 1) * 255).round().astype(np.uint8), ids


def prepare(out, train=1000, val=100, test=100, size=SIZE, seed=0):
    """Draw the three splits and write them to the folder `out`."""
    if min(train, val, test, seed) < 0:
        raise ValueError(f"train, val, test and seed must be 0 or more, got {train}, {val}, {test} and {seed}")
    splits, n = {}, 0
    for k, (split, count) in enumerate((("train", train), ("val", val), ("test", test))):
        splits[split] = [(f"toy_{n + i:05d}", partial(scene, [seed, k, i], size)) for i in range(count)]
        n += count
    write_dataset(out, Colorbook.load(Path(__file__).parents[2] / "colorbook.json"), splits)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/toy/prepared"), help="default: %(default)s")
    for split, count in (("train", 1000), ("val", 100), ("test", 100)):
        parser.add_argument(f"--{split}", type=int, default=count, metavar="N", help="scenes; default: %(default)s")
    parser.add_argument("--size", type=parse_size, default=SIZE, metavar="HxW",
                        help=f"height x width; default: {SIZE[0]}x{SIZE[1]}")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    command(lambda: prepare(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
