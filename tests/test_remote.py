"""Remote shards: what servers do to a download, what processes do to the cache, and that nobody who reads notices."""

import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path

import fsspec
import pytest
import torch
from filelock import FileLock

from gandist.data.cache import ShardCache
from gandist.data.decode import ImageFormat
from gandist.data.index import LabelRule
from gandist.data.loader import Batch, ShardReader, TrainingBatches, load_batches
from gandist.data.order import SampleOrder
from gandist.data.prefetch import PARALLEL_DOWNLOADS, Prefetcher
from gandist.data.remote import TRIES, Remote
from gandist.data.shards import LabelPolicy, ShardDataset, open_shards
from gandist.data.sources import Shard, find_shards
from gandist.data.storage import Storage
from gandist.distributed import World
from gandist.errors import DataError
from tests.ranks import ROOT, run_ranks
from tests.shards import open_files, write_shard, write_shards
from tests.small_disk import mount_small_disk
from tests.web import Web

PATIENT = Remote(timeout=60)
KIB = 1024
KEPT = (".tar", ".partial")


@pytest.fixture
def web(tmp_path) -> Iterator[Web]:
    with Web(tmp_path / "web") as web:
        yield web


@pytest.fixture
def cache_dir(tmp_path) -> Path:
    return tmp_path / "cache"


def fetch(folder: Path, url: str, limit: int = 10**9, remote: Remote = PATIENT) -> bytes:
    with ShardCache(folder, limit, remote).fetch(url, lambda path: None) as file:
        return file.read()


