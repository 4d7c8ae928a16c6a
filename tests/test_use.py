"""What was trained is used: images are made and classified, networks exported and started from."""

import csv
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image

import gandist
from gandist import checkpoint
from gandist.config import DataConfig, ModelConfig
from gandist.data import normalize
from gandist.errors import CheckpointError, ConfigError
from gandist.export import export
from gandist.generate import GeneratedImages
from gandist.generate import main as generate
from gandist.models import build_discriminator, build_generator
from gandist.redaction import shareable
from gandist.trained import BATCH_SIZE, TrainedGAN, slerp, take_over
from tests.ranks import ROOT, launch, run_ranks

NAMES = [str(number) for number in range(10)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache_dir: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "digits"
    options = [f"run_dir={run_dir}", f"data.cache_dir={cache_dir}", "train.kimg=3", "tracking.wandb=off"]
    result = launch(1, "gandist.train", *options, "evaluation.metrics=[accuracy]")
    assert result.returncode == 0, result.stderr
    return run_dir


@pytest.fixture(scope="module")
def gan(trained: Path) -> TrainedGAN:
    return gandist.load(trained, device="cpu")


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "digits"
    result = launch(1, "gandist.export", str(trained), str(folder), "--onnx", "--torch-export", "--license", "cc-by-4.0")
    assert result.returncode == 0, result.stderr
    return folder


def samples_of(folder: Path) -> Iterator[tuple[str, np.ndarray, int]]:
    """Key, pixels [H, W] and label of each sample, in order."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name in members:
            key, _, extension = name.partition(".")
            if extension == "png":
                with Image.open(io.BytesIO(members[name])) as image:
                    yield key, np.asarray(image), int(members[f"{key}.cls"])


def test_the_averaged_generator_is_loaded(trained: Path, gan: TrainedGAN) -> None:
    path = checkpoint.complete_steps(trained)[-1]
    saved = checkpoint.nest(checkpoint.read(path))
    for name, tensor in gan.generator.state_dict().items():
        torch.testing.assert_close(tensor, saved["generator_ema"][name], rtol=0, atol=0)
    for name, tensor in gan.discriminator.state_dict().items():
        torch.testing.assert_close(tensor, saved["discriminator"]["network"][name], rtol=0, atol=0)
    assert gan.class_names == NAMES
    assert not gan.generator.training
    assert not gan.discriminator.training


def test_an_image_follows_from_seed_and_number(gan: TrainedGAN) -> None:
    images, labels = gan.generate(BATCH_SIZE + 20, seed=3)
    assert images.shape == (BATCH_SIZE + 20, 1, 16, 16)
    assert labels.tolist() == [number % 10 for number in range(BATCH_SIZE + 20)]
    some, labels = gan.generate([7, BATCH_SIZE + 5], seed=3)
    assert torch.equal(some, images[[7, BATCH_SIZE + 5]])
    assert labels.tolist() == [7, 1]
    assert not torch.equal(gan.generate(5, seed=4)[0], images[:5])
    assert gan.generate(4, ["3", 8])[1].tolist() == [3, 8, 3, 8]


def test_truncation_keeps_latents_near_the_middle(gan: TrainedGAN) -> None:
    wide, narrow = (gan.generate(100, [3], truncation=bound)[0].double() for bound in (None, 0.2))
    assert narrow.std(0).mean() < wide.std(0).mean() / 2


def test_a_path_leads_from_one_image_to_another(gan: TrainedGAN) -> None:
    path = gan.interpolate(2, 5, ["6"], seed=1)
    ends, _ = gan.generate(4, ["6"], seed=1)
    assert torch.equal(path[[0, 4, 5, 9]], ends)
    start, end = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    torch.testing.assert_close(slerp(start, end, torch.tensor([[0.5]])), torch.full((1, 2), 2**0.5))


def test_shards_are_the_same_from_any_number_of_ranks(trained: Path, gan: TrainedGAN, tmp_path: Path) -> None:
    options = ["--images", "310", "--shard-size", "90", "--shards", "--classes", "3,1,4", "--seed", "5"]
    for ranks in (1, 2):
        result = launch(ranks, "gandist.generate", str(trained), str(tmp_path / str(ranks) / "made"), *options)
        assert result.returncode == 0, result.stderr
    alone, together = tmp_path / "1" / "made", tmp_path / "2" / "made"
    assert [path.name for path in sorted(alone.iterdir())] == [path.name for path in sorted(together.iterdir())]
    assert all(path.read_bytes() == (together / path.name).read_bytes() for path in alone.iterdir())
    expected, labels = gan.generate(310, ["3", "1", "4"], seed=5)
    keys, images, found = zip(*samples_of(together), strict=True)
    assert len({*keys}) == 310
    assert np.array_equal(np.stack(images), expected[:, 0].numpy())
    assert list(found) == labels.tolist()
    info = json.loads((together / "_info.json").read_text())
    assert info["splits"]["train"]["num_samples"] == 310
    assert info["classes"] == NAMES


def test_shards_are_gone_on_with(trained: Path, tmp_path: Path) -> None:
    (run_of_one,) = run_ranks(1, generate_in_two_goes, trained, tmp_path)
    read_first, read_then = run_of_one
    assert (read_first, read_then) == (250, 200)  # two whole shards of 100 are kept, the third begun anew
    assert all((tmp_path / "whole" / name).exists() for name in ("whole-train-00003.tar", "_info.json"))
    parts = [sorted(path.read_bytes() for path in (tmp_path / name).glob("*.tar")) for name in ("whole", "at-once")]
    assert parts[0] == parts[1]


def generate_in_two_goes(trained: Path, folder: Path) -> tuple[int, int]:
    """Is interrupted at image 250, and started again. Returns how many images were made in either go."""
    options = [str(trained), "--images", "400", "--shard-size", "100", "--shards"]
    reads, read = [0], GeneratedImages.read

    def interrupted(source: GeneratedImages, index: int) -> Image.Image:
        if len(reads) == 1 and reads[-1] == 250:
            raise KeyboardInterrupt
        reads[-1] += 1
        return read(source, index)

    GeneratedImages.read = interrupted
    with pytest.raises(KeyboardInterrupt):
        generate([*options, str(folder / "whole")])
    assert not (folder / "whole").exists()
    reads.append(0)
    generate([*options, str(folder / "whole")])
    generate([*options, str(folder / "at-once")])
    return reads[0], reads[1] - 400


def test_pictures_and_files(trained: Path, gan: TrainedGAN, tmp_path: Path) -> None:
    for output in ("grid.png", "files"):
        result = launch(1, "gandist.generate", str(trained), str(tmp_path / output), "--images", "23")
        assert result.returncode == 0, result.stderr
    images, labels = gan.generate(23)
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        top, left = 2 + 66 * label, 2 + 66 * (number // 10)
        assert np.array_equal(grid[top : top + 64 : 4, left : left + 64 : 4], image[0].numpy())
        assert np.array_equal(np.asarray(Image.open(tmp_path / "files" / str(label) / f"{number:02d}.png")), image[0].numpy())
    assert len(list((tmp_path / "files").rglob("*.png"))) == 23


def test_classify_is_what_the_evaluation_measured(trained: Path, gan: TrainedGAN, cache_dir: Path, tmp_path: Path) -> None:
    folder = cache_dir / "digits-16"
    shards = [str(path) for path in sorted(folder.glob("digits-test-*.tar"))]
    for name in ("predictions.csv", "predictions.json"):
        result = launch(1, "gandist.classify", str(trained), *shards, "--top", "3", "--output", str(tmp_path / name))
        assert result.returncode == 0, result.stderr
    (measured,) = (json.loads(line) for line in (trained / "evaluations.jsonl").read_text().splitlines() if "test_top1" in line)
    assert f"classification/top1                    {measured['value']:.4f}" in result.stdout
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    described = json.loads((tmp_path / "predictions.json").read_text())
    assert len(rows) == len(described) == 360
    for (key, image, label), row, entry in zip(samples_of(folder), rows, described, strict=False):
        with torch.no_grad():
            output = gan.discriminator(normalize(torch.from_numpy(image.copy())[None, None], torch.float32), torch.tensor([0]))
        expected = output.class_logits.softmax(1)[0].sort(descending=True)
        assert row["image"] == entry["image"]
        assert row["image"].endswith(f"/{key}")
        assert int(row["label"]) == label == int(entry["label"])
        assert [each["class"] for each in entry["classes"]] == [NAMES[number] for number in expected.indices[:3]]
        assert [row[f"class_{rank}"] for rank in (1, 2, 3)] == [each["class"] for each in entry["classes"]]
        assert [each["probability"] for each in entry["classes"]] == pytest.approx(expected.values[:3].tolist(), abs=1e-6)


def test_files_of_any_size_are_read_as_the_run_reads_them(trained: Path, gan: TrainedGAN, tmp_path: Path) -> None:
    images, _ = gan.generate(10, seed=9)
    for name, image in zip(NAMES, images, strict=True):
        (tmp_path / "photos" / name).mkdir(parents=True)
        enlarged = np.kron(image[0].numpy(), np.ones((4, 4), np.uint8))
        wide = np.pad(enlarged, ((0, 0), (20, 20)))  # what the crop takes away
        turned = Image.fromarray(wide).convert("RGB").transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90° clockwise to be upright
        turned.save(tmp_path / "photos" / name / "a.png", exif=exif)
        torch.testing.assert_close(gan.read(tmp_path / "photos" / name / "a.png").int(), image.int(), rtol=0, atol=45)
    result = launch(1, "gandist.classify", str(trained), str(tmp_path / "photos"), str(tmp_path / "photos" / "3" / "a.png"))
    assert result.returncode == 0, result.stderr
    table = [line.split() for line in result.stdout.splitlines()]
    assert table[0] == ["image", "label", "class", "probability"]
    assert table[1][:2] == [str(tmp_path / "photos" / "3" / "a.png"), "-"]
    expected = gan.classify([tmp_path / "photos" / name / "a.png" for name in NAMES])
    assert [row[2:4] for row in table[2:12]] == [[NAMES[int(row.argmax())], f"{float(row.max()):.4f}"] for row in expected]
    assert [row[1] for row in table[2:12]] == NAMES


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generate RUN OUT --classes dog", "no class 'dog': there are 0, 1, 2"),
        ("generate RUN EXISTING", "exists already"),
        ("generate EMPTY OUT", "has no checkpoint yet: train it first"),
        ("generate NOWHERE OUT", "no such folder: name the folder of a run"),
        ("generate RUN OUT --step 3", "has no checkpoint step-00000003; there are: step-000000"),
        ("generate RUN OUT --best", "has a value of checkpoint.best=None: name a step"),
        ("generate RUN OUT --classes 02", "no class '02': there are 0, 1, 2"),
        (
            "translate RUN BROKEN --output OUT",
            "model.family=dcgan makes images of latents: it generates and does not translate",
        ),
        ("classify RUN BROKEN --output NOWHERE/a.csv", "there is no folder NOWHERE"),
        ("train train.freeze_d=1", "freeze_d=1 keeps weights as they are in another run: name it in init_from"),
        ("train train.init_from=NOWHERE run_dir=OUT", "no such folder: name the folder of a run"),
        ("export RUN EXISTING", "exists already: name another folder, or remove it"),
        ("export DAMAGED OUT", "is not whole"),
        ("classify RUN NOWHERE", "no such file or folder"),
        (
            "classify RUN BROKEN --output OUT.csv",
            "broken.png: the image cannot be decoded (its format is unknown, or it is damaged): replace it",
        ),
        ("classify RUN ANIMALS", "animals has a directory that is not named like a class of the model: no class 'dog'"),
        ("classify RUN OTHERS", "has the classes ant, bee, and the model 0, 1, 2"),
    ],
)
def test_bad_input_is_one_line(
    command: str, message: str, trained: Path, exported: Path, gan: TrainedGAN, tmp_path: Path
) -> None:
    """… on one rank, and nothing is left behind."""
    (tmp_path / "existing").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "animals" / "dog").mkdir(parents=True)
    Image.new("L", (16, 16)).save(tmp_path / "animals" / "dog" / "a.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    if "DAMAGED" in command:
        shutil.copytree(exported, tmp_path / "damaged")
        os.truncate(tmp_path / "damaged" / "generator.safetensors", 1000)
    if "OTHERS" in command:
        result = launch(1, "gandist.data.pack", "folder", str(make_insects(tmp_path)), str(tmp_path / "others"))
        assert result.returncode == 0, result.stderr
    before = {*tmp_path.rglob("*")}
    files = {
        name: str(tmp_path / name.lower()) for name in ("OUT", "EXISTING", "EMPTY", "NOWHERE", "DAMAGED", "ANIMALS", "OTHERS")
    }
    files |= {"RUN": str(trained), "BROKEN": str(tmp_path / "broken.png"), "OUT.csv": str(tmp_path / "out.csv")}
    verb, *words = re.sub("OUT.csv|[A-Z]{3,}", lambda word: files[word[0]], command).split()
    result = launch(1, f"gandist.{verb}", *words)
    assert result.returncode == 1
    *libpng, line = result.stderr.replace("configuration: 1 mistake(s)\n  ", "").splitlines()
    assert len(libpng) <= ("BROKEN" in command)
    assert line.startswith("error: ")
    assert message.replace("NOWHERE", files["NOWHERE"]) in line
    assert {*tmp_path.rglob("*")} == before


def test_a_key_that_an_export_lacks_is_named(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "e")
    described = json.loads((exported / "gandist.json").read_text())
    for lacking, key in ((described | {"origin": {}}, "checkpoint"), ({"format": 1}, "model")):
        (tmp_path / "e" / "gandist.json").write_text(json.dumps(lacking))
        with pytest.raises(CheckpointError, match=f"is not whole: gandist.json has no '{key}'"):
            gandist.load(tmp_path / "e")


def make_insects(folder: Path) -> Path:
    for name in ("ant", "bee"):
        (folder / "insects" / name).mkdir(parents=True)
        Image.new("L", (16, 16)).save(folder / "insects" / name / "a.png")
    return folder / "insects"


def test_images_of_another_shape_are_refused(gan: TrainedGAN) -> None:
    with pytest.raises(ConfigError, match=r"the model takes uint8 images \[B, 1, 16, 16\], not uint8 \[2, 3, 16, 16\]"):
        gan.classify(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ConfigError, match=r"not float32 \[2, 1, 16, 16\]"):
        gan.classify(torch.zeros(2, 1, 16, 16))


ELSEWHERE = """\
import sys
import numpy
import onnxruntime
folder, arrays = sys.argv[1:]
given = dict(numpy.load(arrays))
for name, source in (("generator", "latents"), ("discriminator", "images")):
    session = onnxruntime.InferenceSession(f"{folder}/{name}.onnx")
    for key, found in zip(("out_" + output.name for output in session.get_outputs()), session.run(
        None, {source: given[source], "labels": given["labels"]}), strict=True):
        assert numpy.allclose(found, given[key], rtol=1e-5, atol=1e-5), key
assert not any(name.split(".")[0] in ("torch", "gandist") for name in sys.modules)
import torch
import gandist
torch.load = None  # nothing is unpickled
gan = gandist.load(folder, device="cpu")
with torch.no_grad():
    latents, labels, images = (torch.from_numpy(given[name]) for name in ("latents", "labels", "images"))
    assert torch.allclose(gan.generator(latents, labels), torch.from_numpy(given["out_images"]), rtol=1e-5, atol=1e-5)
    output = gan.discriminator(images, labels)
    assert torch.allclose(output.class_logits, torch.from_numpy(given["out_class_logits"]), rtol=1e-5, atol=1e-5)
for training in ("trainer", "train", "objective", "engine", "losses.adversarial", "evaluation", "tracking"):
    assert f"gandist.{training}" not in sys.modules, training
assert not {"deepspeed", "wandb"} & sys.modules.keys()
print(gan.class_names, gan.origin["kimg"])
"""


def test_what_is_exported_computes_the_same_elsewhere(exported: Path, gan: TrainedGAN, tmp_path: Path) -> None:
    latents, labels = torch.randn(7, 64), torch.arange(7)
    images = torch.rand(7, 1, 16, 16) * 2 - 1
    with torch.no_grad():
        made, judged = gan.generator(latents, labels), gan.discriminator(images, labels)
    results = {"out_images": made, "out_logits": judged.logits, "out_class_logits": judged.class_logits}
    given = {"latents": latents, "labels": labels, "images": images, **results}
    np.savez(tmp_path / "arrays.npz", **{name: tensor.contiguous().numpy() for name, tensor in given.items()})
    command = [sys.executable, "-c", ELSEWHERE, str(exported), str(tmp_path / "arrays.npz")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("]")[1].strip() == f"{gan.origin['kimg']}"
    program = torch.export.load(exported / "generator.pt2").module()
    torch.testing.assert_close(program(latents=latents, labels=labels), made, rtol=1e-5, atol=1e-5)


def test_the_model_card_says_what_it_is(exported: Path, gan: TrainedGAN) -> None:
    card = (exported / "README.md").read_text()
    _, metadata, text = card.split("---\n", 2)
    assert yaml.safe_load(metadata) | {"tags": None} == {"license": "cc-by-4.0", "library_name": "gandist", "tags": None}
    assert f"| `classification/test_top1` | {gan.origin['metrics']['classification/test_top1']:.4f} |" in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == shareable(gan.origin["config"])


@pytest.mark.parametrize("family", ["stylegan2", "r3gan"])
def test_other_families_are_exported(family: str, gan: TrainedGAN, tmp_path: Path) -> None:
    """… for any batch; those that ONNX cannot express say so, and leave nothing behind."""
    model = ModelConfig(family=family, conditioning="none", generator_width=16, discriminator_width=16)
    data = DataConfig(resolution=8, channels=3, num_classes=0)
    networks = build_generator(model, data).eval(), build_discriminator(model, data).eval()
    other = TrainedGAN(*networks, model=model, data=data, class_names=[], origin=gan.origin)
    if family == "stylegan2":
        with pytest.raises(gandist.errors.GandistError, match=r"generator cannot be expressed in ONNX .* use --torch-export"):
            export(other, tmp_path / "out", onnx=True)
        assert not any(tmp_path.iterdir())
        export(other, tmp_path / "out", torch_export=True)
    else:
        export(other, tmp_path / "out", onnx=True)
        session = onnxruntime.InferenceSession(tmp_path / "out" / "discriminator.onnx")
        assert [output.name for output in session.get_outputs()] == ["logits"]
    again = gandist.load(tmp_path / "out", device="cpu")
    assert torch.equal(again.generate(3)[0], other.generate(3)[0])
    with pytest.raises(ConfigError, match="trained without classes"):
        again.classify([])


def test_a_run_starts_from_another_one(trained: Path, exported: Path, gan: TrainedGAN, cache_dir: Path, tmp_path: Path) -> None:
    options = [f"data.cache_dir={cache_dir}", "train.kimg=0.2", "tracking.wandb=off", "evaluation.metrics=[]"]
    frozen = [f"run_dir={tmp_path / 'a'}", f"train.init_from={trained}", "train.freeze_d=2"]
    result = launch(2, "gandist.train", *options, *frozen)
    assert result.returncode == 0, result.stderr
    assert f"starts from the generator of {gan.origin['checkpoint']}: 20 of 20 tensors\n" in result.stdout
    then, now = gan.discriminator.state_dict(), gandist.load(tmp_path / "a", device="cpu").discriminator.state_dict()
    weights = [name for name in then if name.endswith((".bias", ".original"))]
    kept = [name for name in weights if torch.equal(then[name], now[name])]
    assert kept == [name for name in weights if name.startswith(("trunk.from_image", "trunk.blocks.0"))]

    more = [f"run_dir={tmp_path / 'b'}", f"train.init_from={exported}", "data.num_classes=12", "train.kimg=0.064"]
    result = launch(1, "gandist.train", *options, *more, "optimizer.generator_lr=1e-12")
    assert result.returncode == 0, result.stderr
    assert "head.classifier.weight [12, 96], there [10, 96]" in result.stdout
    started = gandist.load(tmp_path / "b", device="cpu").generator.state_dict()
    for name, tensor in gan.generator.state_dict().items():
        if "num_batches" not in name and started[name].shape == tensor.shape and "running" not in name:
            torch.testing.assert_close(started[name], tensor, rtol=0, atol=1e-6)
    # Once there is a checkpoint, the run goes on from it, wherever the other run is by then.
    result = launch(1, "gandist.train", *options, *more, "train.init_from=nowhere", "train.kimg=0.128")
    assert result.returncode == 0, result.stderr
    assert "resumed from" in result.stdout


def test_nothing_is_taken_over_where_nothing_fits(gan: TrainedGAN) -> None:
    other = build_generator(ModelConfig(family="mlp"), DataConfig())
    with pytest.raises(ConfigError, match="nothing of the generator of x fits"):
        take_over("generator of x", gan.generator.state_dict(), other.state_dict())


def test_runs_from_python(trained: Path, cache_dir: Path, tmp_path: Path) -> None:
    (values,) = run_ranks(1, train_and_evaluate, cache_dir, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()[-1])
    assert values["classification/test_top1"] == pytest.approx(
        next(
            json.loads(line)["value"]
            for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
            if "test_top1" in line
        )
    )
    assert record["step"] == 4


def train_and_evaluate(cache_dir: Path, run_dir: Path) -> dict[str, float]:
    overrides = [f"run_dir={run_dir}", f"data.cache_dir={cache_dir}", "train.kimg=0.256", "tracking.wandb=off"]
    config = gandist.load_config(None, [*overrides, "evaluation.metrics=[accuracy]"])
    evaluation = gandist.evaluate_run(gandist.train_run(config))
    return {record.metric: record.value for record in evaluation.records}


@pytest.fixture(scope="module")
def translating(tmp_path_factory, cache_dir: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "translating"
    options = [f"run_dir={run_dir}", f"data.cache_dir={cache_dir}", "train.kimg=0.064", "tracking.wandb=off"]
    networks = ["model.generator_width=4", "model.discriminator_width=4", "evaluation.metrics=[]"]
    result = launch(1, "gandist.train", "--config", str(ROOT / "configs" / "digits-translate.yaml"), *options, *networks)
    assert result.returncode == 0, result.stderr
    return run_dir


def test_translate(translating: Path, gan: TrainedGAN, tmp_path: Path) -> None:
    images, _ = gan.generate(4)
    (tmp_path / "scans").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / "scans" / f"{number}.png")
    for output in ("out", "out.png"):
        options = [str(tmp_path / "scans"), "--to", "7,3", "--output", str(tmp_path / output)]
        result = launch(1, "gandist.translate", str(translating), *options)
        assert result.returncode == 0, result.stderr
    translator = gandist.load(translating, device="cpu")
    expected = {name: translator.translate(images, name) for name in ("7", "3")}
    with torch.no_grad():
        literally = translator.generator(normalize(images, torch.float32), torch.full((4,), 7))
    assert torch.equal(expected["7"], ((literally.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    grid = np.asarray(Image.open(tmp_path / "out.png").convert("L"))
    for row in range(4):
        for column, image in enumerate((images, expected["7"], expected["3"])):
            top, left = 2 + 66 * row, 2 + 66 * column
            assert np.array_equal(grid[top : top + 64 : 4, left : left + 64 : 4], image[row, 0].numpy())
        for name in ("7", "3"):
            found = np.asarray(Image.open(tmp_path / "out" / name / f"{row}.png"))
            assert np.array_equal(found, expected[name][row, 0].numpy())
    with pytest.raises(ConfigError, match="translates and does not generate"):
        translator.generate(1)
    with pytest.raises(ConfigError, match="generates and does not translate"):
        gan.translate(images, 3)
    (tmp_path / "more").mkdir()
    shutil.copy(tmp_path / "scans" / "0.png", tmp_path / "more" / "0.png")
    both = [str(tmp_path / "scans"), str(tmp_path / "more"), "--to", "7", "--output", str(tmp_path / "both")]
    result = launch(1, "gandist.translate", str(translating), *both)
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert "would both become 0.png" in result.stderr
    assert not list(tmp_path.glob("both*"))


def test_a_translator_is_exported(translating: Path, tmp_path: Path) -> None:
    translator = gandist.load(translating, device="cpu")
    export(translator, tmp_path / "out", onnx=True)
    again = gandist.load(tmp_path / "out", device="cpu")
    images = torch.randint(256, (3, 1, 16, 16), dtype=torch.uint8)
    assert torch.equal(again.translate(images, "5"), translator.translate(images, "5"))


def test_classes_go_by_name_or_number(gan: TrainedGAN) -> None:
    named = dataclasses.replace(gan, class_names=["9", "8", "a/b", "a_b", "..", "5", "4", "crane", "crane", "0"])
    assert [named.class_number(name) for name in ("9", 9, "0", 0, "1", "a/b")] == [0, 9, 9, 0, 1, 2]
    assert named.class_folders([0, 2, 8]) == {0: "9", 2: "a_b", 8: "crane"}
    for numbers in ([2, 3], [4], [7, 8]):
        with pytest.raises(ConfigError, match="cannot have a directory of its own"):
            named.class_folders(numbers)


def test_an_error_leaves_python_as_it_was(tmp_path: Path) -> None:
    run_ranks(1, fail_twice, tmp_path)


def fail_twice(folder: Path) -> None:
    for _ in range(2):
        with pytest.raises(gandist.errors.GandistError, match="cannot read the configuration"):
            gandist.evaluate_run(folder / "nowhere")
