"""Writes a trained GAN to be used elsewhere: `python -m gandist.export RUN FOLDER`."""

import argparse
import contextlib
import html
import io
import json
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from safetensors.torch import save
from torch import nn

import gandist
from gandist.arguments import add_checkpoint
from gandist.data.writer import check_absent, whole_folder
from gandist.distributed import join_alone, run
from gandist.errors import ConfigError, GandistError
from gandist.redaction import shareable
from gandist.resolution import size_of
from gandist.trained import DESCRIPTION, FORMAT, IMAGE_KEYS, NETWORKS, TrainedGAN, load

TOLERANCE = 1e-5  # absolute, and relative for what is above 1
BATCHES = (1, 3)  # sizes that an exported graph is tried with
EXAMPLES = """\
examples:
  python -m gandist.export runs/digits exported
      weights as safetensors, a description and a model card: gandist.load("exported") gives the networks back
  python -m gandist.export runs/digits digits-onnx --best --onnx --license cc-by-4.0
      the best checkpoint, also as ONNX graphs, for any batch size
"""


class Graph(NamedTuple):
    """A network as a graph to be exported: inputs by name for a batch of so many, and the names of its results."""

    network: nn.Module
    inputs: Callable[[int], dict[str, torch.Tensor]]
    outputs: list[str]


class _Judging(nn.Module):
    """A discriminator whose results are those that are used elsewhere."""

    def __init__(self, gan: TrainedGAN):
        super().__init__()
        self.discriminator = gan.discriminator
        self.classifies = bool(gan.class_names)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """images [B, C, H, W] in [-1, 1], labels int64 [B] → logits [B], and if there are classes class_logits [B, K]"""
        output = self.discriminator(images, labels)
        return (output.logits, output.class_logits) if self.classifies else (output.logits,)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    with join_alone("networks are exported"):
        check_absent(options.output)
        gan = load(options.run, step=options.step, best=options.best, device="cpu")
        export(gan, options.output, onnx=options.onnx, torch_export=options.torch_export, license=options.license)
    print("\n".join(f"{path}  {path.stat().st_size / 1e6:.1f} MB" for path in sorted(options.output.iterdir())))


def export(gan: TrainedGAN, folder: Path, *, onnx: bool = False, torch_export: bool = False, license: str = "unknown") -> None:
    """Writes the folder, whole or not at all; what is written is read again and compared. Raises GandistError.

    gan:          on the CPU
    onnx:         also GRAPH.onnx, of opset 20, checked by onnxruntime
    torch_export: also GRAPH.pt2, as torch.export.load reads them
    license:      of the weights, as the Hugging Face hub names it
    """
    if onnx:
        _require_onnx()
    with whole_folder(folder) as partial:
        for name in NETWORKS:
            (partial / f"{name}.safetensors").write_bytes(save(_contiguous(getattr(gan, name))))
        (partial / DESCRIPTION).write_text(json.dumps(_describe(gan), indent=2) + "\n")
        (partial / "README.md").write_text(model_card(gan, folder.name, license))
        for (name, graph), (_, again) in zip(_graphs(gan).items(), _graphs(load(partial, device="cpu")).items(), strict=True):
            _check_equal(f"{name}.safetensors", graph, again.network)
            if torch_export or onnx:
                _export_graph(gan, graph, name, partial, onnx=onnx, torch_export=torch_export)


def model_card(gan: TrainedGAN, name: str, license: str) -> str:
    """Markdown with the metadata of the Hugging Face hub on top."""
    data, origin = gan.data, shareable(gan.origin)
    versions = origin["versions"]
    height, width = size_of(data.resolution)
    tags = ["gan", "image-to-image" if gan.model.translates else "image-generation"]
    metadata = {"license": license, "library_name": "gandist", "tags": tags + ["image-classification"] * bool(gan.class_names)}
    metrics = "\n".join(f"| `{metric}` | {value:.4f} |" for metric, value in origin["metrics"].items())
    shape = f"[1, {data.channels}, {height}, {width}]"
    source, use = (
        f"latents [B, {gan.model.latent_dim}], standard normal,",
        f"images, labels = gan.generate(1)  # uint8 {shape}, [1]",
    )
    if gan.model.translates:
        source, use = "images in [-1, 1]", f'images = gan.translate(["image.png"], 0)  # to this class, uint8 {shape}'
    if gan.class_names:
        use += f'\nprobabilities = gan.classify(["image.png"])  # [1, {len(gan.class_names)}], of images of any size'
    kind = "grey" if data.channels == 1 else "RGB"
    names = ", ".join(map(_as_markdown, gan.class_names))
    classes = f"{len(gan.class_names)} classes: {names}" if gan.class_names else "no classes"
    return f"""\
---
{yaml.safe_dump(metadata, sort_keys=False)}---

# {name}

A generative adversarial network ({gan.model.family}, conditioning: {gan.model.conditioning}) for {kind} images of
{height}×{width} pixels, with {classes}.

```python
import gandist

gan = gandist.load("{name}")
{use}
```

`generator`: {source} and labels [B] → images in [-1, 1].
`discriminator`: images in [-1, 1] and labels → logits, above 0 for real{", and class logits" if gan.class_names else ""}.

## Training data

`{str(origin["config"]["data"]["train"]).replace("`", "")}`

## Measured

{f"| metric | value |{chr(10)}| --- | --- |{chr(10)}{metrics}" if metrics else "Nothing at this step."}

## Training

{origin["kimg"]:g} kimg, {origin["step"]:,} steps, with gandist {versions["gandist"]} and torch {versions["torch"]}:

```yaml
{yaml.safe_dump(origin["config"], sort_keys=False)}```
"""


