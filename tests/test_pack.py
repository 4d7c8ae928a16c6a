"""Packing: any collection becomes the same shuffled shards, whatever the workers and whatever was killed on the way."""

import csv
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image, ImageOps
from PIL.ExifTags import Base as ExifTag
from sklearn.datasets import load_digits

from gandist.config import DataConfig
from gandist.data import open_dataset
from gandist.data.collections import Files, Samples, hold_out
from gandist.data.decode import decode
from gandist.data.pack import DIGITS_SHARDS, main, pack_digits, shard_names
from gandist.data.writer import FolderExists
from gandist.distributed import World
from gandist.errors import DataError
from tests.ranks import ROOT


def pack(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def info_of(folder: Path) -> dict:
    return json.loads((folder / "_info.json").read_text())


def samples_of(folder: Path, split: str) -> list[dict]:
    """By webdataset's own reader, after the checksums."""
    entry = info_of(folder)["splits"][split]
    shards = [folder / name for name in entry["filenames"]]
    assert [hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards] == entry["sha256"]
    samples = list(wds.WebDataset([str(shard) for shard in shards], shardshuffle=False))
    assert len(samples) == entry["num_samples"] == sum(entry["shard_lengths"])
    assert [sample["__key__"] for sample in samples] == sorted({sample["__key__"] for sample in samples})
    return samples


def content_of(sample: dict) -> bytes:
    (name,) = sample.keys() & {"png", "jpg", "webp"}
    return sample[name]


def labels_of(samples: list[dict]) -> list[int | None]:
    return [int(sample["cls"]) if "cls" in sample else None for sample in samples]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def colour(level: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    """A smooth RGB image that differs for each level."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 200, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, level % 256)], -1).astype(np.uint8))


def save(image: Image.Image, path: Path, form: str | None = None, **options: object) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, form, **options)
    return path.read_bytes()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """30 images in classes a, b, c of 15, 10 and 5."""
    folder = tmp_path / "photos"
    for number in range(30):
        save(colour(number), folder / "aaabbc"[number % 6] / f"{number}.png")
    return folder


def test_files_are_copied(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    rotated = Image.Exif()
    rotated[ExifTag.Orientation] = 6
    copied = {
        ("png", 0, save(colour(1), folder / "cat" / "a.png")),
        ("jpg", 0, save(colour(2), folder / "cat" / "deep" / "b.JPEG", exif=rotated)),
        ("webp", 0, save(colour(3), folder / "cat" / "c.webp")),
        ("png", 1, save(colour(4), folder / "dog" / "d.jpg", "png")),  # by its content
        ("jpg", 1, save(colour(5).convert("CMYK"), folder / "dog" / "e.jpg")),
        ("png", 1, save(colour(6).convert("L"), folder / "dog" / "f.png")),
    }
    save(colour(7), folder / "dog" / "g.bmp")
    for name in ("cat/.DS_Store", "cat/note.txt", "dog/Thumbs.db", "dog/._d.jpg", "README.txt"):
        (folder / name).write_bytes(b"no image")
    pack("folder", folder, tmp_path / "out")
    samples = samples_of(tmp_path / "out", "train")
    found = {(form, int(s["cls"]), s[form]) for s in samples for form in ("png", "jpg", "webp") if form in s}
    ((form, label, content),) = found - copied
    assert len(found & copied) == 6
    assert (form, label) == ("png", 1)
    assert (decode(content, 3) == np.asarray(colour(7))).all(), "what cannot be copied is lossless"
    info = info_of(tmp_path / "out")
    assert (info["name"], info["resolution"], info["channels"], info["classes"]) == ("out", 8, 3, ["cat", "dog"])
    assert info["splits"]["train"]["class_counts"] == [3, 4]


def test_skipped_files_are_counted(photos: Path, tmp_path: Path, capsys) -> None:
    for name in ("a/.DS_Store", "a/1.txt", "b/2.txt", "c/Makefile"):
        (photos / name).touch()
    pack("folder", photos, tmp_path / "out")
    text = capsys.readouterr().out
    assert "skipped 4 file(s) that are no images: 2 .txt, 1 hidden, 1 without suffix" in text
    assert f"data.train={tmp_path / 'out'} data.test=null data.resolution=8 data.channels=3 data.num_classes=3" in text


@pytest.mark.parametrize("form", ["png", "jpg"])
def test_one_size(tmp_path: Path, form: str) -> None:
    """Encoded anew: upright, square, RGB or grey."""
    folder, rotated = tmp_path / "photos", Image.Exif()
    rotated[ExifTag.Orientation] = 6
    image = colour(9, (48, 32))
    save(image, folder / "a" / "rotated.jpg", exif=rotated, quality=95)
    save(image, folder / "b" / "rotated.png", exif=rotated)
    save(image.convert("L"), folder / "c" / "grey.png")
    save(image.convert("CMYK"), folder / "d" / "cmyk.jpg", quality=95)
    pack("folder", folder, tmp_path / "out", "--resolution", 16, "--format", form)
    pack("folder", folder, tmp_path / "grey", "--resolution", 16, "--channels", 1, "--resize", "stretch")
    upright = image.transpose(Image.Transpose.ROTATE_270)
    expected = [upright, upright, image.convert("L").convert("RGB"), image]
    for sample in samples_of(tmp_path / "out", "train"):
        pixels = decode(sample[form], 3)
        square = ImageOps.fit(expected[int(sample["cls"])], (16, 16), Image.Resampling.LANCZOS)
        assert np.abs(pixels.astype(int) - np.asarray(square)).max() <= 12
    for sample in samples_of(tmp_path / "grey", "train"):
        whole = expected[int(sample["cls"])].resize((16, 16), Image.Resampling.LANCZOS).convert("L")
        assert np.abs(decode(sample["png"], 1)[..., 0].astype(int) - np.asarray(whole)).max() <= 12
        assert Image.open(io.BytesIO(sample["png"])).mode == "L"
    assert (info_of(tmp_path / "out")["resolution"], info_of(tmp_path / "out")["channels"]) == (16, 3)
    assert info_of(tmp_path / "grey")["channels"] == 1


def test_one_size_that_is_not_square(tmp_path: Path, capsys) -> None:
    """By the command, or because all files have it."""
    image = colour(9, (48, 32))
    for name in "ab":
        save(image, tmp_path / "photos" / name / "1.png")
    for name, options, resolution, recommended in (
        ("packed", ["--resolution", "16x32"], [16, 32], "'data.resolution=[16,32]'"),
        ("stretched", ["--resolution", "20x5", "--resize", "stretch"], [20, 5], "data.resolution=64"),
        ("copied", [], [32, 48], "'data.resolution=[32,48]'"),
        ("square", ["--resolution", "8x8"], 8, "data.resolution=8"),
    ):
        pack("folder", tmp_path / "photos", tmp_path / name, *options)
        text = capsys.readouterr().out
        assert info_of(tmp_path / name)["resolution"] == resolution
        assert ("data.resize=center-crop" in text) == (name == "stretched"), "no network makes images of 20x5"
        assert f" {recommended} " in text
    assert "; 8 px, 3 channel(s), 2 classes" in text
    middle = image.crop((0, 4, 48, 28)).resize((32, 16), Image.Resampling.LANCZOS)
    for name, expected in (
        ("packed", middle),
        ("stretched", image.resize((5, 20), Image.Resampling.LANCZOS)),
        ("copied", image),
    ):
        for sample in samples_of(tmp_path / name, "train"):
            assert (decode(sample["png"], 3) == np.asarray(expected)).all()


@pytest.mark.parametrize("size", ["0", "16x", "x16", "16x0", "16x32x64", "a"])
def test_what_is_no_size(tmp_path: Path, capsys, size: str) -> None:
    with pytest.raises(SystemExit):
        pack("digits", tmp_path / "d", "--resolution", size)
    assert f"{size!r} is no size: say 64, or 48x64 for images 48 pixels high" in capsys.readouterr().err


def test_splits_by_directories(photos: Path, tmp_path: Path, capsys) -> None:
    root = tmp_path / "all"
    shutil.copytree(photos, root / "train")
    shutil.copytree(photos / "b", root / "val" / "b")
    shutil.copytree(photos / "c", root / "test" / "c")
    pack("folder", root, tmp_path / "out")
    info = info_of(tmp_path / "out")
    counts = {split: entry["class_counts"] for split, entry in info["splits"].items()}
    assert counts == {"train": [15, 10, 5], "validation": [0, 10, 0], "test": [0, 0, 5]}
    assert info["splits"]["validation"]["filenames"] == ["out-validation-00000.tar"]
    assert f"data.test={tmp_path / 'out'}" in capsys.readouterr().out
    with pytest.raises(DataError, match="--hold-out makes a split test, but the images have one"):
        pack("folder", root, tmp_path / "other", "--hold-out", 0.5)


def test_unlabelled_images(tmp_path: Path, capsys) -> None:
    contents = {save(colour(number, (8 + number, 8)), tmp_path / "photos" / f"{number}.jpg") for number in range(12)}
    pack("folder", tmp_path / "photos", tmp_path / "out", "--shard-size", 5)
    samples = samples_of(tmp_path / "out", "train")
    assert {sample["jpg"] for sample in samples} == contents
    assert labels_of(samples) == [None] * 12
    info = info_of(tmp_path / "out")
    assert not info.keys() & {"classes", "resolution"}, "neither classes nor one size"
    assert info["splits"]["train"]["shard_lengths"] == [5, 5, 2]
    assert not info["splits"]["train"].keys() & {"class_counts", "unlabelled"}
    assert "data.num_classes=0" in capsys.readouterr().out
    with pytest.raises(DataError, match="no image is labelled"):
        pack("folder", tmp_path / "photos", tmp_path / "other", "--hold-out", 0.5)


def test_hold_out_is_stratified_and_disjoint(photos: Path, tmp_path: Path) -> None:
    pack("folder", photos, tmp_path / "out", "--hold-out", 0.2)
    train, test = (samples_of(tmp_path / "out", split) for split in ("train", "test"))
    assert {sample["png"] for sample in train}.isdisjoint(sample["png"] for sample in test)
    counts = {split: entry["class_counts"] for split, entry in info_of(tmp_path / "out")["splits"].items()}
    assert counts == {"train": [12, 8, 4], "test": [3, 2, 1]}


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1, 0.25, 0.29, 1 / 3, 0.5, 0.9, 0.999])
def test_hold_out_takes_the_share_of_each_class(fraction: float) -> None:
    labels = np.repeat([0, 1, 2, -1], [1000, 300, 30, 70])
    samples = Samples(Files(Path(), []), np.arange(len(labels)), labels)
    rest, held_out = hold_out(samples, fraction, seed=1)
    assert sorted([*rest.indices, *held_out.indices]) == list(range(1400))
    for label, count in enumerate([1000, 300, 30]):
        assert abs((held_out.labels == label).sum() - fraction * count) <= 1
    assert (held_out.labels >= 0).all()


def test_samples_are_shuffled(photos: Path, tmp_path: Path) -> None:
    pack("folder", photos, tmp_path / "out", "--shard-size", 8)
    samples = samples_of(tmp_path / "out", "train")
    assert samples[0]["__key__"] == "train-00000000"
    labels = labels_of(samples)
    assert labels != sorted(labels)
    assert all(len(set(labels[start : start + 8])) > 1 for start in range(0, 30, 8))


def test_csv(photos: Path, tmp_path: Path) -> None:
    """Class names, numbers, splits, and rows without a label."""
    rows = [("a/0.png", "cat", ""), ("b/3.png", "dog", "val"), ("c/5.png", "", "train"), ("a/1.png", "ant", "train")]
    write_csv(photos / "names.csv", ("file", "label", "split"), rows)
    pack("table", photos / "names.csv", tmp_path / "names")
    info = info_of(tmp_path / "names")
    assert info["classes"] == ["ant", "cat", "dog"]
    assert info["splits"]["train"]["class_counts"] == [1, 1, 0]
    assert (info["splits"]["train"]["unlabelled"], "unlabelled" in info["splits"]["validation"]) == (1, False)
    found = {(sample["png"], label) for sample in samples_of(tmp_path / "names", "train") for label in labels_of([sample])}
    assert found == {
        ((photos / file).read_bytes(), label) for file, label in [("a/0.png", 1), ("c/5.png", None), ("a/1.png", 0)]
    }

    write_csv(photos / "numbers.csv", ("file", "label"), [("a/0.png", "10"), ("b/3.png", "2")])
    pack("table", photos / "numbers.csv", tmp_path / "numbers")
    assert sorted(labels_of(samples_of(tmp_path / "numbers", "train"))) == [2, 10]
    assert info_of(tmp_path / "numbers")["classes"] == [str(label) for label in range(11)]


def test_json(photos: Path, tmp_path: Path) -> None:
    rows = [
        {"file": "a/0.png", "label": 1},
        {"file": "b/3.png", "label": None},
        {"file": "c/5.png", "label": 0, "split": "test"},
    ]
    (photos / "list.json").write_text(json.dumps(rows))
    pack("table", photos / "list.json", tmp_path / "list")
    assert info_of(tmp_path / "list")["splits"]["train"]["class_counts"] == [0, 1]
    assert labels_of(samples_of(tmp_path / "list", "test")) == [0]

    labels = [[f"{path.parent.name}/{path.name}", "abc".index(path.parent.name)] for path in photos.glob("*/*.png")]
    (photos / "dataset.json").write_text(json.dumps({"labels": labels}))
    pack("table", photos / "dataset.json", tmp_path / "stylegan")
    pack("folder", photos, tmp_path / "folder")
    assert {(s["png"], s["cls"]) for s in samples_of(tmp_path / "stylegan", "train")} == {
        (s["png"], s["cls"]) for s in samples_of(tmp_path / "folder", "train")
    }
    (photos / "dataset.json").write_text(json.dumps({"labels": None}))
    pack("table", photos / "dataset.json", tmp_path / "unlabelled")
    assert labels_of(samples_of(tmp_path / "unlabelled", "train")) == [None] * 30


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.csv",
            "path,label\na/0.png,1\n",
            r"its first line is to be file,label or .*, not \['path', 'label'\]",
        ),
        ("x.csv", "file,label\na/0.png,-1\n", "label -1: classes are numbered from 0"),
        ("x.csv", "file,label\na/0.png,1\na/0.png,2\n", r"'a/0\.png' is listed twice"),
        ("x.csv", "file,label\n,1\n", "line 2: no file is named"),
        ("x.csv", "file,label,split\na/0.png,1,dev\n", "no split 'dev': there are train, val, validation, test"),
        ("x.csv", "file,label,split\na/0.png,1,test\n", "no images of the split train, only of test"),
        ("x.csv", "file,label\n", "no images in it"),
        ("x.csv", b"file,label\n\xff\xfe", "not a valid csv file"),
        ("x.csv", "file,label\na/gone.png,1\n", r"(?s)1 image\(s\) cannot be packed.*a/gone\.png: No such file"),
        ("x.json", '{"labels": [', "not a valid json file"),
        ("x.json", '{"labels": 3}', "neither a list of"),
        ("x.json", '["a/0.png"]', "neither a list of"),
        ("x.json", '[{"file": "a/0.png", "label": [1, 0]}]', r"the label of 'a/0\.png' is \[1, 0\]"),
        ("x.txt", "a/0.png 1", r"a table is a \.csv or a \.json file"),
    ],
)
def test_bad_tables_are_explained(photos: Path, tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (photos / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        pack("table", photos / name, tmp_path / "out", "--workers", 1)
    assert not (tmp_path / "out").exists()


def test_bad_folders_are_explained(photos: Path, tmp_path: Path) -> None:
    def error(folder: Path, out: Path = tmp_path / "out") -> str:
        with pytest.raises(DataError) as caught:
            pack("folder", folder, out)
        return str(caught.value)

    assert "inside" in error(photos, photos / "packed")
    assert "no such folder" in error(tmp_path / "gone")
    (photos / "d").mkdir()
    assert "d: no images in this class directory" in error(photos)
    (photos / "d").rmdir()
    save(colour(0), photos / "stray.png")
    assert "holds both images (stray.png) and class directories" in error(photos)
    (tmp_path / "empty").mkdir()
    assert "no images in it" in error(tmp_path / "empty")


def test_torchvision(tmp_path: Path, capsys) -> None:
    digits = load_digits()
    images, labels = (digits.images[:100] * 15).astype(np.uint8), digits.target[:100].astype(np.uint8)
    raw = tmp_path / "sets" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, part in (("train", slice(0, 80)), ("t10k", slice(80, 100))):
        header = struct.pack(">iiii", 0x803, len(images[part]), 8, 8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images[part].tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, len(labels[part])) + labels[part].tobytes())
    pack("torchvision", "MNIST", tmp_path / "mnist", "--root", tmp_path / "sets", "--workers", 2, "--shard-size", 30)
    found = [
        (decode(sample["png"], 1)[..., 0].tobytes(), int(sample["cls"]))
        for split in ("train", "test")
        for sample in samples_of(tmp_path / "mnist", split)
    ]
    assert sorted(found) == sorted((image.tobytes(), label) for image, label in zip(images, labels.tolist(), strict=True))
    info = info_of(tmp_path / "mnist")
    assert (info["resolution"], info["channels"], info["classes"][3]) == (8, 1, "3 - three")
    assert info["splits"]["train"]["shard_lengths"] == [30, 30, 20]
    assert "data.resolution=8 data.channels=1 data.num_classes=10" in capsys.readouterr().out


def test_torchvision_by_splits_copies_files(tmp_path: Path) -> None:
    """A data set with `split`, whose `loader` reads files: EuroSAT has neither train nor split, DTD has train, val, test."""
    contents = {save(colour(number), tmp_path / "eurosat/2750" / f"class{number % 3}" / f"{number}.jpg") for number in range(9)}
    pack("torchvision", "EuroSAT", tmp_path / "eurosat-out", "--root", tmp_path)
    assert {sample["jpg"] for sample in samples_of(tmp_path / "eurosat-out", "train")} == contents
    assert info_of(tmp_path / "eurosat-out")["classes"] == ["class0", "class1", "class2"]
    data = tmp_path / "dtd" / "dtd"
    (data / "labels").mkdir(parents=True)
    for number, split in enumerate(["train", "val", "test"]):
        save(colour(number), data / "images" / "dotted" / f"{split}.jpg")
        (data / "labels" / f"{split}1.txt").write_text(f"dotted/{split}.jpg\n")
    pack("torchvision", "DTD", tmp_path / "dtd-out", "--root", tmp_path)
    assert {split: entry["num_samples"] for split, entry in info_of(tmp_path / "dtd-out")["splits"].items()} == {
        "train": 1,
        "test": 1,
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CIFAR", r"torchvision has no data set 'CIFAR': did you mean CIFAR10"),
        ("mnist", r"no data set 'mnist': did you mean MNIST\?"),
        ("CIFAR10", r"torchvision finds no CIFAR10 there \(.*python -c 'from torchvision.datasets import CIFAR10; CIFAR10\("),
        ("OxfordIIITPet", "torchvision finds no OxfordIIITPet there .Dataset not found"),
        ("CocoCaptions", "torchvision's CocoCaptions needs annFile: list its images"),
    ],
)
def test_torchvision_errors(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        pack("torchvision", name, tmp_path / "out", "--root", tmp_path)


def test_bytes_do_not_depend_on_workers(photos: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        pack("folder", photos, tmp_path / str(workers) / "out", "--resolution", 16, "--shard-size", 4, "--workers", workers)
    assert files_of(tmp_path / "1" / "out") == files_of(tmp_path / "2" / "out")
    assert len(files_of(tmp_path / "1" / "out")) == 8 + 1


def test_damaged_images_are_named(photos: Path, tmp_path: Path) -> None:
    whole = {path: path.read_bytes() for path in sorted(photos.glob("*/*.png"))[:13]}
    for path, content in whole.items():
        path.write_bytes(content[:60])
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(photos / "c" / "deep.png")
    command = "folder", photos, tmp_path / "out", "--shard-size", 3
    with pytest.raises(DataError) as caught:
        pack(*command)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("14 image(s) cannot be packed: put whole ones in their place")
    assert len(lines) == 1 + 10 + 1
    assert all(".png: " in line for line in lines[1:-1])
    assert lines[-1] == "  and 4 more"
    assert not (tmp_path / "out").exists()
    for path, content in whole.items():
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"(?s)1 image.*deep\.png: I;16 pixels, which are not 8 bits a channel"):
        pack(*command)
    save(colour(0), photos / "c" / "deep.png")
    pack(*command)
    assert info_of(tmp_path / "out")["splits"]["train"]["num_samples"] == 31


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_pack_goes_on(tmp_path: Path, stop: signal.Signals) -> None:
    for number in range(90):
        save(colour(number, (200, 200)), tmp_path / "photos" / f"{number % 3}" / f"{number}.jpg")
    arguments = "--resolution", "512", "--shard-size", "2"  # large, so that it does not end before it is stopped
    command = "folder", tmp_path / "photos", tmp_path / "a" / "out", *arguments
    process = subprocess.Popen(
        [sys.executable, "-m", "gandist.data.pack", *map(str, command), "--workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    partial = tmp_path / "a" / "out.partial"
    deadline = time.monotonic() + 60
    while not (done := list(partial.glob("records/*.json"))) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    if stop == signal.SIGKILL:
        process.kill()  # the parent alone: its workers are to notice
    else:
        os.killpg(process.pid, stop)
    output, _ = process.communicate(timeout=20)  # returns when the last worker has closed the pipe, too
    assert done, output
    assert output == ("" if stop == signal.SIGKILL else "interrupted: the same command goes on from here\n")
    assert process.returncode == (-signal.SIGKILL if stop == signal.SIGKILL else 130)
    assert not (tmp_path / "a" / "out").exists()
    finished = {path.stem: (partial / "shards" / path.stem).stat().st_mtime_ns for path in partial.glob("records/*.json")}
    assert 0 < len(finished) < 45

    with pytest.raises(DataError, match=r"was begun with other images or options: .*, or remove .*out\.partial"):
        pack(*command, "--channels", "1")
    pack(*command)
    assert not partial.exists()
    assert {name: (tmp_path / "a" / "out" / name).stat().st_mtime_ns for name in finished} == finished, "they were not redone"
    pack("folder", tmp_path / "photos", tmp_path / "b" / "out", *arguments, "--workers", "1")
    assert files_of(tmp_path / "a" / "out") == files_of(tmp_path / "b" / "out")


def test_nothing_is_overwritten(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="out exists already: name another folder, or remove it"):
        pack("folder", photos, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]


@pytest.mark.parametrize(
    "arguments", [[], ["digits"], ["folder", "a", "b", "--hold-out", "1"], ["folder", "a", "b", "--workers", "0"]], ids=str
)
def test_wrong_arguments(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: python -m gandist.data.pack" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["digits", "folder", "table", "torchvision"])
def test_help_has_an_example(name: str, capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert f"example: python -m gandist.data.pack {name}" in capsys.readouterr().out


def test_digits_are_stratified_and_reproducible(tmp_path: Path, cache_dir: Path, world: World) -> None:
    info = info_of(cache_dir / "digits-16")
    train, test = info["splits"]["train"], info["splits"]["test"]
    assert (train["num_samples"], test["num_samples"]) == (1437, 360)
    assert set(test["class_counts"]) <= {35, 36, 37}
    pack_digits(tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(cache_dir / "digits-16")
    config = DataConfig(cache_dir=cache_dir)
    splits = [open_dataset(spec, config, world) for spec in (config.train, config.test)]
    images = [{sample.image for sample in split.shards.read(range(len(split)))} for split in splits]
    assert not images[0] & images[1]


def test_digits_never_change(cache_dir: Path) -> None:
    """A golden value: other shards would break the resume of every run on them."""
    digest = hashlib.sha256()
    for name in shard_names("train") + shard_names("test"):
        digest.update((cache_dir / "digits-16" / name).read_bytes())
    assert digest.hexdigest() == "319c29d256ecd8b54750bb845a8f694c14b3a3157c681112b33f6237696092de"


def test_digits_command(tmp_path: Path, capsys) -> None:
    pack("digits", tmp_path / "d", "--resolution", 32)
    assert "train 1,437 images in 5 shard(s), test 360 images in 2 shard(s); 32 px, 1 channel(s)" in capsys.readouterr().out
    assert len(list((tmp_path / "d").glob("*.tar"))) == sum(map(len, DIGITS_SHARDS.values()))
    with pytest.raises(DataError, match="exists already"):
        pack("digits", tmp_path / "d")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def _try_pack_digits(folder: Path) -> str:
    try:
        pack_digits(folder)
    except FolderExists:
        return "was there"
    return "packed"


def test_processes_that_pack_the_same_wait_for_each_other(tmp_path: Path, cache_dir: Path) -> None:
    folder = tmp_path / "cache" / "digits-16"
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert sorted(pool.map(_try_pack_digits, [folder] * 3, chunksize=1)) == ["packed", "was there", "was there"]
    assert files_of(folder) == files_of(cache_dir / "digits-16")
    assert [path.name for path in folder.parent.iterdir()] == ["digits-16"]


def write_csv(path: Path, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
