"""Shards: found by any spelling, indexed as webdataset reads them, and every damage named."""

import hashlib
import json
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from gandist.config import DataConfig
from gandist.data import open_dataset
from gandist.data.index import LABEL, UNLABELLED, LabelRule
from gandist.data.shards import LabelPolicy
from gandist.data.sources import find_shards
from gandist.distributed import World, join_world
from gandist.errors import DataError
from tests.ranks import run_ranks
from tests.shards import REMOTE, open_files, png, scan_file, write_shard, write_shards, write_tar

MEMBER = 1024  # bytes of a header and a block of content; a sample of `write_shard` has two such members


def test_find_shards(tmp_path: Path) -> None:
    for name in ("a-0.tar", "a-1.tar", "b.tar", "note.txt"):
        (tmp_path / name).touch()

    def names(*spec: str) -> list[str]:
        return [shard.name for shard in find_shards([f"{tmp_path}/{each}" for each in spec], REMOTE).shards]

    assert names("") == ["a-0.tar", "a-1.tar", "b.tar"]
    assert names("a-{0..1}.tar") == names("a-*.tar") == ["a-0.tar", "a-1.tar"]
    assert names("b.tar", "a-1.tar") == ["b.tar", "a-1.tar"]
    with pytest.raises(DataError, match=r"(?s)no shard at .*a-2\.tar\nno shard at .*c-\*"):
        names("a-{0..2}.tar", "c-*")
    with pytest.raises(DataError, match=r"named twice: .*b\.tar"):
        names("", "b.tar")
    with pytest.raises(DataError, match="a brace is not closed"):
        names("a-{0..1.tar")
    (tmp_path / "c.tar.gz").touch()
    with pytest.raises(DataError, match=r"c\.tar\.gz: compressed shards cannot be read at random: unpack"):
        names("c.tar.gz")


def test_a_folder_with_splits(tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 4, 5])
    splits = {
        "train": {"filenames": ["0000.tar", "0002.tar"], "shard_lengths": [3, 5], "class_counts": [1] * 8},
        "validation": {"filenames": ["0001.tar"], "shard_lengths": [4]},
    }
    (tmp_path / "_info.json").write_text(json.dumps({"classes": ["a", "b"], "splits": splits}))
    train, test = (find_shards(str(tmp_path), REMOTE, split=split) for split in ("train", "test"))
    assert [(shard.name, shard.count) for shard in train.shards] == [("0000.tar", 3), ("0002.tar", 5)]
    assert (train.classes, train.class_counts) == (("a", "b"), (1,) * 8)
    assert [(shard.name, shard.count) for shard in test.shards] == [("0001.tar", 4)]
    part = find_shards(str(tmp_path / "0000.tar"), REMOTE)
    assert (part.shards[0].count, part.class_counts) == (3, ()), "counts of a class are those of whole splits"
    splits["dev"] = splits.pop("train")
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(DataError, match="has the splits validation, dev, none of them train or training"):
        find_shards(str(tmp_path), REMOTE)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("_info.json", {"splits": {"all": {"filenames": ["0000.tar", "0001.tar"], "shard_lengths": [3, 5]}}}),
        ("info.json", {"splits": {"all": {"filenames": ["0000.tar", "0001.tar"], "shard_lengths": [3, 5]}}}),
        ("sizes.json", {"0000.tar": 3, "0001.tar": 5}),
        ("0001_stats.json", {"count": 9, "successes": 5}),
    ],
)
def test_declared_counts_are_held_against_the_shards(tmp_path: Path, world: World, name: str, content: dict) -> None:
    write_shards(tmp_path, [3, 4])
    (tmp_path / "0000_stats.json").write_text(json.dumps({"successes": 3}))
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"0001\.tar: 4 samples, but the file beside it declares 5") as caught:
        open_files(str(tmp_path), tmp_path / "cache", world)
    assert "0000.tar" not in str(caught.value)


def test_a_wids_index(tmp_path: Path, world: World) -> None:
    write_shards(tmp_path / "shards", [3, 4])
    entries = [{"url": f"shards/000{i}.tar", "nsamples": 3 + i, "filesize": 1} for i in (1, 0)]
    (tmp_path / "index.json").write_text(json.dumps({"__kind__": "wids-shard-index-v1", "shardlist": entries}))
    dataset = open_files(str(tmp_path / "index.json"), tmp_path / "cache", world)
    assert dataset.shard_sizes == (4, 3)
    (tmp_path / "index.json").write_text(json.dumps({"shards": entries}))
    with pytest.raises(DataError, match=r"index\.json: not in the form of a wids index \(KeyError: 'shardlist'\)"):
        find_shards(str(tmp_path / "index.json"), REMOTE)