def _as_markdown(text: str) -> str:
    """Text that reads as it is: no HTML, no marks of Markdown, no line breaks."""
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _describe(gan: TrainedGAN) -> dict:
    return {
        "format": FORMAT,
        "gandist": gandist.__version__,
        "model": gan.model.model_dump(mode="json"),
        "data": gan.data.model_dump(mode="json", include=IMAGE_KEYS),
        "class_names": gan.class_names,
        "origin": shareable(gan.origin),
    }


def _contiguous(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in network.state_dict().items()}


def _graphs(gan: TrainedGAN) -> dict[str, Graph]:
    shape = gan.data.channels, *size_of(gan.data.resolution)
    chance = torch.Generator().manual_seed(0)

    def labels(count: int) -> torch.Tensor:
        return torch.randint(len(gan.class_names), (count,), generator=chance) if gan.class_names else torch.full((count,), -1)

    def to_generate(count: int) -> dict[str, torch.Tensor]:
        return {"latents": torch.randn(count, gan.model.latent_dim, generator=chance), "labels": labels(count)}

    def to_judge(count: int) -> dict[str, torch.Tensor]:
        return {"images": torch.rand(count, *shape, generator=chance) * 2 - 1, "labels": labels(count)}

    names = ["logits", "class_logits"] if gan.class_names else ["logits"]
    generating = Graph(gan.generator, to_generate, ["images"])
    if gan.model.translates:
        generating = Graph(gan.generator, to_judge, ["translated"])
    return {"generator": generating, "discriminator": Graph(_Judging(gan), to_judge, names)}


def _export_graph(gan: TrainedGAN, graph: Graph, name: str, folder: Path, *, onnx: bool, torch_export: bool) -> None:
    inputs = graph.inputs(max(BATCHES))
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        dynamic = {key: {0: batch} for key in inputs}
        program = torch.export.export(graph.network, (), inputs, dynamic_shapes=dynamic)
    if torch_export:
        path = folder / f"{name}.pt2"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "No complete tensor found")  # of weights that share memory; on a CPU it is well
            torch.export.save(program, path)
        _check_equal(path.name, graph, torch.export.load(path).module())
    if onnx:
        path = folder / f"{name}.onnx"
        _write_onnx(gan, program, [*inputs], graph.outputs, path)
        _check_equal(path.name, graph, _onnx_session(path))


def _write_onnx(
    gan: TrainedGAN, program: torch.export.ExportedProgram, inputs: list[str], outputs: list[str], path: Path
) -> None:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(
                program, (), path, input_names=inputs, output_names=outputs, external_data=False, opset_version=20
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        advice = (
            " (its noise is made of the latents' bits, for which ONNX has no operation)"
            if gan.model.family == "stylegan2"
            else ""
        )
        raise GandistError(f"{path.stem} cannot be expressed in ONNX{advice}: use --torch-export. {reason}") from error


def _require_onnx() -> None:
    """Raises ConfigError."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"ONNX needs the package {error.name}: pip install -e '.[onnx]'") from error


def _onnx_session(path: Path) -> Callable[..., tuple[torch.Tensor, ...]]:
    import onnxruntime  # an extra

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]  # without those that nothing depends on

    def call(**inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(map(torch.from_numpy, session.run(None, {name: inputs[name].numpy() for name in names})))

    return call


@torch.no_grad()
def _check_equal(what: str, graph: Graph, other: Callable) -> None:
    """Raises GandistError."""
    for count in BATCHES:
        inputs = graph.inputs(count)
        expected, found = (_as_tuple(network(**inputs)) for network in (graph.network, other))
        for wanted, got in zip(expected, found, strict=True):
            if not torch.allclose(wanted, got, rtol=TOLERANCE, atol=TOLERANCE):
                worst = (wanted - got).abs().max()
                raise GandistError(f"{what} does not give the network's own results: they differ by up to {worst:.2g}")


def _as_tuple(results: torch.Tensor | Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gandist.export",
        description="Write the averaged generator and the discriminator of a run as safetensors, with a description that "
        "gandist.load reads and a model card. All is read again and compared before the folder appears.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint(parser)
    parser.add_argument("output", type=Path, metavar="FOLDER", help="where to; made by this command")
    parser.add_argument("--onnx", action="store_true", help="also as ONNX graphs, checked by onnxruntime")
    parser.add_argument("--torch-export", action="store_true", help="also as graphs of torch.export, .pt2")
    parser.add_argument("--license", default="unknown", metavar="ID", help="of the weights, for the model card")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run(main)
