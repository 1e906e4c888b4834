"""IDD-Lite (Indian Driving Dataset, 7 classes) to the common folder shape, split by drive.

    python -m data.idd_lite.prepare --source idd20k_lite

expects the official download: leftImg8bit/{train,val}/<drive>/<id>_image.jpg, 320x227, and
gtFine/{train,val}/<drive>/<id>_label.png with ids 0..6 and 255 for void. Frames of one drive look alike, so whole
drives are held out: every tenth drive of train becomes val; the official val becomes test, and where the download has
none, every tenth drive, counted from the sixth, does.
"""

from data.common import prepare_command, write_dataset
from dataset import fit_pair, list_files, match_pairs, read_image
from masks import Colorbook, read_mask

CLASSES = {
    "drivable": [128, 64, 128],
    "non-drivable": [244, 35, 232],
    "living things": [220, 20, 60],
    "vehicles": [0, 0, 142],
    "roadside objects": [220, 190, 40],
    "far objects": [70, 70, 70],
    "sky": [70, 130, 180],
}


def prepare(source, out, size, crop):
    colorbook = Colorbook(CLASSES)
    drives = {}  # (official split, drive): its pairs
    for split in ("train", "val"):
        folder, labelled = source / "leftImg8bit" / split, source / "gtFine" / split
        if split == "train" and not (folder.is_dir() and labelled.is_dir()):
            raise ValueError(f"{folder} and {labelled} are needed; --source is the folder of leftImg8bit and gtFine")
        for drive in sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else ():
            labels = list_files(labelled / drive, "_label") if (labelled / drive).is_dir() else {}
            labels = {stem: path for stem, path in labels.items() if not stem.endswith("_inst")}  # instances
            drives[split, drive] = match_pairs(list_files(folder / drive, "_image"), labels, folder / drive)
    splits = {"train": [], "val": [], "test": []}
    own_test = any(split == "val" for split, _ in drives)
    for n, ((split, drive), pairs) in enumerate(drives.items()):  # train's drives come first
        to = "train"
        if split == "val" or n % 10 == 5 and not own_test:
            to = "test"
        elif n % 10 == 0:
            to = "val"
        for stem, image, label in pairs:
            def make(image=image, label=label):
                return fit_pair(read_image(image), read_mask(label, colorbook)[0], size, crop, label)
            splits[to].append((f"{split}_{drive}_{stem}", make))
    write_dataset(out, colorbook, splits)


if __name__ == "__main__":
    prepare_command(prepare, __doc__, "idd_lite", size=(64, 64))