def kept(folder: Path) -> list[str]:
    return [entry.name for entry in os.scandir(folder) if entry.name.endswith(KEPT)] if folder.exists() else []


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def wait_until(done: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------------------- transport


@pytest.mark.parametrize(
    "answers",
    [[], [503, 503], [429], ["short"], ["stall"], ["unsized"], ["redirect"], ["gzip"]],
    ids=lambda answers: "-".join(map(str, answers)) or "plain",
)
def test_what_a_server_may_do_to_a_download(web, cache_dir, answers) -> None:
    content = noise(3 << 20)
    url = web.put("0.tar", content)
    web.put("moved/0.tar", content)
    web.will("0.tar", *answers)
    assert fetch(cache_dir, url, remote=Remote(timeout=2 if "stall" in answers else 60)) == content
    assert web.asked("0.tar") == 1 + len([each for each in answers if each not in ("unsized", "redirect", "gzip")])
    assert len(kept(cache_dir)) == 1


@pytest.mark.parametrize(
    ("answer", "requests", "timeout"),
    [(404, 1, 60), (403, 1, 60), (503, TRIES, 1), ("short", TRIES, 1), ("stall", TRIES, 0.5)],
)
def test_a_download_that_fails_for_good(web, cache_dir, answer, requests, timeout) -> None:
    url = web.put("0.tar", noise(KIB))
    web.will("0.tar", then=answer)
    with pytest.raises(DataError, match=url) as failure:
        fetch(cache_dir, url, remote=Remote(timeout=timeout))
    assert str(answer) in str(failure.value) or isinstance(answer, str)
    assert "data.cache_dir" not in str(failure.value), "it is not the disk"
    assert web.asked("0.tar") == requests
    assert not kept(cache_dir)


def test_nobody_answers(cache_dir) -> None:
    with Web(cache_dir.parent / "closed") as web:
        url = f"{web.url}/0.tar"
    with pytest.raises(DataError, match=f"{url}: .*refused"):
        fetch(cache_dir, url, remote=Remote(timeout=0.2))


def test_pipes(tmp_path, cache_dir) -> None:
    (tmp_path / "0.tar").write_bytes(noise(3 << 20))
    url = f"pipe:cat {tmp_path}/0.tar"
    with pytest.raises(DataError, match=r"data\.allow_pipe"):
        fetch(cache_dir, url)
    assert fetch(cache_dir, url, remote=Remote(allow_pipe=True)) == noise(3 << 20)
    with pytest.raises(DataError, match=f"{url}; exit 7: exit status 7"):
        fetch(cache_dir, f"{url}; exit 7", remote=Remote(timeout=0.2, allow_pipe=True))


@pytest.mark.parametrize("command", ["sleep 1000; true", "sleep 1000 &", "exec >&-; sleep 1000"])
def test_a_pipe_that_hangs_is_killed_with_all_it_started(tmp_path, cache_dir, command) -> None:
    pids = tmp_path / "pids"
    with pytest.raises(DataError, match=r"sleep 1000.*: .*0\.3 s"):
        fetch(cache_dir, f"pipe:echo $$ >> {pids}; {command}", remote=Remote(timeout=0.3, allow_pipe=True))
    groups = [int(line) for line in pids.read_text().split()]
    assert len(groups) == TRIES
    wait_until(lambda: not any(map(_lives, groups)), "processes are left")


def _lives(group: int) -> bool:
    """Whether a process of this group is more than a zombie."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, of = file.read_text().rpartition(")")[2].split()[:3]
            if int(of) == group and state != "Z":
                return True
    return False


# -------------------------------------------------------------------------------------------------------------- cache


def test_a_process_is_killed_in_mid_download(web, cache_dir) -> None:
    content = {name: noise(100 * KIB, seed) for seed, name in enumerate(["0.tar", "1.tar"])}
    urls = [web.put(name, each) for name, each in content.items()]
    web.will("0.tar", "stall")
    process = multiprocessing.get_context("forkserver").Process(target=fetch, args=(cache_dir, urls[0]))
    process.start()
    wait_until(lambda: any(path.stat().st_blocks for path in cache_dir.glob("*.partial")), "no download begins")
    process.kill()
    process.join()
    (left,) = kept(cache_dir)
    assert left.endswith(".partial")
    with FileLock(cache_dir / Path(left).with_suffix(".lock"), timeout=5):
        pass
    assert fetch(cache_dir, urls[1], limit=150 * KIB) == content["1.tar"]
    assert left not in kept(cache_dir), "it is cleared away where room is needed"
    assert fetch(cache_dir, urls[0]) == content["0.tar"]
    assert web.asked("0.tar") == 2


def test_one_process_downloads_for_all(web, cache_dir) -> None:
    url = web.put("0.tar", noise(3 << 20))
    digests = run_ranks(8, _fetch_digest, cache_dir, url)
    assert set(digests) == {hashlib.sha256(noise(3 << 20)).hexdigest()}
    assert web.asked("0.tar") == 1


def _fetch_digest(folder: Path, url: str) -> str:
    return hashlib.sha256(fetch(folder, url)).hexdigest()


@pytest.mark.parametrize("answer", [200, "unsized"])
def test_the_limit_holds_at_every_moment(web, cache_dir, answer) -> None:
    names = {f"{i}.tar": noise(random.Random(i).randrange(1, 40 * KIB), i) for i in range(16)}
    limit = 200 * KIB
    for name, content in names.items():
        web.put(name, content)
        web.will(name, then=answer)
    totals = []
    with ThreadPoolExecutor(1) as background:
        ranks = background.submit(run_ranks, 4, _fetch_many, cache_dir, web.url, names, limit)
        while not ranks.done():
            totals.append(_total(cache_dir))
            time.sleep(0.002)
        ranks.result()
    assert len(totals) > 10
    apparent, allocated = (max(column) for column in zip(*totals, strict=True))
    assert limit / 2 < apparent <= limit
    assert allocated <= limit + 4 * KIB * len(names)  # the last block of each file
    assert _total(cache_dir)[0] <= limit
    assert len(web.log) > len(names), "nothing was evicted, the test shows nothing"


def _total(folder: Path) -> tuple[int, int]:
    """Bytes in the cache, and bytes allocated, while nobody may change that."""
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "room.lock"):
        files = {}
        for name in kept(folder):
            try:
                status = (folder / name).stat()
            except FileNotFoundError:
                continue
            files[status.st_ino] = status.st_size, status.st_blocks * 512
    return sum(size for size, _ in files.values()), sum(blocks for _, blocks in files.values())


def _fetch_many(folder: Path, url: str, names: dict[str, bytes], limit: int) -> None:
    for name in random.Random(os.getpid()).choices(list(names), k=40):
        assert fetch(folder, f"{url}/{name}", limit) == names[name]


@pytest.mark.parametrize("answer", [200, "unsized"])
def test_the_least_recently_used_make_room(web, cache_dir, answer) -> None:
    for name in (names := ["0.tar", "1.tar", "2.tar", "3.tar"]):
        web.put(name, noise(10 * KIB))
        web.will(name, then=answer)
    for name in [*names[:3], "0.tar", "3.tar", "0.tar", "2.tar", "1.tar"]:
        fetch(cache_dir, f"{web.url}/{name}", limit=35 * KIB)
        time.sleep(0.02)  # the clock of a file system has coarse ticks
    assert [web.asked(name) for name in names] == [1, 2, 1, 1]
    web.put("big.tar", noise(36 * KIB))
    web.will("big.tar", then=answer)
    with pytest.raises(DataError, match=r"big\.tar.*data\.cache_limit"):
        fetch(cache_dir, f"{web.url}/big.tar", limit=35 * KIB)
    assert not [name for name in kept(cache_dir) if name.endswith(".partial")]


def test_a_full_disk(web, tmp_path) -> None:
    for name in ("0.tar", "1.tar", "2.tar"):
        web.put(name, noise(400 * KIB))
    web.put("big.tar", noise(2000 * KIB))
    web.will("2.tar", then="unsized")
    (tmp_path / "disk").mkdir()
    ((kept_names, failure, left),) = run_ranks(1, _fetch_to_small_disk, tmp_path / "disk", web.url)
    assert kept_names == [1, 1, 1]
    assert "No space left on device" in failure
    assert "data.cache_dir" in failure
    assert not left


def _fetch_to_small_disk(disk: Path, url: str) -> tuple[list[int], str, list[str]]:
    """With a disk of 700 KiB, of which the limit knows nothing."""
    mount_small_disk(disk, 700 * KIB)
    counts = []
    for name in ("0.tar", "1.tar", "2.tar"):
        assert fetch(disk / "shards", f"{url}/{name}") == noise(400 * KIB)
        counts.append(len(kept(disk / "shards")))
    with pytest.raises(DataError) as failure:
        fetch(disk / "shards", f"{url}/big.tar")
    return counts, str(failure.value), kept(disk / "shards")


def test_a_full_disk_has_no_room_for_an_index(web, tmp_path) -> None:
    write_shards(web.folder, [120, 120])
    (tmp_path / "disk").mkdir()
    ((kept_count, failure, left),) = run_ranks(1, _index_on_small_disk, tmp_path / "disk", web.url)
    assert kept_count == 1, "the older shard makes room"
    assert "No space left on device" in failure
    assert [path.suffix for path in left] == [".npy"] * 2


def _index_on_small_disk(disk: Path, url: str) -> tuple[int, str, list[Path]]:
    """Where the shards find room, but not their indices."""
    mount_small_disk(disk, 800 * KIB)
    storage = Storage(disk / "index", ShardCache(disk / "shards", 10**9, PATIENT), LabelRule())
    shards = [Shard(f"{url}/{name}") for name in ("0000.tar", "0001.tar")]

    def fill(but: int) -> None:
        with (disk / "filler").open("ab") as file:
            file.write(bytes(shutil.disk_usage(disk).free - but))

    with storage.open(shards[0]).file as file:
        size = os.fstat(file.fileno()).st_blocks * 512
    fill(but=size)
    storage.open(shards[1]).file.close()
    count = len(kept(disk / "shards"))
    fill(but=0)
    with pytest.raises(DataError) as failure:
        storage.open(shards[0])
    return count, str(failure.value), list((disk / "index").iterdir())


# ------------------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("damage", ["page", "truncated", "count", "sha256"])
def test_damaged_downloads_leave_nothing(web, cache_dir, world, damage) -> None:
    path = write_shard(web.folder / "0.tar", count=5)
    content = path.read_bytes()
    declared = {"count": 6 if damage == "count" else 5, "sha256": hashlib.sha256(content).hexdigest()}
    if damage == "page":
        path.write_bytes(b"<!DOCTYPE html><title>Sign in</title>" * 40)
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    if damage == "sha256":
        declared["sha256"] = "0" * 64
    elif damage != "count":
        del declared["sha256"]
    write_info(web.folder, {"train": {"0.tar": declared}})
    with pytest.raises(DataError, match=f"{web.url}/0.tar"):
        open_files(web.url, cache_dir, world)
    assert not kept(cache_dir / "shards")
    assert not [path for path in (cache_dir / "index").glob("*") if path.suffix != ".lock"]
    assert web.asked("0.tar") == 1


def write_info(folder: Path, splits: dict[str, dict[str, dict]]) -> None:
    """timm's `_info.json`."""
    info = {
        name: {
            "filenames": list(shards),
            "shard_lengths": [declared["count"] for declared in shards.values()],
            "sha256": [declared.get("sha256") for declared in shards.values()],
        }
        for name, shards in splits.items()
    }
    (folder / "_info.json").write_text(json.dumps({"splits": info}))


def test_a_shard_that_is_another_when_it_comes_again(web, cache_dir, world) -> None:
    write_shards(web.folder, [5])
    dataset = open_files(f"{web.url}/0000.tar", cache_dir, world)
    assert dataset.fetch(0) > 0
    for path in (cache_dir / "shards").glob("*.tar"):
        path.unlink()
    write_shard(web.folder / "0000.tar", first=3, count=5)
    with pytest.raises(DataError, match=f"{web.url}/0000.tar: is not what it was"):
        dataset.read([0])
    assert not kept(cache_dir / "shards")


# ------------------------------------------------------------------------------------------------------------ listing


@pytest.fixture(scope="module")
def bucket(tmp_path_factory) -> Iterator[str]:
    """s3://, as moto's server has it."""
    from moto.server import ThreadedMotoServer  # slow to import, and all processes that are started here import this file

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(params=["file", "s3"])
def store(request, tmp_path) -> str:
    """URL of an object store's folder."""
    if request.param == "file":
        return f"file://{tmp_path}/store"
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


@pytest.mark.parametrize("spec", ["/{0000..0002}.tar", "/*.tar", "", "/"])
@pytest.mark.parametrize("with_info", [False, True])
def test_object_stores(store, tmp_path, cache_dir, world, spec, with_info) -> None:
    write_shards(tmp_path / "local", [5, 4, 6])
    if with_info:
        write_info(tmp_path / "local", {"train": {f"{i:04d}.tar": {"count": size} for i, size in enumerate([5, 4, 6])}})
    fsspec.filesystem(store.partition(":")[0]).put(f"{tmp_path}/local/", f"{store}/", recursive=True)
    dataset = open_patiently(f"{store}{spec}", cache_dir, world, scan_all=False)
    assert len(kept(cache_dir / "shards")) == (0 if with_info else 3)
    assert [shard.url for shard in dataset.shards] == [f"{store}/{i:04d}.tar" for i in range(3)]
    local = open_files(str(tmp_path / "local"), tmp_path / "other", world)
    expected = list(islice(batches_of(local, 0), 10))
    for workers in (0, 2):
        assert equal(list(islice(batches_of(dataset, workers), 10)), expected)


@pytest.mark.parametrize("name", ["0.tar", "*.tar", ""])
def test_nothing_in_an_object_store(store, cache_dir, world, name) -> None:
    with pytest.raises(DataError, match=re.escape(f"{store}/{name}".rstrip("/"))):
        open_patiently(f"{store}/{name}", cache_dir, world)


def test_an_object_store_without_credentials(bucket, cache_dir, world, monkeypatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(DataError, match=rf"{bucket}/\*\.tar: .*credentials"):
        open_patiently(f"{bucket}/*.tar", cache_dir, world)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_an_object_store_without_its_package(cache_dir, world) -> None:
    with pytest.raises(DataError, match=r"gs://bucket/0\.tar.*pip install 'gandist\[gcs\]'"):
        open_patiently("gs://bucket/0.tar", cache_dir, world)


@pytest.fixture(params=["local", "http"])
def folder_url(request, web) -> str:
    return web.url if request.param == "http" else str(web.folder)


def write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values))


