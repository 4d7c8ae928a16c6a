"""`python -m gandist.data.check` on real shards: what it reports of whole ones, and what it finds in others."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from scipy.stats import hypergeom

from gandist.config_file import load_config
from gandist.data.check import main
from gandist.data.index import OFFSET
from gandist.data.mixing import expected_classes, shuffle_quality
from gandist.errors import DataError
from tests.ranks import ROOT, run_command
from tests.shards import png, scan_file, write_shard, write_shards, write_tar

Check = Callable[..., str]


@pytest.fixture
def check(capsys) -> Check:
    """Runs the command in this process; returns its report with single spaces."""

    def checked(*arguments: object, damaged: bool = False) -> str:
        if damaged:
            with pytest.raises(DataError, match="damaged shards or images"):
                main(["--workers=2", *map(str, arguments)])
        else:
            main(["--workers=2", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert err == ""  # no progress bar where nobody looks
        return "\n".join(" ".join(line.split()) for line in out.splitlines())

    return checked


def jpeg(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)).save(buffer, "jpeg")
    return buffer.getvalue()


def labelled(images: list[bytes], labels: list[int | None], extension: str = "png") -> list[tuple[str, bytes]]:
    members = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        members.append((f"{number:06d}.{extension}", image))
        members += [] if label is None else [(f"{number:06d}.cls", str(label).encode())]
    return members


def settings(text: str) -> list[str]:
    """The arguments of the data that the report recommends. All of them are valid ones."""
    (line,) = [line for line in text.splitlines() if line.startswith("python -m gandist.train ")]
    arguments = shlex.split(line)[3:]
    load_config(None, arguments)
    return [argument for argument in arguments if argument.startswith("data.") and argument != "data.test=null"]


def test_all_splits_of_a_folder(cache_dir: Path, check: Check) -> None:
    folder = cache_dir / "digits-16"
    text = check(folder)
    assert f"{folder}: train\nshards 5, of 1,437 samples" in text
    assert f"{folder}: test\nshards 2, of 360 samples" in text
    assert "classes 10, with 144 images in the median, at least 139 (class 8), at most 147 (class 3)" in text
    assert "sizes 16×16 (1,437)\nformats PNG grey (1,437)" in text
    assert "10.0 classes in 256 consecutive samples, 10.0 in shuffled data: good" in text
    assert text.count("damage none") == 2
    assert settings(text) == [
        *(f"data.train={folder}", f"data.test={folder}"),
        *("data.resolution=16", "data.channels=1", "data.num_classes=10"),
    ]


def test_several_names_make_one_data_set(tmp_path: Path, check: Check) -> None:
    paths = write_shards(tmp_path / "a", [20, 30]) + write_shards(tmp_path / "b", [10])
    text = check(tmp_path / "a", tmp_path / "b" / "000{0..0}.tar")
    assert "shards 3, of 60 samples" in text
    assert f"keys 10 come in more than one shard, for example in {paths[0]} and {paths[2]}" in text
    assert settings(text)[0] == f'data.train=["{tmp_path}/a", "{tmp_path}/b/000{{0..0}}.tar"]'


def test_mixed_sizes_and_formats(tmp_path: Path, check: Check) -> None:
    write_tar(tmp_path / "a.tar", labelled([jpeg(40, 30), jpeg(40, 30), jpeg(20, 90)], [0, 1, 0], "jpg"))
    write_tar(tmp_path / "b.tar", labelled([png(8)] * 2, [1, 4]))
    text = check(tmp_path)
    assert "sizes 40×30 (2), 8×8 (2), 20×90 (1)\nformats JPEG colour (3), PNG grey (2)" in text
    assert "empty 2 of 5 classes: 2, 3" in text
    assert settings(text)[1:] == ["data.resolution=16", "data.channels=3", "data.num_classes=5", "data.resize=center-crop"]


def test_images_that_are_not_square(tmp_path: Path, check: Check) -> None:
    """Their size is recommended if there are networks for it."""
    for size, recommended in (
        ((64, 48), ["data.resolution=[48,64]"]),
        ((60, 44), ["data.resolution=32", "data.resize=center-crop"]),
    ):
        write_tar(tmp_path / "a.tar", labelled([jpeg(*size)] * 4, [0, 1, 0, 1], "jpg"))
        found = settings(check(tmp_path))
        assert [each for each in found if each.startswith("data.res")] == recommended


def test_shards_sorted_by_class(tmp_path: Path, check: Check) -> None:
    for name in ("apart", "within", "shuffled"):
        (tmp_path / name).mkdir()
    images, classes = [png(4)] * 600, np.repeat(range(4), 150)
    shuffled = np.random.default_rng(0).permutation(classes)
    for shard in range(4):
        write_tar(tmp_path / "apart" / f"{shard}.tar", labelled(images[:150], [shard] * 150))
        write_tar(tmp_path / "within" / f"{shard}.tar", labelled(images * 2, np.repeat(range(4), 300).tolist()))
        write_tar(tmp_path / "shuffled" / f"{shard}.tar", labelled(images, shuffled.tolist()))
    text = check(tmp_path / "apart")
    assert "1.0 classes in 256 consecutive samples, 4.0 in shuffled data: POOR: the shards are sorted by class" in text
    assert "data.shuffle_block would shuffle badly, as each shard holds few classes: use data.shuffle_block=0" in text
    assert "sorted by class within the shards" in check(tmp_path / "within")
    assert "4.0 in shuffled data: good" in check(tmp_path / "shuffled")


def test_labels_of_many_kinds(tmp_path: Path, check: Check) -> None:
    write_tar(tmp_path / "some.tar", labelled([png(8)] * 4, [0, 1, None, 1]))
    text = check(tmp_path / "some.tar")
    assert "unlabelled 1\n" in text
    assert settings(text)[-2:] == ["data.num_classes=2", "data.unlabelled=allow"]

    write_tar(tmp_path / "none.tar", labelled([png(8)] * 4, [None] * 4))
    text = check(tmp_path / "none.tar")
    assert "classes none\nunlabelled all\n" in text
    assert settings(text)[-1] == "data.num_classes=0"
    assert settings(check(tmp_path / "some.tar", "--label=none"))[-1] == "data.num_classes=0"

    (tmp_path / "json").mkdir()
    names = ["cat", "dog", "owl"]
    members = [
        member
        for number, name in enumerate(["dog", "cat", "dog"])
        for member in ((f"{number}.png", png(8)), (f"{number}.json", json.dumps({"kind": name}).encode()))
    ]
    write_tar(tmp_path / "json" / "a.tar", members)
    split = {"filenames": ["a.tar"], "shard_lengths": [3]}
    (tmp_path / "json" / "_info.json").write_text(json.dumps({"classes": names, "splits": {"extra": split}}))
    text = check(tmp_path / "json", "--label=json:kind")
    assert "at least 1 (class 0 (cat)), at most 2 (class 1 (dog))\nempty 1 of 3 classes: 2 (owl)" in text


def test_all_damage_is_named(tmp_path: Path, check: Check) -> None:
    whole = jpeg(32, 32)
    truncated = write_shard(tmp_path / "a.tar", count=5)
    truncated.write_bytes(truncated.read_bytes()[:4000])
    images = [whole, whole[: len(whole) // 2], whole, b"not an image", b""]
    undecodable = write_tar(tmp_path / "b.tar", labelled(images, [0, 1] * 2 + [0], "jpg"))
    wrong = write_tar(tmp_path / "c.tar", labelled([whole], ["?"], "jpg"))
    os.mkfifo(pipe := tmp_path / "d.tar")
    text = check(tmp_path / "[abcd].tar", damaged=True)
    assert f"\n{pipe}: is a pipe, a device or a folder, not a file" in text
    assert f"damage {truncated}: damaged or truncated" in text
    assert f"\n{wrong}: the label of sample '000000' (cls) is b'?', not an integer\n" in text
    for number, offset in zip((1, 3, 4), scan_file(undecodable)[[1, 3, 4], OFFSET], strict=True):
        assert f"\n{undecodable}: sample '{number:06d}' (byte {offset}): the image cannot be decoded" in text
    assert "sizes 32×32 (2)" in text


def test_an_index_made_before_is_not_believed(tmp_path: Path, check: Check) -> None:
    """What is declared is verified, each time anew."""
    path = write_shard(tmp_path / "a.tar", count=5)
    split = {"filenames": ["a.tar"], "shard_lengths": [5]}
    info = tmp_path / "_info.json"
    info.write_text(json.dumps({"splits": {"train": split}}))
    assert "damage none" in check(tmp_path)
    info.write_text(json.dumps({"splits": {"train": split | {"sha256": ["0" * 64]}}}))
    assert f"{path}: damaged: its SHA-256 is not the one" in check(tmp_path, damaged=True)
    info.write_text(json.dumps({"splits": {"train": split | {"shard_lengths": [6]}}}))
    text = check(tmp_path, damaged=True)
    assert f"{path}: 5 samples, but the file beside it declares 6" in text
    assert "train on it" not in text


def test_much_damage_is_counted(tmp_path: Path, check: Check) -> None:
    write_tar(tmp_path / "a.tar", labelled([b"?"] * 130 + [png(8)] * 2, [0] * 132))
    text = check(tmp_path, damaged=True)
    assert text.count("the image cannot be decoded") == 100
    assert "… and 30 more" in text


def test_expected_classes_agree_with_the_hypergeometric_distribution() -> None:
    counts = np.array([1, 5, 40, 300])
    for drawn in (1, 7, 256, 346):
        wanted = sum(1 - hypergeom(counts.sum(), count, drawn).pmf(0) for count in counts)
        assert expected_classes(counts, drawn) == pytest.approx(wanted)
    assert shuffle_quality([np.zeros(5, np.int64)]) is None
    assert shuffle_quality([np.full(5, -1)]) is None


def test_remote_shards_pass_through_the_cache(tmp_path: Path, check: Check) -> None:
    command = f"pipe:cat {write_shard(tmp_path / 'a.tar', count=5)}"
    assert "data.allow_pipe=true allows" in check(command, f"--cache-dir={tmp_path}", damaged=True)
    text = check(command, f"--cache-dir={tmp_path}", "--allow-pipe")
    assert "sizes 4×4 (5)" in text
    assert settings(text)[0] == f"data.train={command}"
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 1


def test_a_name_without_shards() -> None:
    with pytest.raises(DataError, match="no shard at nowhere"):
        main(["nowhere"])


@pytest.mark.parametrize("option", ["--label=class", "--workers=0", "--workers=x"])
def test_unusable_options(option: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["x.tar", option])
    assert f"error: argument {option.partition('=')[0]}: '{option.partition('=')[2]}' is not" in capsys.readouterr().err


def test_the_command(tmp_path: Path) -> None:
    command = sys.executable, "-m", "gandist.data.check"
    write_tar(tmp_path / "a.tar", labelled([png(8), b"?"], [0, 1]))
    result = run_command(*command, str(tmp_path / "a.tar"))
    assert result.returncode == 1
    assert "sample '000001'" in result.stdout
    assert result.stderr == "error: 1 damaged shards or images: restore or replace them\n"


def test_ctrl_c_leaves_no_process_behind(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "0.tar", labelled([jpeg(256, 256)] * 4000, [0, 1] * 2000, "jpg"))
    for number in range(1, 10):  # enough not to end before it is stopped
        (tmp_path / f"{number}.tar").hardlink_to(first)
    command = [sys.executable, "-m", "gandist.data.check", str(tmp_path), "--workers=2"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        parent = psutil.Process(process.pid)
        while len(workers := parent.children()) < 2:  # one alone is of torch, which asks the system while it is imported
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (130, "", "")
    assert not any(worker.is_running() for worker in workers)
