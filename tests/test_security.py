"""Nothing runs that came as data, nobody else joins a run, and no secret is written anywhere."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
import yaml
from PIL import EpsImagePlugin, Image, features

import gandist
from gandist import checkpoint
from gandist.data.check import look_at
from gandist.data.decode import ImageError
from gandist.data.decode import decode as decode_image
from gandist.data.encode import upright
from gandist.data.remote import Remote
from gandist.distributed import World, join_world, run
from gandist.errors import ConfigError, DataError, GandistError
from gandist.given import open_images
from gandist.messages import decode, encode
from gandist.redaction import redact
from tests.ranks import ROOT, end_ranks, launch, run_command, run_ranks, start_ranks
from tests.web import Web

# ------------------------------------------------------------------------------------------------- between the ranks


class Trap:
    """Where it is unpickled, it leaves a file named like the process that did it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple:
        return exec, (f"import os; open('{self.folder}/' + str(os.getpid()), 'w')",)


VALUES = {
    "atoms": [None, True, -3, 0.1, float("inf"), "a\udc80é", b"\0\xff"],
    "containers": [(), ([1], (2,)), {}, {"path": Path("a\udc80"), 3: {(1, 2): []}}],
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_message_arrives_as_it_was_sent(value: object) -> None:
    assert decode(encode(value)) == value


def test_an_array_arrives_as_it_was_sent() -> None:
    array = np.arange(6, dtype=np.int64).reshape(2, 3)
    for sent in (array, array.T, array[:, ::2], np.zeros((0, 3)), np.array(True)):
        got = decode(encode([sent]))[0]
        assert (got.dtype, got.shape, got.tolist()) == (sent.dtype, sent.shape, sent.tolist())
        tensor = decode(encode({"x": torch.from_numpy(sent)}))["x"]
        assert tensor.equal(torch.from_numpy(sent))
        assert tensor.dtype == torch.from_numpy(sent).dtype


def test_what_no_message_holds_is_refused() -> None:
    for value in (ConfigError("x"), {1, 2}, object(), Trap(Path())):
        with pytest.raises(TypeError, match=f"a {type(value).__name__} is not sent between ranks"):
            encode([value])


@pytest.mark.parametrize(
    "value",
    ['{"path": 3}', '{"run": "x"}', "{}", '{"a": 1, "b": 2}', '{"dict": [[[], 1]]}', '{"array": "9"}', "[" * 10**5, "x"],
)
def test_a_message_of_another_form_is_one_error(value: str) -> None:
    for message in (value.encode(), encode("0" * len(value)).replace(b'"' + b"0" * len(value), value.encode() + b" ")):
        with pytest.raises(GandistError, match="a message that no rank of this run sends was received"):
            decode(message)


def _attack(folder: Path) -> tuple[int, str]:
    """Rank 1 sends a pickle where values are gathered, then rank 0 where one is broadcast; what the other one then raises."""
    with join_world() as world:
        try:
            if world.rank == 1:
                with suppress(Exception):  # it unpickles the answers
                    dist.all_gather_object([None] * 2, Trap(folder / "gathered"), group=world.control)
                world.broadcast(None)
            else:
                world.gather("hello")
        except GandistError as error:
            return os.getpid(), str(error)
        finally:
            if world.rank == 0:
                dist.broadcast_object_list([Trap(folder / "broadcast")], src=0, group=world.control)
        return os.getpid(), "no error"


def test_a_pickle_between_the_ranks_is_not_unpickled(tmp_path: Path) -> None:
    for name in ("gathered", "broadcast"):
        (tmp_path / name).mkdir()
    (process, *_), _ = answers = run_ranks(2, _attack, tmp_path)
    assert not (tmp_path / "gathered" / str(process)).exists()
    assert not list((tmp_path / "broadcast").iterdir())
    for _, error in answers:
        assert error.startswith("a message that no rank of this run sends was received")


# --------------------------------------------------------------------------------------------- the store of the ranks


STRANGER = {
    "LOCAL_WORLD_SIZE": "1",
    "GANDIST_JOIN_TIMEOUT": "20",
}  # rank 1 is on another node, so rank 0 listens on the network


def _join(error: Path, secret: str, trap: Trap | None) -> None:
    """As a rank does; trap: as a stranger does, who knows the port and not the secret, and sends a pickle."""
    os.environ |= STRANGER | {"LOCAL_RANK": "0", "GANDIST_SECRET": secret}
    os.dup2(os.open(error, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())

    def main() -> None:
        with join_world() as world:
            if trap:
                dist.all_gather_object([None] * world.size, trap, group=world.control)
            world.gather("hello")

    run(main)


def test_a_stranger_cannot_take_the_place_of_a_rank(tmp_path: Path) -> None:
    (folder := tmp_path / "ran").mkdir()
    errors = [tmp_path / f"{rank}.err" for rank in range(2)]
    works = [(_join, errors[0], "ours", None), (_join, errors[1], "", Trap(folder))]
    ranks = start_ranks(2, works.__getitem__)
    ranks[0].join(40)
    end_ranks(ranks)
    assert ranks[0].exitcode == 1
    assert not (folder / str(ranks[0].pid)).exists()
    said = r"error.*: the place of rank [01] has been taken by a process that does not know GANDIST_SECRET \([01] on "
    assert re.search(said, errors[0].read_text()), errors[0].read_text()


def _listening() -> list[str]:
    """The addresses on which this process serves the store."""
    port = int(os.environ["MASTER_PORT"])
    mine = (each for each in psutil.net_connections() if each.pid == os.getpid() and each.status == psutil.CONN_LISTEN)
    return [each.laddr.ip for each in mine if each.laddr.port == port]


def _where_rank_0_listens() -> list[str]:
    with join_world() as world:
        return world.broadcast(_listening())


def test_on_one_node_nobody_else_reaches_the_store() -> None:
    assert run_ranks(2, _where_rank_0_listens) == [["127.0.0.1"]] * 2


MEET_TWICE = """
import os
from concurrent.futures import ThreadPoolExecutor
from gandist.launcher import Launch
from gandist.rendezvous import meet

for port, place in {"29511": {}, "29512": {"one_node": True}}.items():
    os.environ["MASTER_PORT"] = port
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda rank: meet(Launch(rank, 2, 0, 1, **place), 10), range(2)))
print("met")
"""


def test_a_node_without_ipv4_whose_localhost_is_127_0_0_1(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    prepare = f"ip link set lo up && ip address delete 127.0.0.1/8 dev lo && mount --bind {tmp_path}/hosts /etc/hosts"
    alone = ["unshare", "--net", "--mount", "sh", "-c", f'{prepare} && exec "$@"', "sh"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a network of its own needs root")
    result = run_command(*alone, "env", "MASTER_ADDR=::1", "GANDIST_SECRET=a", sys.executable, "-c", MEET_TWICE)
    assert (result.returncode, result.stdout) == (0, "met\n"), result.stderr


# ------------------------------------------------------------------------------------------------------------ secrets

SECRETS = PASSWORD, SIGNATURE, NEXT_SIGNATURE = "PassW0rd", "S1gnature", "N3xtSignature"
CLASSES = ["<img src=x onerror=alert(1)>", "`two`", *map(str, range(2, 10))]


@pytest.fixture(scope="module")
def web(tmp_path_factory, cache_dir: Path) -> Iterator[Web]:
    """Serves the built-in digits."""
    with Web(tmp_path_factory.mktemp("web") / "served") as web:
        for path in (cache_dir / "digits-16").iterdir():
            web.put(path.name, path.read_bytes())
        info = json.loads((web.folder / "_info.json").read_text())
        web.put("_info.json", json.dumps(info | {"classes": CLASSES}).encode())
        yield web


def _data(web: Web, signature: str) -> list[str]:
    """Overrides that name the shards, behind a password and a signature."""
    base = web.url.replace("://", f"://user:{PASSWORD}@")
    last = {"train": 4, "test": 1}
    return [f"data.{split}={base}/digits-{split}-{{00..0{last[split]}}}.tar?sig={signature}&expires=1" for split in last]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache_dir: Path, web: Web) -> tuple[Path, str]:
    """A run on these, resumed with a new signature; and what it said."""
    run_dir = tmp_path_factory.mktemp("runs") / "secret"
    options = [f"run_dir={run_dir}", f"data.cache_dir={cache_dir}", "data.num_workers=0", "evaluation.metrics=[accuracy]"]
    options += ["tracking.wandb=offline", "train.kimg=0.256"]
    first = run_command(sys.executable, "-m", "gandist.train", *options, *_data(web, SIGNATURE))
    again = launch(1, "gandist.train", *options, *_data(web, NEXT_SIGNATURE), "train.kimg=0.512")
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    assert "resumed from" in again.stdout
    return run_dir, first.stdout + first.stderr + again.stdout + again.stderr


@pytest.fixture(scope="module")
def exported(trained: tuple[Path, str], tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "shared"
    result = launch(1, "gandist.export", str(trained[0]), str(folder))
    assert result.returncode == 0, result.stderr
    return folder


def _hold_no_secret(folder: Path) -> int:
    """How many files that are."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        content = path.read_bytes()
        for secret in SECRETS:
            assert secret.encode() not in content, f"{secret} is in {path}"
    return len(files)


def test_a_run_keeps_no_secret(trained: tuple[Path, str]) -> None:
    run_dir, said = trained
    assert not [secret for secret in SECRETS if secret in said]
    assert _hold_no_secret(run_dir) > 10
    assert list(run_dir.glob("wandb/offline-run-*/*.wandb"))
    kept = yaml.safe_load((run_dir / "config.yaml").read_text())["data"]["train"]
    assert re.fullmatch(r"http://REDACTED@127\.0\.0\.1:\d+/digits-train-\{00\.\.04\}\.tar\?REDACTED", kept)
    command = json.loads((run_dir / "starts.jsonl").read_text().splitlines()[0])["command"]
    assert "REDACTED@" in command
    assert "train.kimg=0.256" in command


def test_a_report_has_no_secret(trained: tuple[Path, str], tmp_path: Path) -> None:
    """Also of a run of an older version, which kept them."""
    old = shutil.copytree(trained[0], tmp_path / "old")
    for name in ("config.yaml", "starts.jsonl"):
        text = (old / name).read_text().replace("REDACTED@", f"user:{PASSWORD}@").replace("?REDACTED", f"?sig={SIGNATURE}")
        assert PASSWORD in text
        (old / name).write_text(text)
    page = tmp_path / "pages" / "report.html"
    page.parent.mkdir()
    result = launch(1, "gandist.report.__main__", str(old), "--output", str(page))
    assert result.returncode == 0, result.stderr
    assert _hold_no_secret(page.parent) == 1


def test_what_is_exported_has_no_secret_and_no_path(exported: Path, trained: tuple[Path, str], cache_dir: Path) -> None:
    assert _hold_no_secret(exported) == 4
    for name in ("gandist.json", "README.md"):
        text = (exported / name).read_text()
        for folder in (trained[0].parent, cache_dir, ROOT):
            assert str(folder) not in text, name
    assert json.loads((exported / "gandist.json").read_text())["origin"]["config"]["run_dir"] == "secret"


def test_class_names_in_a_model_card_are_text(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "<img" not in card
    assert r"10 classes: &lt;img src=x onerror=alert(1)&gt;, \`two\`, 2," in card
    assert gandist.load(exported).class_names == CLASSES


def test_a_redacted_run_is_evaluated_when_its_data_are_named_again(trained: tuple[Path, str], web: Web) -> None:
    result = launch(1, "gandist.evaluate", str(trained[0]))
    assert result.returncode == 1
    said = (
        r"error: http://REDACTED@\S+\?REDACTED: the folder of a run keeps no passwords and signatures: give .+ data\.train=…\n"
    )
    assert re.fullmatch(said, result.stderr), result.stderr
    result = launch(1, "gandist.evaluate", str(trained[0]), *_data(web, SIGNATURE))
    assert result.returncode == 0, result.stderr
    assert "classification/test_top1" in result.stdout


def test_errors_hold_no_secret(web: Web, capsys) -> None:
    url = f"{web.url.replace('://', f'://user:{PASSWORD}@')}/missing.tar?sig={SIGNATURE}"
    web.will("missing.tar?sig=" + SIGNATURE, 403, then=403)
    with pytest.raises(DataError, match=r"http://REDACTED@\S+/missing\.tar\?REDACTED: HTTP 403"):
        Remote().read(url)
    with pytest.raises(SystemExit):
        run(lambda: Path(url).read_text())  # an error that is not ours
    assert not [secret for secret in SECRETS if secret in capsys.readouterr().err]


@pytest.mark.parametrize(
    ("text", "expected"),
    {
        "http://user:a@h/x-{0..3}.tar?sig=b&c='d": "http://REDACTED@h/x-{0..3}.tar?REDACTED'd",
        "pipe:curl -s 'https://user:a@h/x?token' | cat": "pipe:curl -s 'https://REDACTED@h/x?REDACTED' | cat",
        "s3://key:secret@bucket/x.tar?versionId=3": "s3://REDACTED@bucket/x.tar?REDACTED",
        "s3://bucket/train-?.tar": "s3://bucket/train-?.tar",
        "az://container/x.tar?sv=1&sig=a/b=": "az://container/x.tar?REDACTED",
        "hf://datasets/a@main/x.tar": "hf://datasets/a@main/x.tar",
        "http://h:80/x@y": "http://h:80/x@y",
        "http://user:a#b/c@h/x": "http://REDACTED@h/x",
        "[http://h/x?a=b, http://h/y?c]: no": "[http://h/x?REDACTED, http://h/y?REDACTED]: no",
        "is it? a=b": "is it? a=b",
    }.items(),
)
def test_redaction(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected


# ------------------------------------------------------------------------------------------------ commands in a folder


def test_the_folder_of_a_run_permits_no_commands(trained: tuple[Path, str], tmp_path: Path, cache_dir: Path) -> None:
    run_dir = shutil.copytree(trained[0], tmp_path / "run")
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["data"] |= {"train": f"pipe:touch {tmp_path}/ran", "test": None, "allow_pipe": True}
    config["evaluation"]["metrics"] = []
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    result = launch(1, "gandist.evaluate", str(run_dir))
    assert result.returncode == 1
    assert not (tmp_path / "ran").exists()
    assert re.search(r"error: pipe:touch \S+: runs a command in a shell, which data\.allow_pipe=true allows", result.stderr)
    launch(1, "gandist.evaluate", str(run_dir), "data.allow_pipe=true")  # which its user says
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_what_is_loaded_permits_no_commands(
    kind: str, trained: tuple[Path, str], exported: Path, tmp_path: Path, world: World
) -> None:
    if kind == "export":
        path = file = shutil.copytree(exported, tmp_path / "copy") / "gandist.json"
    else:
        copy = shutil.copytree(trained[0], tmp_path / "copy")
        path = checkpoint.complete_steps(copy)[-1]
        file = path / "meta.json"
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    values = json.loads(file.read_text())
    values.get("config", values)["data"]["allow_pipe"] = True
    file.write_text(json.dumps(values))
    if kind == "checkpoint":
        sums = path / "SHA256SUMS"
        sums.write_text(sums.read_text().replace(before, hashlib.sha256(file.read_bytes()).hexdigest()))
    gan = gandist.load(file.parent, device="cpu")
    with pytest.raises(DataError, match=r"pipe:touch \S+: runs a command in a shell"):
        next(open_images([f"pipe:touch {tmp_path}/ran"], gan, world))
    assert not (tmp_path / "ran").exists()


# ----------------------------------------------------------------------------------------------------------- PostScript


def test_an_image_starts_no_program(tmp_path: Path, monkeypatch) -> None:
    """Of EPS, Pillow has Ghostscript run what is in it."""
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    encoded = io.BytesIO()
    Image.new("RGB", (4, 4)).save(encoded, "EPS")
    for read in (lambda content: decode_image(content, 3), look_at, lambda content: upright(content, 3)):
        with pytest.raises(ImageError, match="its format is unknown"):
            read(encoded.getvalue())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "TGA", "AVIF"])
def test_images_are_still_read(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("a Pillow without AVIF")
    encoded = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 100, 50)).save(encoded, kind)
    assert np.abs(decode_image(encoded.getvalue(), 3).astype(int) - (200, 100, 50)).max() < 9
