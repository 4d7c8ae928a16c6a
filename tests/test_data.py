"""The input: every sample exactly once an epoch whatever the shards and ranks, and damage named."""

import io
import json
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gandist.config import DataConfig
from gandist.data import evaluation_batches, open_dataset, training_batches
from gandist.data.decode import ImageFormat
from gandist.data.loader import EvaluationBatches, TrainingBatches, load_batches
from gandist.data.order import SampleOrder, permutation
from gandist.data.pack import encode_png
from gandist.data.shards import ShardDataset, find_shards, scan
from gandist.distributed import World, join_world
from gandist.errors import DataError
from tests.ranks import run_ranks

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=9)


@given(sizes=SIZES, batch=st.integers(1, 12), world=st.integers(1, 6), block=st.integers(0, 4), seed=st.integers(0, 2**40))
@settings(max_examples=150, deadline=None)
def test_each_sample_once_an_epoch_at_any_world_size(sizes, batch, world, block, seed) -> None:
    total, epochs, batch_size = sum(sizes), 3, batch * world
    order = SampleOrder(sizes, seed=seed, shuffle_block=block)
    dealt = np.full(epochs * total + batch_size, -1)
    for rank in range(world):
        batches = TrainingBatches(order, batch_size, rank, world, start=0)
        for number in range(epochs * total // batch_size + 1):
            first = number * batch_size
            dealt[first + rank : first + batch_size : world] = batches[number]
    for epoch in range(epochs):
        seen = dealt[epoch * total : (epoch + 1) * total]
        assert sorted(seen) == list(range(total))


@given(sizes=SIZES, start=st.integers(0, 10**12), count=st.integers(1, 100), block=st.integers(0, 4))
@settings(max_examples=100, deadline=None)
def test_seeking_gives_what_reading_on_would(sizes, start, count, block) -> None:
    def order() -> SampleOrder:
        return SampleOrder(sizes, seed=1, shuffle_block=block)

    together = order().samples(np.arange(start, start + count))
    one_by_one = [order().samples(np.array([position]))[0] for position in range(start, start + count)]
    assert together.tolist() == one_by_one


def test_shuffle_blocks_read_few_shards_at_a_time() -> None:
    order = SampleOrder([10] * 20, seed=0, shuffle_block=4)
    samples = order.samples(np.arange(200))
    for block in samples.reshape(5, 40):
        assert len(np.unique(block // 10)) == 4
    epochs = order.samples(np.arange(400)).reshape(2, 200)
    assert (epochs[0] != epochs[1]).any()


def test_permutation_never_changes() -> None:
    """A golden value: another order would break the resume of every run there is."""
    assert permutation(10, 1, 2, 3).tolist() == [0, 7, 5, 8, 3, 6, 9, 2, 1, 4]
    assert sorted(permutation(1000, 5)) == list(range(1000))


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 3), (2, 1), (3, 0), (3, 2)])
def test_the_loader_reads_each_image_once_in_the_same_order(tmp_path: Path, world_size: int, num_workers: int) -> None:
    sizes, batch_size, start = [7, 1, 12, 3], 6, 4
    paths = [write_shard(tmp_path / f"{i}.tar", first=sum(sizes[:i]), count=size) for i, size in enumerate(sizes)]
    dataset = ShardDataset(paths, [scan(path) for path in paths])
    order = SampleOrder(sizes, seed=3)
    steps = 2 * sum(sizes) // batch_size
    dealt = np.zeros(steps * batch_size, int)
    for rank in range(world_size):
        plan = TrainingBatches(order, batch_size, rank, world_size, start)
        batches = load_batches(dataset, plan, ImageFormat(4, 1), num_workers=num_workers)
        for number, (images, labels) in enumerate(islice(batches, steps)):
            assert images.dtype == torch.uint8
            assert images.shape[1:] == (4, 4, 1)
            samples = images[:, 0, 0, 0].numpy()  # write_shard paints the number of the sample
            assert (labels.numpy() == samples % 10).all()
            dealt[number * batch_size :][:batch_size][rank::world_size] = samples
        batches.close()
    assert dealt.tolist() == order.samples(np.arange(start, start + len(dealt))).tolist()


@given(total=st.integers(1, 60), batch=st.integers(1, 20), world=st.integers(1, 5))
def test_evaluation_reads_each_sample_once(total, batch, world) -> None:
    seen = [i for rank in range(world) for part in _all(EvaluationBatches(total, batch, rank, world)) for i in part]
    assert sorted(seen) == list(range(total))


