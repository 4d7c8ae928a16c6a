"""Whether the GPU computes what the CPU does: `python -m benchmarks.agreement [NAME …]`. Of each family, losses and gradients
of one step in float32; and the bits of the hashed noise, eager and compiled. Exit status 1 if they disagree."""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from benchmarks.methods import METHODS
from benchmarks.report import header, record, table
from gandist.config_file import load_config
from gandist.engine import choose_precision, frozen
from gandist.models import build_discriminator, build_generator
from gandist.models.noise import hashed_normal, hashed_uniform
from gandist.objective import DiscriminatorObjective, GeneratorObjective

FAMILIES = {name.removesuffix(", projection"): overrides for name, overrides in METHODS.items() if name.endswith("projection")}
FAMILIES["stargan"] = [
    "model.family=stargan",
    "model.conditioning=auxiliary",
    "loss.adversarial=non_saturating",
    "loss.r1_gamma=0.05",
    "loss.reconstruction_weight=10",
]
COLUMNS = ["", "largest difference", "of", "result"]
LIMIT = 1e-3  # of a gradient, relative to its norm
SMALL = 1e-2  # a gradient with less of its network's norm is compared with this share of it
BATCH_SIZE = 8


def noise(device: torch.device) -> list[list[str]]:
    latents = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    rows = []
    for draw in (hashed_uniform, hashed_normal):
        expected = draw(latents, (32, 32), 1)
        for manner, drawn in (("eager", draw), ("compiled", torch.compile(draw))):
            name = f"{draw.__name__}, {manner}"
            found = attempt(lambda drawn=drawn: drawn(latents.to(device), (32, 32), 1).cpu())
            if isinstance(found, str):
                rows.append([name, "", "", found])
                continue
            unequal = int((found != expected).sum())
            largest = f"{(found - expected).abs().max():.1e}"
            rows.append([name, largest, f"{unequal:,} of {expected.numel():,} numbers differ", "differs" if unequal else "ok"])
    return rows


def family(name: str, device: torch.device) -> list[str]:
    """A row."""
    found = attempt(lambda: [one_step(name, each) for each in (torch.device("cpu"), device)])
    if isinstance(found, str):
        return [name, "", "", found]
    expected, found = found
    differences = {
        each: ((found[each] - value).norm() / value.norm().clamp_min(SMALL * whole_norm(expected, each))).item()
        for each, value in expected.items()
    }
    worst = max(differences, key=lambda each: (differences[each] != differences[each], differences[each]))  # NaN is the worst
    return [name, f"{differences[worst]:.1e}", worst, "ok" if differences[worst] < LIMIT else "differs"]


def whole_norm(values: dict[str, torch.Tensor], name: str) -> float:
    """Of all gradients of the player that this one belongs to."""
    player = name.partition(" ")[0]
    return max(1e-30, sum(value.square().sum().item() for each, value in values.items() if each.startswith(player)) ** 0.5)


def attempt(compute: Callable[[], object]) -> object:
    """The result, or the error's first line."""
    try:
        return compute()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:100]}"


def one_step(name: str, device: torch.device) -> dict[str, torch.Tensor]:
    """Losses and gradients, on the CPU, of networks and inputs that are the same on every device."""
    config = load_config(None, FAMILIES[name])
    data = config.data
    choose_precision("float32", device)
    torch.manual_seed(0)
    placement = {"device": device, "memory_format": torch.channels_last}
    generator, discriminator = build_generator(config.model, data), build_discriminator(config.model, data)
    discriminating = DiscriminatorObjective(discriminator, config, nullcontext).to(**placement)
    generating = GeneratorObjective(generator, discriminating, config, nullcontext).to(**placement)
    images = [torch.randn(BATCH_SIZE, data.channels, *data.size).to(**placement) for _ in range(2)]
    labels = torch.arange(BATCH_SIZE, device=device) % data.num_classes
    latents = images[0] if generating.translates else torch.randn(BATCH_SIZE, config.model.latent_dim).to(device)
    noises = [torch.rand(BATCH_SIZE, each.columns.width).to(device) for each in (discriminating, generating)]
    seen = torch.zeros((), device=device)
    loss = discriminating(images[0], labels, images[1], None, labels, noises[0], seen, True)[0]
    loss.backward()
    values = collect("discriminator", loss, discriminator)
    with frozen(discriminator):
        real = (images[0], labels) if generating.wants_real else ()
        loss = generating(latents, labels.flip(0), noises[1], seen, True, *real)[0]
        loss.backward()
    return values | collect("generator", loss, generator)


def collect(player: str, loss: torch.Tensor, network: torch.nn.Module) -> dict[str, torch.Tensor]:
    gradients = {name: each.grad for name, each in network.named_parameters() if each.grad is not None}
    return {f"{player} {name}": value.detach().cpu() for name, value in {"loss": loss, **gradients}.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=__doc__)
    names = [*FAMILIES, "noise"]
    parser.add_argument("names", nargs="*", default=names, metavar="NAME", help=f"of {', '.join(names)}")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(names):
        parser.error(f"there is no {unknown.pop()!r}: {', '.join(names)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{header()}\n{device.type} against cpu", flush=True)
    rows = []

    def add(row: list[str]) -> None:
        rows.append(row)
        record("GPU against CPU", COLUMNS, row)

    for name in options.names:
        for row in noise(device) if name == "noise" else [family(name, device)]:
            add(row)
    print(table(COLUMNS, rows), flush=True)
    if wrong := [row[0] for row in rows if row[-1] != "ok"]:
        sys.exit(f"{', '.join(wrong)}: not as on the CPU")


if __name__ == "__main__":
    main()
