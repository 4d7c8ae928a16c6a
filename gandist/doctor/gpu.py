"""Checks of the device of a rank: that it is there, free, and computes what a CPU does."""

import re
from pathlib import Path

import torch

from gandist.config import Config, DataConfig, LossConfig, ModelConfig
from gandist.doctor.finding import ERROR, OK, WARNING, Finding, Place
from gandist.engine import choose_precision, frozen
from gandist.models import build_discriminator, build_generator
from gandist.objective import DiscriminatorObjective, GeneratorObjective

DRIVER = Path("/proc/driver/nvidia/version")
BATCH_SIZE = 8
TOLERANCE = 1e-3  # of float32 sums in another order, and of second derivatives
TAKEN = 0.1  # share of a GPU's memory


def check_gpu(place: Place) -> Finding:
    if place.device.type == "cpu":
        return _missing_gpu()
    count, local_size = torch.cuda.device_count(), place.launch.local_size
    free, total = torch.cuda.mem_get_info(place.device)
    driver = _driver()
    text = f"{count} × {torch.cuda.get_device_name(place.device)} of {total / 2**30:.0f} GiB"
    text += f", driver {driver}" if driver else ""
    figures = f"{free / 2**30:.0f} GiB free"
    if total - free > TAKEN * total:
        return Finding(WARNING, f"{text}, whose memory others use", "`nvidia-smi` shows which processes", figures)
    if count > local_size and not place.launch.slurm:
        return Finding(WARNING, f"{text}, {local_size} in use", f"torchrun --nproc_per_node={count} uses all", figures)
    return Finding(OK, text, figures=figures)


def check_precision(place: Place) -> Finding:
    train = place.config.train
    chosen = choose_precision(train.precision, place.device).name
    text = f"{chosen} (train.precision={train.precision})"
    if place.device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return Finding(WARNING, f"{text}, as this GPU does not compute in bfloat16", "steps are slower than on a newer GPU")
    return Finding(OK, text)


def check_step(place: Place) -> Finding:
    """One update of each network in float32, on the GPU and on the CPU."""
    if place.device.type == "cpu":
        return Finding(OK, "not compared with the CPU: no GPU")
    expected, found = _step(torch.device("cpu")), _step(place.device)
    errors = {name: _difference(found[name], expected[name]) for name in expected}
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else torch.inf)
    figures = f"relative difference {errors[worst]:.0e}"
    if not errors[worst] < TOLERANCE:
        text = f"{worst} of a small GAN is not what it is on the CPU"
        return Finding(ERROR, text, "try another GPU; else another driver or build of torch", figures)
    return Finding(OK, "losses and gradients of a small GAN as on the CPU", figures=figures)


def gpu_identity(device: torch.device) -> str:
    """Tells a GPU of this node from its others; empty for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _missing_gpu() -> Finding:
    driver = _driver()
    if driver and torch.version.cuda is None:
        return Finding(ERROR, f"driver {driver} is there, but torch is built for CPUs", "install a build of torch for CUDA")
    if driver:
        advice = "ask for GPUs (--gpus-per-node), see CUDA_VISIBLE_DEVICES, or install a newer driver"
        return Finding(ERROR, f"driver {driver} is there, but torch {torch.__version__} sees no GPU", advice)
    return Finding(WARNING, "none, so training is on the CPU", "on a cluster, ask for GPUs (--gpus-per-node)")


def _driver() -> str | None:
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", DRIVER.read_text())
    except OSError:
        return None
    return found and found[0]


def _step(device: torch.device) -> dict[str, torch.Tensor]:
    """Loss [] and gradient [parameters] of each network, on the CPU. Weights and inputs are the same on every device."""
    model = ModelConfig(latent_dim=8, generator_width=8, discriminator_width=8)
    config = Config(data=DataConfig(resolution=16), model=model, loss=LossConfig(r1_gamma=1.0))
    autocast = choose_precision("float32", device).autocast
    torch.manual_seed(0)
    generator = build_generator(config.model, config.data)
    discriminator = build_discriminator(config.model, config.data)
    images = torch.rand(BATCH_SIZE, config.data.channels, *config.data.size).mul(2).sub(1).to(device)
    latents = torch.randn(BATCH_SIZE, model.latent_dim).to(device)
    labels = torch.arange(BATCH_SIZE).to(device)
    uniforms, seen = torch.zeros(BATCH_SIZE, 0, device=device), torch.zeros((), device=device)

    discriminating = DiscriminatorObjective(discriminator.to(device), config, autocast).to(device)
    generating = GeneratorObjective(generator.to(device), discriminating, config, autocast).to(device)
    with torch.no_grad():
        fakes = generating.generate(latents, labels)
    of_discriminator, _ = discriminating(images, labels, fakes, None, labels, uniforms, seen, True)
    of_discriminator.backward()
    with frozen(discriminator):
        of_generator, _ = generating(latents, labels, uniforms, seen, True)
        of_generator.backward()
    return {
        "the discriminator's loss": of_discriminator.detach().cpu(),
        "the discriminator's gradient": _gradient(discriminator),
        "the generator's loss": of_generator.detach().cpu(),
        "the generator's gradient": _gradient(generator),
    }


def _gradient(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten().cpu() for parameter in network.parameters() if parameter.grad is not None])


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
