"""StudioGAN's own networks for CIFAR-10, out of a checkout of github.com/POSTECH-CVLab/PyTorch-StudioGAN."""

import contextlib
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import nn

from gandist.models import DiscriminatorOutput


class WithoutClassHead(nn.Module):
    """Its discriminator, which answers as ours do."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> DiscriminatorOutput:
        nothing = images.new_zeros(len(images), 0)
        return DiscriminatorOutput(self.network(images, labels)["adv_output"], nothing, nothing, nothing)


def build_studiogan(checkout: Path, shape: str) -> tuple[nn.Module, nn.Module]:
    """Generator and discriminator as its configurations CIFAR10/SNGAN and CIFAR10/BigGAN have them."""
    if str(checkout / "src") not in sys.path:
        sys.path.insert(0, str(checkout / "src"))
        # All that its networks take of this module, which imports everything else.
        sys.modules["utils.misc"] = ModuleType("utils.misc")
        sys.modules["utils.misc"].dummy_context_mgr = contextlib.nullcontext
    ops = import_module("utils.ops")
    big = shape == "biggan"
    of_discriminator = {"d_conv2d": ops.snconv2d, "d_linear": ops.snlinear, "d_embedding": ops.sn_embedding}
    of_generator = {
        "g_conv2d": ops.snconv2d if big else ops.conv2d,
        "g_linear": ops.snlinear if big else ops.linear,
        "g_embedding": ops.sn_embedding if big else ops.embedding,
        "g_bn": ops.ConditionalBatchNorm2d,
    }
    activations = {"g_act_fn": nn.ReLU(inplace=True), "d_act_fn": nn.ReLU(inplace=True)}
    common = {
        "img_size": 32,
        "num_classes": 10,
        "apply_attn": big,
        "mixed_precision": False,
        "MODULES": SimpleNamespace(**of_discriminator, **of_generator, **activations),
        "MODEL": SimpleNamespace(info_type="N/A", g_info_injection="N/A"),  # no InfoGAN
    }
    width = 96 if big else 64
    networks = import_module("models.big_resnet" if big else "models.resnet")
    generator = networks.Generator(
        z_dim=80 if big else 128,
        g_shared_dim=128,
        g_conv_dim=width,
        attn_g_loc=[2],
        g_cond_mtd="cBN",
        g_init="ortho",
        g_depth=None,
        **common,
    )
    discriminator = networks.Discriminator(
        d_conv_dim=width,
        apply_d_sn=True,
        attn_d_loc=[1],
        d_cond_mtd="PD",
        aux_cls_type="W/O",
        d_embed_dim=None,
        normalize_d_embed=False,
        d_init="ortho",
        d_depth=None,
        **common,
    )
    return generator, WithoutClassHead(discriminator)