COUNTS = {"0000.tar": 5, "0001.tar": 4, "0002.tar": 6}


def write_stats(folder: Path) -> None:
    for name, count in COUNTS.items():
        write_json(folder / name.replace(".tar", "_stats.json"), {"count": 9, "successes": count})


def write_wids(folder: Path) -> None:
    shards = [{"url": name, "nsamples": count} for name, count in COUNTS.items()]
    write_json(folder / "index.json", {"wids_version": 1, "shardlist": shards})


def write_sizes(folder: Path) -> None:
    write_json(folder / "sizes.json", COUNTS)


def write_split(folder: Path) -> None:
    write_info(folder, {"train": {name: {"count": count} for name, count in COUNTS.items()}, "test": {"t.tar": {"count": 1}}})


@pytest.mark.parametrize(
    ("declare", "spec", "file"),
    [
        (write_split, "", "_info.json"),
        (write_split, "/{0000..0002}.tar", "_info.json"),
        (write_sizes, "/{0000..0002}.tar", "sizes.json"),
        (write_stats, "/{0000..0002}.tar", "0001_stats.json"),
        (write_wids, "/index.json", "index.json"),
    ],
)
def test_what_is_declared_beside_shards(web, folder_url, cache_dir, world, declare, spec, file) -> None:
    write_shards(web.folder, [5, 4, 6])
    declare(web.folder)
    dataset = open_patiently(f"{folder_url}{spec}", cache_dir, world, scan_all=False)
    assert dataset.shard_sizes == (5, 4, 6)
    assert [shard.name for shard in dataset.shards] == ["0000.tar", "0001.tar", "0002.tar"]
    assert not [path for path in web.log if path.endswith(".tar")]
    assert not (cache_dir / "index").exists(), "no shard was looked into"
    assert [sample.label for sample in dataset.read([7, 12])] == [7, 2]
    for damage, what in (("{", "not valid JSON"), ('{"splits": {"train": 3}, "0001.tar": "x"}', "not in the form")):
        (web.folder / file).write_text(damage)
        with pytest.raises(DataError, match=f"{folder_url}/{file}: {what}"):
            open_patiently(f"{folder_url}{spec}", cache_dir, world, scan_all=False)