def test_index_agrees_with_webdataset(tmp_path: Path, cache_dir: Path, world: World) -> None:
    """webdataset's own reader as the oracle: keys, bytes and labels."""
    dataset = open_files(str(cache_dir / "digits-16" / "digits-train-*.tar"), tmp_path, world)
    oracle = wds.WebDataset([shard.url for shard in dataset.shards], shardshuffle=False)
    for number, (sample, expected) in enumerate(zip(dataset.read(range(len(dataset))), oracle, strict=True)):
        assert (sample.image, sample.label) == (expected["png"], int(expected["cls"]))
        assert f"sample '{expected['__key__']}'" in dataset.describe(number)
    assert number == 1436
    assert dataset.class_counts.tolist() == np.bincount([sample.label for sample in dataset.read(range(1437))]).tolist()


def test_other_layouts_read_unchanged(tmp_path: Path, world: World) -> None:
    """img2dataset's members with a label in the JSON or none; timm's jpg + cls + json; folders and long names inside."""
    long = "n" * 150
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        folder = tarfile.TarInfo("images")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    img2dataset = [
        ("000000000.JPG", png(4)),
        ("000000000.json", b'{"label": 3, "caption": "x"}'),
        ("000000000.txt", b"x"),
        (f"images/{long}.jpg", png(4)),
        (f"images/{long}.json", b'{"label": null}'),
        (f"images/{long}.txt", b""),
    ]
    write_tar(tmp_path / "x.tar", img2dataset)
    rule, policy = LabelRule("json:label"), LabelPolicy(5, unlabelled=True)
    dataset = open_files(str(tmp_path / "x.tar"), tmp_path / "cache", world, rule=rule, policy=policy)
    assert [sample.label for sample in dataset.read([0, 1])] == [3, -1]
    assert dataset.class_counts.tolist() == [0, 0, 0, 1, 0]
    unlabelled = open_files(str(tmp_path / "x.tar"), tmp_path / "cache", world, rule=LabelRule(""), policy=LabelPolicy(0))
    assert [sample.label for sample in unlabelled.read([1, 0])] == [-1, -1]
    timm = [("n01/a.jpg", png(4)), ("n01/a.cls", b"7\n"), ("n01/a.json", b'{"label": 7}')]
    write_tar(tmp_path / "y.tar", timm)
    assert open_files(str(tmp_path / "y.tar"), tmp_path / "cache", world).read([0])[0].label == 7


def test_labels_may_be_names_of_classes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.png", png(4)), ("a.cls", b"dog"), ("b.png", png(4)), ("b.cls", b"0")])
    assert scan_file(path, LabelRule("cls", ("cat", "dog")))[:, LABEL].tolist() == [1, 0]
    assert scan_file(path, LabelRule("cls", ("1", "0", "dog")))[:, LABEL].tolist() == [2, 0], "a number is no name"
    with pytest.raises(DataError, match=r"sample 'a' \(cls\) is b'dog', not an integer nor a name of a class"):
        scan_file(path, LabelRule("cls", ("cat", "bird")))