def _all(batches: EvaluationBatches) -> list[np.ndarray]:
    parts = []
    while True:
        try:
            parts.append(batches[len(parts)])
        except IndexError:
            return parts


def test_index_agrees_with_webdataset(cache_dir: Path) -> None:
    """webdataset's own reader as the oracle: keys, bytes and labels."""
    paths = find_shards(str(cache_dir / "digits-16" / "digits-train-*.tar"))
    dataset = ShardDataset(paths, [scan(path) for path in paths])
    oracle = wds.WebDataset([str(path) for path in paths], shardshuffle=False)
    samples = dataset.read(range(len(dataset)))
    count = 0
    for sample, expected in zip(samples, oracle, strict=True):
        assert (sample.image, sample.label) == (expected["png"], int(expected["cls"]))
        assert f"sample '{expected['__key__']}'" in str(sample)
        count += 1
    assert count == 1437


def test_find_shards(tmp_path: Path) -> None:
    for name in ("a-0.tar", "a-1.tar", "b.tar", "note.txt"):
        (tmp_path / name).touch()

    def names(*spec: str) -> list[str]:
        return [path.name for path in find_shards([f"{tmp_path}/{each}" for each in spec])]

    assert names("") == ["a-0.tar", "a-1.tar", "b.tar"]
    assert names("a-{0..1}.tar") == names("a-*.tar") == ["a-0.tar", "a-1.tar"]
    assert names("b.tar", "a-1.tar") == ["b.tar", "a-1.tar"]
    with pytest.raises(DataError, match=r"(?s)no shard at .*a-2\.tar\nno shard at .*c-\*"):
        names("a-{0..2}.tar", "c-*")


def test_damage_is_found(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "whole.tar", count=20).read_bytes()
    member = 1024  # a header and a block of content; a sample has two such members
    assert len(scan(tmp_path / "whole.tar")) == 20

    def damaged(content: bytes) -> Path:
        path = tmp_path / "damaged.tar"
        path.write_bytes(content)
        return path

    broken_header = bytearray(whole)
    broken_header[10 * member] ^= 0xFF
    for content in (
        bytes(broken_header),
        whole[: 10 * member],  # between members, where tarfile stops in silence
        whole[: 10 * member + 512],  # after a header
        whole[: 10 * member + 700],  # inside the data
        whole[: 10 * member + 100],  # inside a header
        whole + whole,  # a second archive behind the first one's end
        b"",
        b"<html>404</html>" * 100,
    ):
        with pytest.raises(DataError, match=r"damaged\.tar: (damaged or truncated|no samples)"):
            scan(damaged(content))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"x"}, "sample 'a' has ['png']"),
        ({"a.cls": b"1"}, "sample 'a' has ['cls']"),
        ({"a.png": b"x", "a.jpg": b"x", "a.cls": b"1"}, "wanted are one image"),
        ({"a.png": b"x", "a.cls": b"cat"}, "the label of sample 'a' is b'cat', not an integer"),
        ({"a.png": b"x", "a.cls": b"1", "b.png": b"x", "b.cls": b"1", "./a.png": b"x", "./a.cls": b"1"}, None),
        ({"a.png": b"", "b.png": b"", "a.cls": b"1", "b.cls": b"1"}, "sample 'a' has ['png']"),
    ],
)
def test_bad_samples_are_named(tmp_path: Path, members: dict, message: str | None) -> None:
    path = write_tar(tmp_path / "bad.tar", list(members.items()))
    if message is None:
        assert len(scan(path)) == 3  # keys of different folders are different samples
        return
    with pytest.raises(DataError) as caught:
        scan(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_repeated_keys_are_refused(tmp_path: Path) -> None:
    a, b = [("a.png", b"x"), ("a.cls", b"1")], [("b.png", b"x"), ("b.cls", b"1")]
    with pytest.raises(DataError, match="sample 'a' is there twice"):
        scan(write_tar(tmp_path / "twice.tar", a + b + a))


def test_images_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("ok.png", png(8)), ("ok.cls", b"1"), ("odd.png", b"junk"), ("odd.cls", b"1")])
    dataset = ShardDataset([path], [scan(path)])
    plan = EvaluationBatches(2, 1, 0, 1)
    for workers in (0, 1):
        batches = load_batches(dataset, plan, ImageFormat(8, 1), num_workers=workers)
        assert next(batches).images.shape == (1, 8, 8, 1)
        with pytest.raises(DataError, match=r"x\.tar: sample 'odd' \(byte \d+\): the image cannot be decoded"):
            next(batches)
    with pytest.raises(DataError, match=r"sample 'ok' .*: 8×8 pixels, but data\.resolution is 16"):
        next(load_batches(dataset, plan, ImageFormat(16, 1)))