def test_splits_of_a_folder(web, folder_url) -> None:
    write_split(web.folder)
    (web.folder / "t.tar").touch()
    assert [(shard.name, shard.count) for shard in find_shards(folder_url, PATIENT, split="test").shards] == [("t.tar", 1)]
    write_info(web.folder, {"one": {"t.tar": {"count": 1}}, "other": {"t.tar": {"count": 1}}})
    with pytest.raises(DataError, match="the splits one, other"):
        find_shards(folder_url, PATIENT)


def test_a_web_folder_that_declares_nothing(web) -> None:
    write_shards(web.folder, [5])
    with pytest.raises(DataError, match=f"{web.url}: a web folder without _info.json"):
        find_shards(web.url, PATIENT)
    web.will("_info.json", then=503)
    with pytest.raises(DataError, match=f"{web.url}/_info.json: HTTP 503"):
        find_shards(web.url, Remote(timeout=0.5))


# ------------------------------------------------------------------------------------------------------------ reading

SIZES = [12, 9, 11, 12, 7, 12, 10, 8, 12, 11]
NAMES = [f"{i:04d}.tar" for i in range(len(SIZES))]


def open_patiently(spec: str, folder: Path, world: World | None, limit: int = 10**9, scan_all: bool = True) -> ShardDataset:
    storage = Storage(folder / "index", ShardCache(folder / "shards", limit, PATIENT), LabelRule())
    return open_shards(find_shards(spec, PATIENT), storage, LabelPolicy(10), world, scan_all=scan_all)


