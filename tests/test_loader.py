"""Batches: the same whatever the ranks, workers and storage; pixels as every decoder has them; bad images named or skipped."""

import io
import multiprocessing
import os
import re
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

from gandist.config import DataConfig
from gandist.data import Dataset, decode, open_dataset
from gandist.data.ahead import ahead
from gandist.data.decode import ImageError, ImageFormat, decode_into, fit
from gandist.data.loader import EvaluationBatches, ShardReader, TrainingBatches, load_batches
from gandist.data.order import SampleOrder
from gandist.data.shards import ShardDataset
from gandist.distributed import World, join_world
from gandist.errors import DataError
from tests.ranks import run_ranks
from tests.shards import open_files, png, write_shards, write_tar
from tests.small_disk import mount_small_disk

TINY = ImageFormat(4, 1)


def read_numbers(dataset: ShardDataset, batches: TrainingBatches, steps: int, num_workers: int = 0) -> np.ndarray:
    """Which samples the loader gives: `write_shards` paints their numbers. int64 [steps, B / world_size]"""
    loaded = load_batches(ShardReader(dataset, TINY), batches, dataset, num_workers=num_workers)
    rows = []
    for images, labels, _ in islice(loaded, steps):
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (4, 4, 1)
        rows.append(images[:, 0, 0, 0].numpy())
        assert (labels.numpy() == rows[-1] % 10).all()
    loaded.close()
    return np.stack(rows)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_the_loader_gives_the_same_global_batches(tmp_path: Path, world: World, world_size: int, num_workers: int) -> None:
    sizes, batch_size, start = [7, 1, 12, 3, 31, 2], 24, 4
    write_shards(tmp_path / "a", sizes)
    dataset = open_files(str(tmp_path / "a"), tmp_path / "cache", world)
    order = SampleOrder(sizes, seed=3, shuffle_block=4, lanes=8)
    steps = 2 * sum(sizes) // batch_size
    dealt = np.zeros((steps, batch_size), int)
    for rank in {0, world_size // 2, world_size - 1}:
        batches = TrainingBatches(order, batch_size, rank, world_size, start)
        dealt[:, rank::world_size] = read_numbers(dataset, batches, steps, num_workers)
        expected = order.samples(np.arange(start, start + dealt.size)).reshape(dealt.shape)
        assert (dealt[:, rank::world_size] == expected[:, rank::world_size]).all()


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    batch=st.integers(1, 5),
    world_size=st.integers(1, 4),
    block=st.integers(0, 3),
    lanes=st.integers(1, 4),
    start=st.integers(0, 300),
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_read_is_what_was_ordered(tmp_path_factory, world, sizes, batch, world_size, block, lanes, start) -> None:
    folder = tmp_path_factory.mktemp("any")
    write_shards(folder / "a", sizes)
    dataset = open_files(str(folder / "a"), folder / "cache", world)
    order = SampleOrder(sizes, seed=1, shuffle_block=block, lanes=lanes)
    batch_size = batch * world_size
    dealt = np.zeros((3, batch_size), int)
    for rank in range(world_size):
        dealt[:, rank::world_size] = read_numbers(dataset, TrainingBatches(order, batch_size, rank, world_size, start), 3)
    assert dealt.ravel().tolist() == order.samples(np.arange(start, start + dealt.size)).tolist()


def test_held_in_memory_or_not_batches_are_the_same(tmp_path: Path, world: World) -> None:
    def batches(**options) -> list[tuple[torch.Tensor, torch.Tensor]]:
        dataset = open_dataset("digits:train", DataConfig(cache_dir=tmp_path, **options), world)
        training = dataset.training_batches(seed=3, batch_size=100, start=1400)
        return [batch[:2] for batch in [*islice(training, 3), *dataset.evaluation_batches(500)]]

    expected = batches(in_memory=0, num_workers=0)
    assert sum(len(labels) for _, labels in expected) == 300 + 1437
    for options in ({}, {}, {"in_memory": 0, "num_workers": 2}, {"stage": True, "in_memory": 0}, {"stage": True}):
        for (images, labels), (expected_images, expected_labels) in zip(batches(**options), expected, strict=True):
            assert torch.equal(images, expected_images)
            assert torch.equal(labels, expected_labels)
    assert len(list((tmp_path / "decoded").iterdir())) == 2, "in place and staged: found again the second time"


def test_changed_pixels_are_not_taken_from_memory(tmp_path: Path, world: World) -> None:
    """Uncompressed images are all of one size: nothing but the content tells them apart."""
    (path,) = write_shards(tmp_path / "a", [50])
    config = DataConfig(train=str(tmp_path / "a"), cache_dir=tmp_path / "cache", resolution=4)

    def images() -> torch.Tensor:
        return next(open_dataset(config.train, config, world).evaluation_batches(50)).images

    before = images()
    content = path.read_bytes()
    pixels = png(4, 25)
    path.write_bytes(content.replace(pixels, png(4, 99)))
    after = images()
    assert (before[25] == 25).all()
    assert (after[25] == 99).all()
    assert torch.equal(before[:25], after[:25])


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def photo(width: int, height: int) -> Image.Image:
    """Smooth noise, as decoders of JPEG differ in."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"form": "jpeg", "quality": 95, "subsampling": 0},
        {"form": "jpeg", "quality": 75},
        {"form": "jpeg", "quality": 90, "progressive": True},
        {"form": "jpeg", "mode": "L"},
        {"form": "jpeg", "mode": "CMYK"},
        {"form": "png"},
        {"form": "png", "mode": "L"},
        {"form": "png", "mode": "P"},
        {"form": "png", "mode": "LA"},
        {"form": "png", "mode": "1"},
        {"form": "webp", "lossless": True},
        {"form": "webp", "quality": 90},
    ],
    ids=str,
)
def test_decoders_agree_to_the_bit(options: dict, channels: int) -> None:
    """With simplejpeg or without, the pixels are torchvision's, or Pillow's where torchvision has none."""
    assert decode.simplejpeg is not None
    options = dict(options)
    form = options.pop("form")
    image = encoded(photo(30, 30).convert(options.pop("mode", "RGB")), form, **options)
    pixels = np.empty((30, 30, channels), np.uint8)
    decode_into(pixels, image, ImageFormat(30, channels))
    assert (pixels == decode.decode(image, channels)).all(), "straight into the batch, and by itself"
    with Image.open(io.BytesIO(image)) as opened:
        pillow = np.asarray(opened.convert("L" if channels == 1 else "RGB")).reshape(pixels.shape)
    if form == "webp" and channels == 1:
        assert (pixels == pillow).all()
    else:
        mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
        reference = decode_image(torch.frombuffer(bytearray(image), dtype=torch.uint8), mode)
        assert (pixels == reference.permute(1, 2, 0).numpy()).all()
    if channels == 3 and form != "webp":
        assert (pixels == pillow).all()
    assert (pixels.astype(int) - pillow).__abs__().max() <= 12, "grey of colour is rounded in the decoder's own way"


def test_other_sizes() -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    assert (fit(wide, 10, "center-crop") == 200).all()
    stretched = fit(wide, 30, "stretch")
    assert stretched.shape == (30, 30, 3)
    assert (stretched[:, 14:16] >= 199).all()
    assert (stretched[:, :6] == 0).all()
    grey = fit(np.full((7, 5, 1), 9, np.uint8), 16, "center-crop")
    assert grey.shape == (16, 16, 1)
    assert (grey == 9).all()
    for wanted, box in (((10, 20), (10, 0, 50, 20)), ((20, 10), (25, 0, 35, 20)), ((2, 12), (0, 5, 60, 15))):
        image = photo(60, 20)
        for resize, part in (("center-crop", image.crop(box)), ("stretch", image)):
            reference = part.resize(wanted[::-1], Image.Resampling.LANCZOS)
            assert (fit(np.asarray(image), wanted, resize) == np.asarray(reference)).all()
    assert fit(np.full((1, 9, 3), 7, np.uint8), (9, 1), "center-crop").shape == (9, 1, 3)
    with pytest.raises(ImageError, match=r"60×20 pixels, but data\.resolution is \[16,32\]: .* images' size, \[20,60\], say"):
        fit(wide, (16, 32), "none")
    with pytest.raises(ImageError, match=r"60×20 pixels, but data\.resolution is 16.*say data\.resize=center-crop"):
        fit(wide, 16, "none")
    for data in (encoded(photo(60, 20), "png"), encoded(photo(60, 20), "jpeg")):
        pixels = np.empty((16, 16, 3), np.uint8)
        decode_into(pixels, data, ImageFormat(16, 3, "center-crop"))
        reference = Image.open(io.BytesIO(data)).crop((20, 0, 40, 20)).resize((16, 16), Image.Resampling.LANCZOS)
        assert (pixels == np.asarray(reference)).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"junk", "the image cannot be decoded"),
        (b"", "the image cannot be decoded"),
        (encoded(photo(4, 4), "jpeg")[:-80], "the image cannot be decoded"),
        (encoded(photo(4, 4), "png")[:-80], "the image cannot be decoded"),
        (encoded(Image.fromarray(np.zeros((4, 4), np.uint16)), "png"), "I;16 pixels, which are not 8 bits a channel"),
        (png(8), "8×8 pixels, but data.resolution is 4"),
    ],
)
def test_images_that_cannot_be_used_are_named(tmp_path: Path, world: World, content: bytes, message: str) -> None:
    members = [("ok.png", png(4)), ("ok.cls", b"1"), ("odd.png", content), ("odd.cls", b"2")]
    dataset = open_files(str(write_tar(tmp_path / "x.tar", members)), tmp_path / "cache", world)
    for workers in (0, 1):
        batches = load_batches(
            ShardReader(dataset, TINY), EvaluationBatches(dataset.shard_sizes, 1, 0, 1), dataset, num_workers=workers
        )
        assert next(batches).images.shape == (1, 4, 4, 1)
        with pytest.raises(DataError) as caught:
            next(batches)
        assert str(caught.value).startswith(f"{tmp_path}/x.tar: sample 'odd' (byte 2560): ")
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("number", "problem"),
    [(signal.SIGKILL, "a decoding worker was killed by SIGKILL"), (signal.SIGBUS, "/dev/shm is too small")],
)
def test_a_worker_that_dies_is_a_clear_error(tmp_path: Path, world: World, number: int, problem: str) -> None:
    write_shards(tmp_path / "a", [8])
    dataset = open_files(str(tmp_path / "a"), tmp_path / "cache", world)
    batches = TrainingBatches(SampleOrder([8], seed=0), 4, 0, 1, 0)
    with closing(load_batches(ShardReader(dataset, TINY), batches, dataset, num_workers=2)) as loaded:
        next(loaded)
        worker = multiprocessing.active_children()[0]
        os.kill(worker.pid, number)
        worker.join()
        with pytest.raises(DataError, match=problem):
            list(islice(loaded, 100))


def _fail_to_load(folder: Path) -> list[str]:
    """The errors with too few files, then with too little shared memory."""
    errors = []
    mount_small_disk(Path("/dev/shm"), 100_000)
    with join_world() as world:
        dataset = open_files(str(folder / "a"), folder / "cache", world)

        def load() -> None:
            reader = ShardReader(dataset, ImageFormat(256, 1, "stretch"))
            batches = load_batches(reader, EvaluationBatches(dataset.shard_sizes, 8, 0, 1), dataset, num_workers=1)
            with pytest.raises(DataError) as caught:
                list(batches)
            errors.append(str(caught.value))

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, hard))
        load()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        load()
    return errors


def test_too_few_files_and_too_little_shared_memory_are_clear_errors(tmp_path: Path) -> None:
    write_shards(tmp_path / "a", [8])
    ((files, memory),) = run_ranks(1, _fail_to_load, tmp_path)
    assert re.match(r"the limit of 20 open files is too low for data.num_workers=1: raise it \(ulimit -n 1024\)", files)
    assert "/dev/shm is too small" in memory
    assert "docker run --shm-size=8g" in memory
    assert "data.num_workers=0" in memory


def test_skipped_images_are_replaced_by_the_next_of_their_shard(tmp_path: Path, world: World) -> None:
    bad = {2, 3, 9}
    for shard in range(2):
        numbers = range(shard * 10, shard * 10 + 10)
        members = [(f"{i}.{end}", value) for i in numbers for end, value in _sample(i, i in bad)]
        write_tar(tmp_path / f"{shard}.tar", members)

    def dataset(**options) -> Dataset:
        spec, cache = [f"{tmp_path}/{shard}.tar" for shard in range(2)], tmp_path / "cache"
        return open_dataset(spec, DataConfig(cache_dir=cache, resolution=4, on_error="skip", **options), world)

    substitutes = {2: 4, 3: 4, 9: 0}
    for options in ({}, {"in_memory": 0, "num_workers": 0}, {"in_memory": 0, "num_workers": 2}):
        (images, labels, skipped) = next(dataset(**options).evaluation_batches(20))
        expected = [substitutes.get(i, i) for i in range(20)]
        assert images[:, 0, 0, 0].tolist() == expected
        assert labels.tolist() == [i % 10 for i in expected]
        assert set(skipped) == bad
        assert f"{tmp_path}/0.tar: sample '3' (byte " in skipped[3]
        assert "cannot be decoded" in skipped[3]
        training = islice(dataset(**options).training_batches(seed=0, batch_size=10, start=0), 6)
        assert Counter(sample for batch in training for sample in batch.skipped) == {2: 3, 3: 3, 9: 3}
    write_tar(tmp_path / "0.tar", [(f"0.{end}", value) for end, value in _sample(0, bad=True)])
    with pytest.raises(DataError, match="nor can any other sample of this shard be used"):
        next(dataset(in_memory=0, num_workers=0).evaluation_batches(20))


@pytest.mark.parametrize(("step", "block", "warned"), [(1, 0, False), (1, 2, True), (7, 2, False)])
def test_shards_that_are_sorted_by_class_are_warned_of(tmp_path, world, capsys, step, block, warned) -> None:
    numbers = [i * step % 100 for i in range(100)]
    for shard in range(10):
        members = [
            (f"{i}.{end}", value)
            for i in numbers[shard * 10 : shard * 10 + 10]
            for end, value in (("png", png(4)), ("cls", str(i // 10).encode()))
        ]
        write_tar(tmp_path / f"{shard}.tar", members)
    options = DataConfig(cache_dir=tmp_path / "cache", resolution=4, shuffle_block=block)
    open_dataset(str(tmp_path), options, world)
    assert ("sorted by class" in capsys.readouterr().out) == warned


def _sample(number: int, bad: bool) -> list[tuple[str, bytes]]:
    return [("png", b"junk" if bad else png(4, number)), ("cls", str(number % 10).encode())]


def test_a_thread_makes_two_batches_ahead_and_ends_with_its_reader() -> None:
    threads = set()
    made = []

    def numbers() -> Iterator[int]:
        for number in count():
            threads.add(threading.current_thread().name)
            made.append(number)
            yield number

    batches = ahead(numbers(), 2, begin=lambda: made.append("begun"))
    for number in range(5):
        assert next(batches) == number
        wait_until(lambda: len(made) == number + 4)  # noqa: B023
        time.sleep(0.02)
        assert made == ["begun", *range(number + 3)], "two beside the one that is used"
    batches.close()
    assert threads == {"batches"}
    assert "batches" not in {thread.name for thread in threading.enumerate()}


def test_what_a_thread_meets_is_raised_in_its_turn() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise DataError("shard-0: sample 7 is damaged")

    batches = ahead(broken(), 2, begin=lambda: None)
    assert next(batches) == 1
    with pytest.raises(DataError, match="sample 7 is damaged"):
        next(batches)
    assert list(ahead(iter("abc"), 2, begin=lambda: None)) == list("abc")
    assert "batches" not in {thread.name for thread in threading.enumerate()}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_for_a_gpu_a_thread_gathers_and_pins_images_and_labels(tmp_path: Path, world: World) -> None:
    """Where the set is in memory. A stand-in for pinning tells what was pinned, and that the main loop did not."""
    write_shards(tmp_path / "a", [8])
    pinned = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append((tensor.dtype, threading.current_thread() is threading.main_thread()))
        return tensor.clone()

    config = DataConfig(train=str(tmp_path / "a"), cache_dir=tmp_path / "cache", resolution=4, channels=1)
    dataset = open_dataset(config.train, config, replace(world, device=torch.device("cuda", 0)))
    with (
        patch.object(torch.Tensor, "pin_memory", pin),
        patch.object(torch.accelerator, "is_available", return_value=True),
        patch.object(torch.accelerator, "current_accelerator", return_value=torch.device("cuda")),
        patch.object(torch.accelerator, "current_device_index", return_value=0),
        patch.object(torch.cuda, "set_device"),
        patch("gandist.data.on_device", lambda batches, device: batches),
        closing(dataset.training_batches(seed=0, batch_size=4, start=0)) as batches,
    ):
        batch = next(batches)
    assert batch.labels.dtype == torch.int64
    assert {(torch.uint8, False), (torch.int64, False)} == set(pinned)
