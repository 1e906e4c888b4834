"""From a config to a network, and from a run to a file and back, whatever happens in between."""

import errno
import os
import shutil
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from checkpoint import (
    build,
    join_processes,
    load_checkpoint,
    pick_device,
    pick_precision,
    random_state,
    set_random_state,
    replacing,
    save_checkpoint,
)
from config import load_config
from train import train

LEARNED = ("model", "ema", "optimizer", "scaler", "rng", "step", "images")
SMALL = {"data__size": [8, 8], "model__hidden_dim": 4, "model__emb_dim": 8, "diffusion__T": 20, "train__batch_size": 2,
         "train__val_every": 999, "train__preview_every": 999, "train__log_every": 999, "train__val_pairs": 2,
         "train__previews": 1}
CPU = torch.device("cpu")


def equal(a, b):
    """Equality to the bit of nested dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_same_run(a, b):
    for key in LEARNED:
        assert equal(a[key], b[key]), key


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def config(**settings):
    return load_config("config.yaml", "toy", [f"{key.replace('__', '.')}={value}" for key, value in settings.items()])


def small_run(root, out, steps, **more):
    """The config of a run of a second that saves at every second step."""
    own = {"device": "cpu", "data__root": root, "out": out, "train__steps": steps, "train__save_every": 2}
    return config(**SMALL | own | more)


@pytest.fixture(scope="module")
def finished(flat_root, tmp_path_factory):
    """A folder of two runs that were never stopped: run_4 and run_6 have as many steps."""
    folder = tmp_path_factory.mktemp("runs")
    for steps in 4, 6:
        train(small_run(flat_root, folder / f"run_{steps}", steps))
    return folder


@pytest.fixture
def run(flat_root, tmp_path):
    """run(steps, **settings): the config of `trained`, to go on with."""
    return lambda steps, out="run", **more: small_run(flat_root, tmp_path / out, steps, **more)


@pytest.fixture
def trained(finished, tmp_path):
    """The folder of a run of four steps: checkpoint.pt of step 4, *.previous of step 2."""
    return Path(shutil.copytree(finished / "run_4", tmp_path / "run"))


@pytest.fixture
def small_state():
    """small_state(step) is a complete checkpoint of an untrained network."""
    cfg = config(**SMALL)
    model, _, _ = build(cfg, 2, CPU)
    weights = model.state_dict()
    return lambda step: {"model": weights, "ema": weights, "config": cfg, "step": step,
                         "colorbook": {"road": [1, 2, 3], "sky": [4, 5, 6]}}


# ------------------------------------------------------------------------------------------------- replacing


class Killed(BaseException):
    """A process that is killed: nothing of it runs after this, not even what cleans up."""


def kill_at(monkeypatch, call):
    """Kill the process in place of the given call of os.replace (0 is the first); returns the names renamed so far."""
    renamed, real = [], os.replace

    def dead(*_, **__):
        raise Killed

    def replace(source, target):
        if len(renamed) == call:
            monkeypatch.setattr(Path, "unlink", dead)
            dead()
        real(source, target)
        renamed.append(Path(target).name)

    monkeypatch.setattr(os, "replace", replace)
    return renamed


def test_replacing_gives_the_whole_file(tmp_path):
    """At the end the file has the new content and nothing lies beside it; until then the old one stands there."""
    path = tmp_path / "a b.txt"
    for old, new in (None, b"one"), (b"one", b"two"):
        with replacing(path) as file:
            file.write(new)
            assert (path.read_bytes() if path.exists() else None) == old
        assert files(tmp_path) == {"a b.txt": new}


def full_disk(file):
    raise OSError(errno.ENOSPC, "No space left on device")


def ctrl_c(file):
    raise KeyboardInterrupt


def mistake(file):
    raise ValueError("no such colour")


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("stop", [full_disk, ctrl_c, mistake])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, stop, keep):
    """An error, Ctrl-C or a full disk in the middle of a write leaves the old file, or none, and no half one."""
    for old in {}, {"log.csv": b"old"}:
        for name, content in old.items():
            (tmp_path / name).write_bytes(content)
        with pytest.raises((OSError, KeyboardInterrupt, ValueError)):
            with replacing(tmp_path / "log.csv", keep) as file:
                file.write(b"half")
                stop(file)
        assert files(tmp_path) == old


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failure_at_the_end_of_a_write_leaves_the_old_file(tmp_path, monkeypatch, name):
    """A disk that fails when the file is synced or renamed leaves the old file and no half one."""
    path = tmp_path / "log.csv"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, name, full_disk if name == "fsync" else lambda source, target: full_disk(source))
    with pytest.raises(OSError, match="No space"):
        with replacing(path) as file:
            file.write(b"new")
    assert files(tmp_path) == {"log.csv": b"old"}


def test_a_missing_folder_is_an_error_that_names_the_file(tmp_path):
    """Writing into a folder that is gone names the path."""
    with pytest.raises(FileNotFoundError, match=r"gone.*a\.txt"):
        with replacing(tmp_path / "gone" / "a.txt"):
            pass


@pytest.mark.skipif(os.name != "posix", reason="folders cannot be synced here")
@pytest.mark.parametrize("keep", [False, True])
def test_the_file_is_synced_before_and_the_folder_after_the_renaming(tmp_path, monkeypatch, keep):
    """A power cut finds the old file or the new one: content on disk before the name, and the name before going on."""
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")
    events, real = [], os.fsync

    def fsync(descriptor):
        synced = os.fstat(descriptor)
        if stat.S_ISDIR(synced.st_mode):
            assert os.path.samestat(synced, os.stat(tmp_path))
            events.append(("folder", path.read_bytes()))
        else:
            events.append((f"file of {synced.st_size} bytes", path.read_bytes()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with replacing(path, keep) as file:
        file.write(b"newer")
    assert events == [("file of 5 bytes", b"old"), ("folder", b"newer")]


# ------------------------------------------------------------------------------------------------------ save


def test_two_checkpoints_are_kept(tmp_path, small_state):
    """The last checkpoint is checkpoint.pt, the one before it checkpoint.pt.previous, and nothing else is there."""
    path = tmp_path / "checkpoint.pt"
    for step in 1, 2, 3:
        save_checkpoint(path, small_state(step))
    assert files(tmp_path).keys() == {"checkpoint.pt", "checkpoint.pt.previous"}
    assert load_checkpoint(path)["step"] == 3 and load_checkpoint(f"{path}.previous")["step"] == 2


def test_a_checkpoint_comes_back_to_the_bit(tmp_path, small_state):
    """What is loaded is what was saved, and says which file it is from."""
    state = small_state(5) | {"rng": {"cpu": torch.get_rng_state()}, "note": [1, 2.5, "ä", None]}
    save_checkpoint(tmp_path / "a.pt", state)
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert loaded["path"] == tmp_path / "a.pt"
    assert all(equal(loaded[key], state[key]) for key in state)


def test_loaded_weights_go_into_the_network_that_is_there(tmp_path, small_state):
    """Loading fills the parameters that an optimizer already holds, with their layout and kind, and replaces none."""
    save_checkpoint(tmp_path / "a.pt", small_state(1))
    state = load_checkpoint(tmp_path / "a.pt")
    for weights in "model", "ema":
        model = build(config(**SMALL), 2, CPU)[0].double()
        before = list(model.parameters())
        model.load_state_dict(state[weights])
        assert all(new is old and new.dtype == torch.float64 for new, old in zip(model.parameters(), before))
        assert torch.equal(model.out.weight, state[weights]["out.weight"].double())


@pytest.mark.parametrize("call", [0, 1, 2])
def test_a_kill_while_saving_leaves_a_complete_checkpoint(tmp_path, small_state, monkeypatch, call):
    """Killed before, between or after the renames of a save, the last checkpoint or the new one loads."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, small_state(1))
    save_checkpoint(path, small_state(2))
    with monkeypatch.context() as patch:
        renamed = kill_at(patch, call)
        try:
            save_checkpoint(path, small_state(3))
        except Killed:
            pass
    assert len(renamed) == call
    assert load_checkpoint(path)["step"] == [2, 2, 3][call]
    save_checkpoint(path, small_state(4))
    assert load_checkpoint(path)["step"] == 4


