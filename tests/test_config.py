from pathlib import Path

import pytest

from gandist.config import Config
from gandist.config_file import load_config
from gandist.errors import ConfigError
from tests.ranks import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_valid_and_says_how_to_use_it(path: Path) -> None:
    load_config(path)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"--config configs/{path.name}" in line for line in header)


def test_digits_is_the_default() -> None:
    assert load_config(ROOT / "configs" / "digits.yaml") == Config()


def test_print_round_trip(tmp_path: Path) -> None:
    config = load_config(
        None,
        ["train.kimg=5", "data.train=[a.tar, b.tar]", "data.test=c.tar", "evaluation.metrics=[accuracy]", "tracking.wandb=off"],
    )
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("text", "resolution", "size"), [("24", 24, (24, 24)), ("[8, 8]", 8, (8, 8)), ("[16,32]", (16, 32), (16, 32))]
)
def test_resolution(tmp_path: Path, text: str, resolution: int | tuple[int, int], size: tuple[int, int]) -> None:
    config = load_config(None, [f"data.resolution={text}"])
    assert (config.data.resolution, config.data.size) == (resolution, size)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("text", ["abc", "0", "[1]", "[8,-1]", "[8,8,8]", "[8, true]", "16x32", "null"])
def test_what_is_no_resolution(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"data.resolution={text}"])
    (_, mistake) = str(caught.value).splitlines()
    assert mistake.startswith("  data.resolution: a number of pixels, or two, [height, width], is wanted, each at least 1")


def test_overrides_are_typed() -> None:
    config = load_config(None, ["optimizer.generator_lr=1e-4", "data.test=null", "evaluation.metrics=[]", "run_dir=a=b"])
    assert config.optimizer.generator_lr == 1e-4
    assert config.data.test is None
    assert config.run_dir == Path("a=b")


def test_all_mistakes_are_shown_at_once(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("train:\n  batch_sise: 32\n  kimg: true\nmodle:\n  family: dcgan\nloss: {adversarial: hing}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["data.num_workers=-1", "kimg=5", "seed.x=3", "--fast"])
    expected = [
        f"{file}: 8 mistake(s)",
        "train.batch_sise: unknown key, did you mean 'train.batch_size'?",
        "train.kimg: a number is wanted, not true or false",
        "modle: unknown key, did you mean 'model'?",
        "loss.adversarial: 'hing' is not one of hinge, non_saturating, saturating, least_squares, wasserstein, relativistic; "
        "did you mean 'hinge'?",
        "data.num_workers: Input should be greater than or equal to 0 (got -1)",
        "kimg: unknown key, did you mean 'train.kimg'?",
        "seed: Input should be a valid integer",
        "'--fast': an override is written key=value",
    ]
    for line in expected:
        assert line in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {kimg: 1, kimg: 2}", "key written twice: kimg"),
        ("train: [", "is not valid YAML"),
        ("- train", "sections are wanted"),
        ("train: 3", "a section is wanted here"),
        ("train: {batch_size: 10, accumulation: 3}", "accumulation=3 does not divide batch_size=10"),
        ("data: {test: null}", "accuracy, which need data.test"),
        ("model: {attention: [16]}", "attention is for family=resnet or biggan or biggan_deep, not for dcgan: leave it out"),
        ("model: {family: biggan, widths: [8, 8]}", "widths is for family=r3gan, not for biggan: leave it out"),
        ("model: {minibatch_std: 8}", "minibatch_std is for family=stylegan2, not for dcgan: leave it out"),
        ("model: {family: r3gan, max_width: 64}", "max_width is for family=stylegan2, not for r3gan"),
        ("model: {family: stylegan2, style_mixing: 1.5}", "model.style_mixing: Input should be less than or equal to 1"),
        ("model: {group_size: 32}", "group_size is for family=r3gan, not for dcgan"),
        ("model: {family: mlp, discriminator_norm: none}", "discriminator_norm is for family=dcgan or resnet, not for mlp"),
        ("model: {generator_spectral_norm: true}", "generator_spectral_norm is for family=resnet, not for dcgan"),
        (
            "{model: {family: r3gan}, data: {unlabelled: allow}}",
            "the match of image and label alone: say model.conditioning=aux",
        ),
        (
            "{model: {family: stylegan2}, data: {unlabelled: allow}}",
            "with model.family=stylegan2 and model.conditioning=projection the discriminator's logit is the match",
        ),
        (
            "{loss: {reconstruction_weight: 10}}",
            "loss.reconstruction_weight is for model.family=stargan, which translates images",
        ),
        ("{loss: {identity_weight: 1}}", "loss.identity_weight is for model.family=stargan, which translates images, not for"),
        (
            "evaluation: {metrics: [reconstruction]}",
            r"metrics=\[reconstruction\] is for model.family=stargan, .* not for dcgan",
        ),
        (
            "{model: {family: stargan, conditioning: none}, data: {num_classes: 0}, evaluation: {metrics: []}}",
            "data.num_classes=0 cannot be used with model.family=stargan, which translates images from class to class",
        ),
        ("{model: {family: stargan}, data: {labelled: 0.5}}", "data.labelled cannot .* back to the class that they had"),
        ("{model: {family: stargan}, data: {unlabelled: allow}}", "data.unlabelled=allow cannot .* back to the class"),
        ("{model: {family: stargan}, loss: {adversarial: relativistic}}", "adversarial=relativistic cannot .* has no pairs"),
        ("{model: {family: stargan}, loss: {path_length_weight: 1}}", "path_length_weight is for model.family=stylegan2"),
        ("{model: {family: stargan}, consistency: {latent_weight: 1}}", "latent_weight cannot .* which has no latents"),
        (
            "{model: {family: stargan}, consistency: {latent_diversity_weight: 1}}",
            "latent_diversity_weight cannot .* no latents",
        ),
        ("{model: {family: stargan}, evaluation: {truncation: 1}}", "evaluation.truncation cannot .* which has no latents"),
        (
            "{model: {family: r3gan}, data: {labelled: 0.1}}",
            "data.labelled=0.1: with model.family=r3gan and model.conditioning=projection the discriminator's logit is",
        ),
        (
            "{loss: {adversarial: relativistic}, data: {labelled: 0.25}}",
            "one of its class: it cannot be used with data.labelled=0.25",
        ),
        ("{model: {conditioning: multi_hinge}, loss: {generator_weight: 2}}", "own: say loss.conditioning_weight"),
        ("loss: {generator_weight: 0}", "learns by loss.feature_matching_weight, which is 0 as well"),
        ("data: {labelled: 0}", "data.labelled: Input should be greater than 0"),
        ("{data: {labelled: 0.5, num_classes: 0}, model: {conditioning: none}}", "of which num_classes=0 reads none: leave it"),
        (
            "{model: {conditioning: k_plus_one}, classification: {detach: true}}",
            "the class logits are the adversarial one; choose another",
        ),
        ("data: {train: a.tar}", "data.test is the built-in digits but data.train is not"),
        ("data: {train: a.tar, test: b.tar}", "fd_classifier, gan_test, whose judge knows only the built-in digits"),
        ("data: {train: 5}", r"1 mistake\(s\)\n  data.train: a text, or a list of texts, is wanted \(got 5\)"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration no/such\.yaml: No such file"):
        load_config("no/such.yaml")