def batches_of(dataset: ShardDataset, workers: int, block: int = 2, batch: int = 2) -> Iterator[Batch]:
    order = SampleOrder(dataset.shard_sizes, seed=1, shuffle_block=block)
    reader = ShardReader(dataset, ImageFormat(4, 1))
    return load_batches(reader, TrainingBatches(order, batch, 0, 1, 0), dataset, num_workers=workers)


def equal(some: list[Batch], others: list[Batch]) -> bool:
    return len(some) == len(others) and all(
        torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
        for one, other in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tiny_cache_changes_nothing(web, tmp_path, cache_dir, world, workers) -> None:
    paths = write_shards(web.folder.parent / "local", SIZES)
    for path in paths:
        (web.folder / path.name).write_bytes(path.read_bytes())
    limit = int(4.5 * max(path.stat().st_size for path in paths))
    count = 3 * sum(SIZES) // 4
    local = list(islice(batches_of(open_files(str(paths[0].parent), tmp_path / "other", world), 0), count))
    cached = open_patiently(f"{web.url}/{{0000..0009}}.tar", cache_dir, world, limit=limit)
    assert equal(list(islice(batches_of(cached, workers), count)), local)
    assert web.asked(NAMES) > len(NAMES), "nothing was evicted, the test shows nothing"
    assert _total(cache_dir / "shards")[0] <= limit


def test_an_evicted_shard_is_read_on_and_then_let_go(web, cache_dir, world) -> None:
    paths = write_shards(web.folder, [5, 5])
    dataset = open_patiently(f"{web.url}/{{0000..0001}}.tar", cache_dir, world, limit=int(1.5 * paths[0].stat().st_size))
    first = dataset.read([0])
    dataset.fetch(1)
    requests = len(web.log)
    assert _deleted(cache_dir) == 1
    assert dataset.read([0]) == first
    assert dataset.read([3])[0].label == 3
    assert len(web.log) == requests
    assert dataset.read([7])[0].label == 7
    assert _deleted(cache_dir) == 0


def _deleted(folder: Path) -> int:
    """Files of a folder that are gone and still open here."""
    names = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.islink(entry.path)]
    return len([name for name in names if name.startswith(str(folder)) and name.endswith("(deleted)")])


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_come_before_they_are_needed(web, cache_dir, world, workers) -> None:
    write_shards(web.folder, SIZES)
    write_info(web.folder, {"train": {name: {"count": size} for name, size in zip(NAMES, SIZES, strict=True)}})
    dataset = open_patiently(web.url, cache_dir, world, scan_all=False)
    assert web.asked(NAMES) == 0
    order = SampleOrder(dataset.shard_sizes, seed=1, shuffle_block=2)
    soon = [NAMES[shard] for start in (0, order.block(0).end) for shard in order.block(start).shards]
    batches = batches_of(dataset, workers)
    read = [next(batches)]
    wait_until(lambda: web.asked(soon) == 4, "the next block does not come")
    assert web.asked(NAMES) == 4
    read += islice(batches, sum(SIZES) // 2 - 1)
    levels = Counter(torch.cat([batch.images for batch in read]).flatten(1)[:, 0].tolist())
    assert levels == Counter(range(sum(SIZES)))
    assert [web.asked(name) for name in NAMES] == [1] * len(NAMES)


def test_what_is_no_longer_wanted_is_not_prefetched(web, cache_dir, world) -> None:
    write_shards(web.folder, SIZES)
    write_info(web.folder, {"train": {name: {"count": size} for name, size in zip(NAMES, SIZES, strict=True)}})
    for name in NAMES[:PARALLEL_DOWNLOADS]:
        web.will(name, "stall")
    prefetcher = Prefetcher(open_patiently(web.url, cache_dir, world, scan_all=False))
    prefetcher.want(range(8))
    wait_until(lambda: web.asked(NAMES) == PARALLEL_DOWNLOADS, "no download begins")
    prefetcher.want([8, 9])
    web.released.set()
    wait_until(lambda: len(kept(cache_dir / "shards")) == PARALLEL_DOWNLOADS + 2, "the downloads do not end")
    assert web.asked(NAMES[PARALLEL_DOWNLOADS:8]) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_too_small_for_what_is_shuffled(web, cache_dir, world, workers) -> None:
    path, *_ = write_shards(web.folder, [12] * 4)
    write_info(web.folder, {"train": {name: {"count": 12} for name in NAMES[:4]}})
    dataset = open_patiently(web.url, cache_dir, world, limit=int(3.5 * path.stat().st_size), scan_all=False)
    with pytest.raises(DataError, match=r"data\.cache_limit.*data\.shuffle_block"):
        for _ in islice(batches_of(dataset, workers), 1000):
            pass


def test_staged_shards_are_copied_and_read_there(tmp_path, cache_dir, world) -> None:
    paths = write_shards(tmp_path / "local", SIZES)
    in_place = open_files(str(tmp_path / "local"), tmp_path / "other", world)
    local = list(islice(batches_of(in_place, 0), 60))
    staged = open_files(str(tmp_path / "local"), cache_dir, world, stage=True)
    assert staged.is_cached
    assert staged.fingerprint == in_place.fingerprint
    assert len(kept(cache_dir / "shards")) == len(SIZES)
    for path in paths:
        path.rename(path.with_suffix(".away"))
    assert equal(list(islice(batches_of(staged, 0), 60)), local)


def test_a_process_ends_while_shards_come(web, cache_dir) -> None:
    """With downloads under way that never end, in threads of its own and of a worker."""
    write_shards(web.folder, SIZES)
    write_info(web.folder, {"train": {name: {"count": size} for name, size in zip(NAMES, SIZES, strict=True)}})
    order = SampleOrder(SIZES, seed=1, shuffle_block=2)
    for shard in order.block(order.block(0).end).shards:
        web.will(NAMES[shard], then="stall")
    script = f"from tests.test_remote import leave; leave({web.url!r}, {str(cache_dir)!r})"
    child = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    _, errors = child.communicate(timeout=120)
    assert (child.returncode, errors) == (0, "")
    for lock in (cache_dir / "shards").glob("*.lock"):
        with FileLock(lock, timeout=5):
            pass


def leave(url: str, folder: str) -> None:
    dataset = open_patiently(url, Path(folder), None, scan_all=False)
    unfinished = []
    for workers in (2, 0):
        unfinished.append(batches_of(dataset, workers))
        next(unfinished[-1])
    shards = Path(folder) / "shards"
    wait_until(lambda: len(list(shards.glob("*.partial"))) == 2, "no download begins")