def test_damage_is_found(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "whole.tar", count=20).read_bytes()
    assert len(scan_file(tmp_path / "whole.tar")) == 20
    broken_header = bytearray(whole)
    broken_header[10 * MEMBER] ^= 0xFF
    for content in (
        bytes(broken_header),
        whole[: 10 * MEMBER],  # between members, where tarfile stops in silence
        whole[: 10 * MEMBER + 512],  # after a header
        whole[: 10 * MEMBER + 700],  # inside the data
        whole[: 10 * MEMBER + 100],  # inside a header
        whole + whole,  # a second archive behind the first one's end
        b"",
        b"<html>404</html>" * 100,
    ):
        (tmp_path / "damaged.tar").write_bytes(content)
        with pytest.raises(DataError, match=r"damaged\.tar: (damaged or truncated|no samples)"):
            scan_file(tmp_path / "damaged.tar")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.cls", b"1")], "sample 'a' has ['cls']: wanted is one image"),
        ([("a.png", b"x"), ("a.jpg", b"x"), ("a.cls", b"1")], "wanted is one image"),
        ([("a.png", b"x"), ("a.png", b"x"), ("a.cls", b"1")], "member 'a.png' is there twice"),
        ([("a.png", b"x"), ("a.cls", b"cat")], "the label of sample 'a' (cls) is b'cat', not an integer"),
        ([("a.png", b"x"), ("a.cls", b"1.5")], "b'1.5', not an integer"),
        ([("a.png", b""), ("b.png", b""), ("a.cls", b"1"), ("b.cls", b"1")], "sample 'a' has ['cls']"),
        ([("a.1.png", b"x"), ("a.cls", b"1")], "sample 'a' has ['1.png', 'cls']"),
        ([("README", b"x")], "member 'README' has no extension"),
        ([(f"{key}.{end}", b"1") for key in "aba" for end in ("png", "cls")], "sample 'a' is there twice"),
    ],
)
def test_bad_samples_are_named(tmp_path: Path, members: list, message: str) -> None:
    path = write_tar(tmp_path / "bad.tar", members)
    with pytest.raises(DataError) as caught:
        scan_file(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_links_and_compressed_shards_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match=r"member 'a\.png' is a link"):
        scan_file(tmp_path / "link.tar")
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(write_shard(tmp_path / "x.tar", count=1), "x.png")
    with pytest.raises(DataError, match="compressed shards cannot be read at random: unpack it"):
        scan_file(tmp_path / "packed.tar")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("stage", [False, True])
def test_a_pipe_is_refused_by_name(tmp_path: Path, world: World, stage: bool) -> None:
    """Opening it would wait for a writer for ever."""
    os.mkfifo(tmp_path / "0.tar")
    with pytest.raises(DataError, match=r"/0\.tar: is a pipe, a device or a folder, not a file"):
        open_files(str(tmp_path / "0.tar"), tmp_path / "cache", world, stage=stage)


def test_labels_out_of_range_and_missing(tmp_path: Path, world: World) -> None:
    write_tar(tmp_path / "x.tar", [("a.png", b"x"), ("a.cls", b"1"), ("b.png", b"x"), ("b.cls", b"10"), ("c.png", b"x")])

    def error(**policy) -> str:
        with pytest.raises(DataError) as caught:
            open_files(str(tmp_path / "x.tar"), tmp_path / "cache", world, policy=LabelPolicy(**policy))
        return str(caught.value)

    assert "sample 'b' has label 10, outside 0..9 (1 such): set data.num_classes" in error(num_classes=10)
    assert "sample 'c' has no label (cls) (1 such): correct data.label, or say data.unlabelled=allow" in error(num_classes=11)
    allowed = LabelPolicy(11, unlabelled=True)
    dataset = open_files(str(tmp_path / "x.tar"), tmp_path / "cache", world, policy=allowed)
    assert [sample.label for sample in dataset.read(range(3))] == [1, 10, -1]


def _open_on_ranks(spec: str, cache_dir: Path, num_classes: int) -> tuple[dict, str | None]:
    with join_world() as world:
        try:
            config = DataConfig(
                train=spec, cache_dir=cache_dir, num_classes=num_classes, resolution=4, in_memory=0, num_workers=0
            )
            return open_dataset(spec, config, world).fingerprint, None
        except DataError as error:
            return {}, f"{error} (on every rank: {error.on_every_rank})"


def test_ranks_share_the_scan_and_its_errors(tmp_path: Path) -> None:
    write_shards(shards := tmp_path / "shards", [10] * 40)
    whole = run_ranks(2, _open_on_ranks, str(shards), tmp_path / "cache", 10)
    assert whole[0] == whole[1]
    assert len(list((tmp_path / "cache" / "index").iterdir())) == 40
    assert run_ranks(3, _open_on_ranks, str(shards), tmp_path / "cache", 10) == [whole[0]] * 3, "the cached index is the same"
    for shard in (0, 38):
        path = shards / f"{shard:04d}.tar"
        path.write_bytes(path.read_bytes()[:5000])
    (_, first), (_, second) = run_ranks(2, _open_on_ranks, str(shards), tmp_path / "cache", 9)
    assert first == second
    for part in ("0000.tar: damaged", "0038.tar: damaged", "0001.tar: sample '000019' has label 9, outside 0..8 (1 such)"):
        assert part in first
    assert "(on every rank: True)" in first