def test_a_full_disk_while_saving_keeps_both_checkpoints(tmp_path, small_state):
    """A save that the disk has no room for is an OSError that names the file; what was there stays."""
    resource = pytest.importorskip("resource")  # a limit on the size of files fails as a full disk does
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, small_state(1))
    save_checkpoint(path, small_state(2))
    before, limits = files(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            save_checkpoint(path, small_state(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in str(error.value) and "disk" in str(error.value)
    assert len(before["checkpoint.pt"]) > 20_000 and files(tmp_path) == before


# ------------------------------------------------------------------------------------- a damaged newest checkpoint


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
        return
    if how == "bit":
        content[content.index(b"PK\x01\x02") // 2] ^= 16
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "bit": content}[how])


@pytest.mark.parametrize("how", ["cut", "empty", "gone", "bit"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(trained, finished, run, how, capsys):
    """Resuming after damage ends, to the bit, where the run would have; the damaged file is set aside."""
    path = trained / "checkpoint.pt"
    damage(path, how)
    damaged = path.read_bytes() if path.exists() else None
    train(run(6, train__save_every=4), resume=True)  # saves at steps 4 and 6
    assert f"{path}.previous: used instead" in capsys.readouterr().out
    assert_same_run(load_checkpoint(finished / "run_6" / "checkpoint.pt"), load_checkpoint(path))
    assert load_checkpoint(f"{path}.previous")["step"] == 4
    aside = trained / "checkpoint.pt.damaged"
    assert (aside.read_bytes() if aside.exists() else None) == damaged


@pytest.mark.parametrize("how", ["cut", "gone"])
def test_the_only_good_checkpoint_is_never_lost(trained, run, how, monkeypatch):
    """Killed at any rename after a fall back, of all of a resumed run, a complete checkpoint still loads."""
    damage(trained / "checkpoint.pt", how)
    backup, steps = trained.with_name("backup"), []
    shutil.copytree(trained, backup)
    for call in range(20):
        shutil.rmtree(trained)
        shutil.copytree(backup, trained)
        with monkeypatch.context() as patch:
            renamed = kill_at(patch, call)
            try:
                train(run(4), resume=True)
            except Killed:
                pass
        assert len(renamed) <= call
        steps.append(load_checkpoint(trained / "checkpoint.pt")["step"])
        if len(renamed) < call:  # it was not killed any more
            break
    assert renamed[-1] == "checkpoint.pt" and "checkpoint.pt.previous" not in renamed
    assert ("checkpoint.pt.damaged" in renamed) == (how != "gone")
    assert steps == sorted(steps) and steps[0] == 2 and steps[-1] == 4


def test_the_one_before_is_used_for_sampling_and_its_path_is_told(trained, capsys):
    """load_checkpoint() prints why it falls back and to what; it changes no file."""
    damage(trained / "checkpoint.pt", "cut")
    before = files(trained)
    state = load_checkpoint(trained / "checkpoint.pt")
    assert state["step"] == 2 and state["path"] == trained / "checkpoint.pt.previous" and files(trained) == before
    out = capsys.readouterr().out
    assert f"{trained / 'checkpoint.pt'}: not a checkpoint of this project, or a damaged one" in out
    assert f"{trained / 'checkpoint.pt.previous'}: used instead" in out


def test_two_damaged_checkpoints_are_an_error(trained, run):
    """Where none is left the error names a file, and nothing is renamed or begun again."""
    for name in "checkpoint.pt", "checkpoint.pt.previous":
        damage(trained / name, "cut")
    before = files(trained).keys()
    with pytest.raises(ValueError, match=r"checkpoint\.pt.*damaged one"):
        train(run(4), resume=True)
    assert files(trained).keys() - {".lock"} == before - {".lock"}


# ----------------------------------------------------------------------------------------------------- resume


def test_resume_refuses_another_network(trained, run):
    """Another network or diffusion is refused with the setting, its old and its new value."""
    for settings, words in (({"model__hidden_dim": 8}, "model.hidden_dim was 4, is 8"),
                            ({"model__attention": True}, "model.attention was False, is True"),
                            ({"diffusion__prediction": "eps"}, "diffusion.prediction was v, is eps")):
        with pytest.raises(ValueError, match=words):
            train(run(6, **settings), resume=True)
    assert load_checkpoint(trained / "checkpoint.pt")["step"] == 4


@pytest.mark.parametrize("change, word", [
    (lambda classes: dict(reversed(classes.items())), "person"),  # the same classes, but other ids
    (lambda classes: {"street" if name == "road" else name: rgb for name, rgb in classes.items()}, "street"),
    (lambda classes: classes | {"sky": [0, 0, 1]}, r"\[0, 0, 1\]")])
def test_resume_refuses_other_classes(trained, run, change, word):
    """Other names, colours or order of the classes are refused, and the first one that differs is named."""
    path = trained / "checkpoint.pt"
    state = load_checkpoint(path)
    del state["path"]
    save_checkpoint(path, state | {"colorbook": change(state["colorbook"])})
    with pytest.raises(ValueError, match=f"colorbook.*{word}"):
        train(run(6), resume=True)


def test_resume_prints_what_changed(trained, run, capsys):
    """A setting that is another than before is printed with both values, and one that stayed is not."""
    train(run(6, train__lr=0.125, data__flip=0.25), resume=True)
    out = capsys.readouterr().out
    assert "train.lr was 0.002, is 0.125" in out and "data.flip was 0.5, is 0.25" in out
    assert "train.steps was 4, is 6" in out and "train.beta2" not in out


def test_resume_of_a_checkpoint_without_an_optimizer_says_so(trained, run):
    """A checkpoint that was reduced for publishing samples, and resuming it names what is missing."""
    path = trained / "checkpoint.pt"
    state = load_checkpoint(path)
    for key in "path", "optimizer", "rng":
        del state[key]
    save_checkpoint(path, state)
    assert load_checkpoint(path)["step"] == 4
    with pytest.raises(ValueError, match=r"checkpoint\.pt.*optimizer, rng"):
        train(run(6), resume=True)


def test_checkpoints_of_older_versions_go_on(trained, finished, run):
    """Without a format number, a count of images or a newer setting, a checkpoint goes on as if it had them.

    The images are counted by the batch size that the checkpoint was trained with, whatever it goes on with.
    """
    path = trained / "checkpoint.pt"
    state = load_checkpoint(path)
    for key in "path", "format", "images":
        del state[key]
    del state["config"]["sample"]["guidance"], state["config"]["train"]["hold"]
    torch.save(state, path)
    train(run(6), resume=True)
    state = load_checkpoint(path)
    assert_same_run(load_checkpoint(finished / "run_6" / "checkpoint.pt"), state)
    assert state["images"] == 12
    del state["path"], state["images"]
    torch.save(state, path)
    train(run(7, train__batch_size=4), resume=True)
    assert load_checkpoint(path)["images"] == 12 + 4


# ------------------------------------------------------------------------------------------------ random states


def test_the_random_state_of_the_cpu_goes_on():
    """Restoring a random state gives the same numbers again."""
    torch.manual_seed(3)
    state = random_state(CPU)
    numbers = torch.randn(5)
    set_random_state(CPU, state)
    assert state.keys() == {"cpu"} and torch.equal(torch.randn(5), numbers)


@pytest.mark.parametrize("name", ["mps", "cuda"])
def test_the_random_state_of_the_device_is_saved_too(monkeypatch, name):
    """Apple's and NVIDIA's generators are stored beside the CPU's and set again; one that was not saved is left."""
    device = SimpleNamespace(state=torch.tensor([1, 2, 3], dtype=torch.uint8))
    monkeypatch.setattr(torch, name, SimpleNamespace(
        get_rng_state=lambda: device.state, set_rng_state=lambda state: setattr(device, "state", state)))
    saved = random_state(torch.device(name))
    assert saved.keys() == {"cpu", name} and torch.equal(saved[name], torch.tensor([1, 2, 3], dtype=torch.uint8))
    device.state = torch.tensor([9], dtype=torch.uint8)
    set_random_state(torch.device(name), {"cpu": saved["cpu"]})  # from a run on a CPU
    assert device.state.tolist() == [9]
    set_random_state(torch.device(name), saved)
    assert device.state.tolist() == [1, 2, 3]


# ------------------------------------------------------------------------------------------------------- build


def test_every_setting_of_the_model_arrives():
    """Width, embedding, attention and classes give the network of these sizes; 90,816,131 parameters in the paper's."""
    model, _, _ = build(config(model__hidden_dim=6, model__emb_dim=10), 5, CPU)
    assert model.image_stem.net[0].weight.shape[:2] == (6, 3) and model.mask_stem.net[0].weight.shape[:2] == (6, 5)
    assert model.emb_dim == 10 and model.num_classes == 5
    paper = load_config("config.yaml", "bdd100k", ["model.attention=true"])
    assert sum(p.numel() for p in build(paper, 19, torch.device("meta"))[0].parameters()) == 90_816_131


def test_every_setting_of_the_diffusion_arrives():
    """T, schedule, betas and prediction are those of the config: here a line of seven betas."""
    cfg = config(diffusion__T=7, diffusion__schedule="linear", diffusion__beta_start=0.1, diffusion__beta_end=0.7,
                 diffusion__prediction="eps")
    _, diffusion, _ = build(cfg, 2, CPU)
    betas = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], dtype=torch.float64)
    assert torch.allclose(diffusion.alpha_bar, torch.cumprod(1 - betas, 0))
    assert diffusion.T == 7 and diffusion.prediction == "eps"


def test_the_baseline_has_no_mask_stem():
    """model.conditional=false builds a network that takes no mask."""
    model, _, _ = build(config(**SMALL, model__conditional=False), 4, CPU)
    assert model.num_classes == 0 and not [key for key in model.state_dict() if "mask" in key]
    assert model(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.long)).shape == (1, 3, 8, 8)


def test_convolutions_are_channels_last():
    """Every weight of a convolution has the layout that they are fastest in."""
    model, _, _ = build(config(**SMALL), 4, CPU)
    weights = [p for p in model.parameters() if p.dim() == 4]
    assert len(weights) > 20 and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


@pytest.mark.parametrize("instructions, precision, why", [
    ({"amx_bf16": True, "avx512_bf16": False}, "bf16", "amx_bf16"), ({"avx512_bf16": True}, "bf16", "avx512_bf16"),
    ({"avx512_bf16": False}, "fp32", "no bf16"), (None, "fp32", "no bf16")])
def test_the_precision_of_a_cpu(instructions, precision, why, monkeypatch, capsys):
    """auto is bf16 where torch names instructions for it, and fp32 where it names none or has no such query."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    if instructions is not None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    assert pick_precision("auto", CPU) == precision
    text = capsys.readouterr().out
    assert text.startswith(f"precision {precision}: ") and why in text
    assert [pick_precision(name, CPU) for name in ("fp32", "bf16")] == ["fp32", "bf16"]


@pytest.mark.parametrize("native, precision", [(True, "bf16"), (False, "fp16")])
def test_the_precision_of_a_gpu(native, precision, monkeypatch):
    """auto is bf16 on a GPU that multiplies it, not where CUDA only emulates it; else fp16; fp32 on Apple's."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: asked.append(options) or native)
    assert pick_precision("auto", torch.device("cuda", 0)) == precision
    assert asked == [{"including_emulation": False}]
    assert pick_precision("auto", torch.device("mps")) == "fp32"


def test_a_run_keeps_its_precision(tiny, monkeypatch):
    """The precision that auto stood for is saved with the run, and training resumes with it on another machine."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    cfg = tiny(train__precision="auto", train__steps=2)
    train(cfg)
    saved = load_config(Path(cfg["out"], "config.yaml"))
    assert saved["train"]["precision"] == load_checkpoint(Path(cfg["out"], "checkpoint.pt"))[
        "config"]["train"]["precision"] == "bf16"


@pytest.mark.parametrize("precision, dtype", [
    ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision_is_that_of_autocast(precision, dtype):
    """Inside of autocast() the network computes in the precision of the config; its weights stay float32."""
    model, _, autocast = build(config(**SMALL, train__precision=precision), 4, CPU)
    for _ in range(2):  # it can be opened again
        with autocast():
            assert model(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.long)).dtype == dtype
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# ------------------------------------------------------------------------------------------- device, processes


@pytest.mark.parametrize("cuda, mps, auto", [(True, True, "cuda:0"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_takes_the_fastest_device(monkeypatch, cuda, mps, auto):
    """auto is cuda, then mps, then cpu; a device that is asked for and not there is refused by its name."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert str(pick_device("auto")) == auto and str(pick_device("cpu")) == "cpu"
    for name, there in ("cuda", cuda), ("mps", mps):
        if there:
            assert pick_device(name).type == name
            continue
        with pytest.raises(ValueError, match=f"device.*{name}.*cpu"):
            pick_device(name)


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch):
    """torchrun's LOCAL_RANK is the number of the GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert str(pick_device("cuda")) == str(pick_device("auto")) == "cuda:3"


@pytest.mark.parametrize("ranks", [None, "1"])
def test_one_process_forms_no_group(monkeypatch, ranks):
    """Started alone, with or without torchrun, a process is the first of one and goes on printing."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("WORLD_SIZE", ranks)
    out = sys.stdout
    assert join_processes(CPU) == (0, 1) and not dist.is_initialized() and sys.stdout is out


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_wait_for_hours_and_only_the_first_prints(monkeypatch, rank, capsys):
    """The group has a CPU side and waits longer than reading the data can take; the other processes print nothing."""
    groups = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # given back afterwards
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: groups.append((backend, timeout)))
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    assert join_processes(CPU) == (rank, 2)
    print("hello")
    (backend, timeout), = groups
    assert "gloo" in backend and timeout.total_seconds() >= 24 * 3600
    assert capsys.readouterr().out == ("" if rank else "hello\n")


@pytest.mark.parametrize("change", ["newer", "unreadable"])
def test_what_is_not_damaged_is_not_replaced_by_the_previous_one(tmp_path, small_state, monkeypatch, change):
    """A checkpoint of a newer program, or one that may not be read, is an error; the previous one does not stand in."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, small_state(1))
    if change == "newer":
        monkeypatch.setattr("checkpoint.FORMAT", 2)
    save_checkpoint(path, small_state(2))
    monkeypatch.undo()
    if change == "unreadable":
        def refuse(*_):
            raise PermissionError(13, "Permission denied", str(path))
        monkeypatch.setattr("checkpoint.zipfile.ZipFile", refuse)
    before = files(tmp_path)
    with pytest.raises((ValueError, PermissionError), match="format 2 is newer|Permission denied"):
        load_checkpoint(path)
    assert files(tmp_path) == before