def test_formats(tmp_path: Path) -> None:
    """Grey and RGB, PNG, JPEG and WebP, and what the fast decoders refuse: CMYK, and a PNG that is called .jpg."""
    colour = Image.fromarray(np.full((8, 8, 3), (200, 100, 50), np.uint8))
    files = {"a.png": ("png", colour), "b.jpg": ("jpeg", colour), "c.webp": ("webp", colour), "d.jpg": ("png", colour)}
    files |= {"e.jpg": ("jpeg", colour.convert("CMYK")), "f.png": ("png", colour.convert("L"))}
    members = []
    for name, (form, image) in files.items():
        buffer = io.BytesIO()
        image.save(buffer, form)
        members += [(name, buffer.getvalue()), (f"{name[0]}.cls", b"0")]
    path = write_tar(tmp_path / "x.tar", members)
    dataset = ShardDataset([path], [scan(path)])
    (batch,) = load_batches(dataset, EvaluationBatches(6, 6, 0, 1), ImageFormat(8, 3))
    expected = torch.tensor([200, 100, 50])
    assert ((batch.images[:5].int() - expected).abs() <= 6).all()
    (grey,) = load_batches(dataset, EvaluationBatches(6, 6, 0, 1), ImageFormat(8, 1))
    assert ((grey.images.int() - 124).abs() <= 3).all()


def _open_on_ranks(spec: str, cache_dir: Path, num_classes: int) -> tuple[str, str | None]:
    with join_world() as world:
        try:
            config = DataConfig(train=spec, cache_dir=cache_dir, num_classes=num_classes)
            return open_dataset(spec, config, world).fingerprint, None
        except DataError as error:
            return "", f"{error} (on every rank: {error.on_every_rank})"


def test_ranks_share_the_scan_and_its_errors(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in range(3):
        write_shard(shards / f"{shard}.tar", first=shard * 10, count=10)
    whole = run_ranks(2, _open_on_ranks, str(shards), tmp_path / "cache", 10)
    assert whole[0] == whole[1]
    assert whole == run_ranks(2, _open_on_ranks, str(shards), tmp_path / "cache", 10), "the cached index is the same"
    for shard in (0, 2):
        (shards / f"{shard}.tar").write_bytes((shards / f"{shard}.tar").read_bytes()[:5000])
    (_, first), (_, second) = run_ranks(2, _open_on_ranks, str(shards), tmp_path / "cache", 9)
    assert first == second
    for part in ("0.tar: damaged", "2.tar: damaged", "1.tar: sample '000019' has label 9, outside 0..8 (1 such)"):
        assert part in first
    assert "set data.num_classes" in first
    assert "(on every rank: True)" in first


def test_declared_counts_are_held_against_the_shards(tmp_path: Path, world: World) -> None:
    write_shard(tmp_path / "0.tar", count=5)
    split = {"name": "train", "filenames": ["0.tar"], "shard_lengths": [6]}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    with pytest.raises(DataError, match=r"0\.tar: 5 samples, but _info\.json declares 6"):
        open_dataset(str(tmp_path), DataConfig(cache_dir=tmp_path / "cache"), world)


def test_batches_of_a_config(cache_dir: Path, world: World) -> None:
    config = DataConfig(cache_dir=cache_dir)
    dataset = open_dataset(config.train, config, world)
    batches = training_batches(dataset, config, world, seed=0, batch_size=64, start=10**6)
    labels = Counter(label for batch in islice(batches, 45) for label in batch.labels.tolist())
    batches.close()
    assert sum(labels.values()) == 45 * 64
    assert min(labels.values()) > 200
    assert sum(len(batch.labels) for batch in evaluation_batches(dataset, config, world, 256)) == 1437


def png(size: int, level: int = 0) -> bytes:
    return encode_png(np.full((size, size), level, np.uint8))


def write_shard(path: Path, *, first: int = 0, count: int) -> Path:
    """Samples first, first + 1, …: 4×4 images of that grey level, labelled by the last digit."""
    samples = range(first, first + count)
    members = [each for i in samples for each in ((f"{i:06d}.png", png(4, level=i)), (f"{i:06d}.cls", str(i % 10).encode()))]
    return write_tar(path, members)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