def test_an_index_is_found_again_when_shards_move_and_made_anew_when_they_change(tmp_path: Path, world: World) -> None:
    (path,) = write_shards(tmp_path / "a", [5])
    cache = tmp_path / "cache"

    def indices() -> int:
        open_files(str(path), cache, world)
        return len(list((cache / "index").iterdir()))

    assert indices() == indices() == 1
    path = path.rename(tmp_path / "moved.tar")
    assert indices() == 1
    content = path.read_bytes()
    at = content.index(b"000002.cls") + 512
    path.write_bytes(content[:at] + b"9" + content[at + 1 :])
    assert open_files(str(path), cache, world).read([2])[0].label == 9
    assert indices() == 2


def test_a_shard_cut_short_in_mid_run_is_named(tmp_path: Path, world: World) -> None:
    (path,) = write_shards(tmp_path / "a", [5])
    dataset = open_files(str(path), tmp_path / "cache", world)
    dataset.read([0])
    with path.open("r+b") as file:
        file.truncate(3000)
    with pytest.raises(DataError, match=r"0000\.tar: ends before byte \d+, it was changed since it was indexed"):
        dataset.read([4])


def _corrupted(rng: random.Random, whole: bytes, other: bytes, places: list[int], joints: list[int]) -> bytes:
    """Bits flipped or bytes overwritten at some places, or the archive cut off, or spliced with another at some joints."""
    kind = rng.choice(["flip", "overwrite", "cut", "splice"])
    if kind == "cut":
        return whole[: rng.choice([rng.randrange(len(whole)), 512 * rng.randrange(len(whole) // 512)])]
    if kind == "splice":
        return whole[: rng.choice(joints)] + rng.choice([whole, other])[rng.choice(joints) :]
    damaged = bytearray(whole)
    if kind == "flip":
        for place in rng.choices(places, k=rng.choice([1, 1, 2, 2, 3, 20])):
            damaged[place] ^= 1 << rng.randrange(8)
    else:
        first = rng.randrange(len(places))
        for place in places[first : first + rng.choice([1, 8, 100, 512, 2000])]:
            damaged[place] = rng.choice([0, rng.randrange(256)])
    return bytes(damaged)


@pytest.mark.parametrize("checksum", [True, False])
def test_ten_thousand_corruptions(tmp_path: Path, checksum: bool) -> None:
    """Each is detected, or changes no sample.

    Anything at all is, where a SHA-256 is declared. A tar itself has no checksum of its members' content: without one,
    the corruption is of all the rest, headers, padding and end, and a shard that is accepted has whole samples only, as
    many as were declared.
    """
    rng = random.Random(0)
    shards = [write_tar(tmp_path / f"{name}.tar", _samples(rng, name, 6)) for name in "ab"]
    whole, other = (shard.read_bytes() for shard in shards)
    originals = {sample for shard in shards for sample in _read(shard, scan_file(shard))}
    with tarfile.open(shards[0]) as tar:
        headers = [member.offset for member in tar]
        content = {place for member in tar for place in range(member.offset_data, member.offset_data + member.size)}
    places = [place for place in range(len(whole)) if checksum or place not in content]
    joints = list(range(0, len(whole), 512)) if checksum else headers
    declared = {"count": 6, "sha256": hashlib.sha256(whole).hexdigest() if checksum else None}
    detected = accepted = 0
    path = tmp_path / "damaged.tar"
    while detected + accepted < 10_000:
        damaged = _corrupted(rng, whole, other, places, joints)
        path.write_bytes(damaged)
        try:
            table = scan_file(path, **declared)
            if (table[:, LABEL] == UNLABELLED).any():
                raise DataError("refused when it is opened")
        except DataError:
            detected += 1
            continue
        accepted += 1
        assert damaged == whole if checksum else {*_read(path, table)} <= originals
    assert detected > 5000


def _samples(rng: random.Random, name: str, count: int) -> list[tuple[str, bytes]]:
    """Images of random bytes and sizes."""
    images = [(f"{name}{i}.jpg", rng.randbytes(rng.randrange(1, 1500))) for i in range(count)]
    return [each for image in images for each in (image, (image[0].replace("jpg", "cls"), str(rng.randrange(10)).encode()))]


def _read(path: Path, table: np.ndarray) -> list[tuple[bytes, int]]:
    content = path.read_bytes()
    return [(content[offset : offset + size], label) for offset, size, label in table.tolist()]
