"""The house is in order: imports point upwards only, the source is clean."""

import ast
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT, run_command

# A module imports only from rows above its own. `errors`, `config` and `distributed` may be imported anywhere.
ROWS = [
    "gandist",
    "gandist.redaction",
    "gandist.errors",
    "gandist.atomic",
    "gandist.json_lines",
    "gandist.streams",
    "gandist.resolution",
    "gandist.arguments",
    "gandist.config",
    "gandist.config_file",
    "gandist.schedule",
    "gandist.network",
    "gandist.launcher",
    "gandist.messages",
    "gandist.rendezvous",
    "gandist.watchdog",
    "gandist.distributed",
    "gandist.preemption",
    "gandist.data.order",
    "gandist.data.decode",
    "gandist.data.remote",
    "gandist.data.cache",
    "gandist.data.sources",
    "gandist.data.index",
    "gandist.data.storage",
    "gandist.data.shards",
    "gandist.data.prefetch",
    "gandist.data.loader",
    "gandist.data.ahead",
    "gandist.data.memory",
    "gandist.data.labels",
    "gandist.data.device",
    "gandist.data.mixing",
    "gandist.data.usage",
    "gandist.data.check",
    "gandist.data.encode",
    "gandist.data.collections",
    "gandist.data.torchvision_datasets",
    "gandist.data.writer",
    "gandist.data.files",
    "gandist.data.pack",
    "gandist.data",
    "gandist.losses",
    "gandist.models.noise",
    "gandist.models.spectral_norm",
    "gandist.models.convolution",
    "gandist.models.layers",
    "gandist.models.residual",
    "gandist.models.heads",
    "gandist.models.mlp",
    "gandist.models.dcgan",
    "gandist.models.resnet",
    "gandist.models.biggan",
    "gandist.models.biggan_deep",
    "gandist.models.r3gan",
    "gandist.models.stargan",
    "gandist.models.stylegan2",
    "gandist.models",
    "gandist.randomness",
    "gandist.penalties",
    "gandist.augment",
    "gandist.ema",
    "gandist.objective",
    "gandist.engine.precision",
    "gandist.engine.guard",
    "gandist.engine.player",
    "gandist.engine.ddp",
    "gandist.engine.zero",
    "gandist.engine.compilation",
    "gandist.engine",
    "gandist.checkpoint.folder",
    "gandist.checkpoint.tensors",
    "gandist.checkpoint.identity",
    "gandist.checkpoint.retention",
    "gandist.checkpoint.loading",
    "gandist.checkpoint.saving",
    "gandist.checkpoint",
    "gandist.checkpoint.__main__",
    "gandist.ownership",
    "gandist.trained",
    "gandist.evaluation",
    "gandist.evaluation.classification",
    "gandist.evaluation.weights",
    "gandist.evaluation.judge",
    "gandist.evaluation.features",
    "gandist.evaluation.frechet",
    "gandist.evaluation.manifold",
    "gandist.evaluation.statistics",
    "gandist.evaluation.metrics",
    "gandist.evaluation.reference",
    "gandist.evaluation.sampling",
    "gandist.evaluation.cas",
    "gandist.evaluation.comparison",
    "gandist.evaluation.evaluator",
    "gandist.tracking.meter",
    "gandist.tracking.tracker",
    "gandist.tracking.console",
    "gandist.tracking.run_folder",
    "gandist.tracking.health",
    "gandist.tracking.weights_and_biases",
    "gandist.tracking",
    "gandist.environment",
    "gandist.flops",
    "gandist.summary",
    "gandist.preview",
    "gandist.profiling",
    "gandist.trainer",
    "gandist.train",
    "gandist.evaluate",
    "gandist.doctor",
    "gandist.doctor.finding",
    "gandist.doctor.node",
    "gandist.doctor.gpu",
    "gandist.doctor.exchange",
    "gandist.doctor.__main__",
    "gandist.api",
    "gandist.given",
    "gandist.generate",
    "gandist.classify",
    "gandist.translate",
    "gandist.export",
    "gandist.report",
    "gandist.report.runs",
    "gandist.report.page",
    "gandist.report.__main__",
]
UNPICKLING = {
    *("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "unsafe_load", "full_load"),
    *("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list"),
    "recv_object_list",
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "gandist").rglob("*.py")
}


def test_every_module_has_its_row() -> None:
    assert sorted(MODULES) == sorted(ROWS)


@pytest.mark.parametrize("module", ROWS)
def test_imports_point_upwards(module: str) -> None:
    for imported in _imports(MODULES[module]):
        assert ROWS.index(imported) < ROWS.index(module), f"{module} imports {imported}, which is below it"


def test_every_module_is_imported_without_a_word(monkeypatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # else DeepSpeed tells what it has found
    imports = "; ".join(f"import {module}" for module in ROWS)
    result = run_command(sys.executable, "-c", imports)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def _imports(path: Path) -> set[str]:
    """The gandist modules a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= modules & MODULES.keys() or {node.module}
    return {name for name in found if name in MODULES}


@pytest.mark.parametrize("module", ROWS)
def test_nothing_is_unpickled(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        names = {alias.name for alias in node.names} if isinstance(node, ast.Import | ast.ImportFrom) else set()
        names |= {node.module} if isinstance(node, ast.ImportFrom) else set()
        names |= {node.attr} if isinstance(node, ast.Attribute) else set()
        assert not names & UNPICKLING, f"{module}, line {node.lineno}: use gandist.messages between ranks, JSON on the disk"
        if isinstance(node, ast.Call):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert "allow_pickle" not in options, f"{module}, line {node.lineno}"
            if ast.unparse(node.func) == "torch.load":
                assert options.get("weights_only") == "True", f"{module}, line {node.lineno}"


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command: list[str]) -> None:
    result = run_command(sys.executable, "-m", "ruff", *command, ".")
    assert result.returncode == 0, result.stdout + result.stderr
