"""The notebooks as they are committed: valid, and with what they import; .ci/run executes them."""

import ast
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from jaxchat.cli.experiments import experiment_names
from jaxchat.cli.launch import launch_parser
from jaxchat.devices.host import Gpu
from jaxchat.devices.problems import BF16
from tests.tiny import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
GIB = 1 << 30


def read(path):
    return nbformat.read(path, as_version=4)


def code(path):
    """The code cells as Python; `!` and `%` lines become calls."""
    transform = TransformerManager().transform_cell
    return [transform(cell.source) for cell in read(path).cells if cell.cell_type == "code"]


def functions(path):
    """The functions that the cells define, in a namespace of their own."""
    nodes = [node for cell in code(path) for node in ast.parse(cell).body if isinstance(node, ast.FunctionDef)]
    return SimpleNamespace(**{node.name: node for node in nodes})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_valid(path):
    nbformat.validate(read(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_what_a_notebook_imports_exists(path):
    for cell in code(path):
        for node in ast.walk(ast.parse(cell)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxchat"):
                module = __import__(node.module, fromlist=["_"])
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


class TestFirstChat:
    path = ROOT / "notebooks" / "first_chat.ipynb"

    def test_it_is_committed_without_outputs(self):
        cells = [cell for cell in read(self.path).cells if cell.cell_type == "code"]
        assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)

    def define(self, name, **names):
        exec(compile(ast.Module([getattr(functions(self.path), name)], []), str(self.path), "exec"), names)
        return names[name]

    def test_the_experiment_suits_the_gpu(self):
        suits = self.define("suits", BF16=BF16)
        gpus = {
            "quickstart": [()],
            "rtx8gb --sizes=auto --budget=2h": [
                (Gpu("Tesla T4", "550", 15 * GIB, 0, 7.5),) * 2,
                (Gpu("Tesla P100-PCIE-16GB", "450", 16 * GIB, 0),),  # an old driver does not say its capability
            ],
            "rtx8gb": [
                (Gpu("NVIDIA GeForce RTX 4060", "580", 8 * GIB, 0, 8.9),),
                (Gpu("NVIDIA GeForce RTX 3060", "580", 12 * GIB, 0, 8.6),),
            ],
            "rtx24gb": [
                (Gpu("NVIDIA L4", "550", 22 * GIB, 0, 8.9),),
                (Gpu("NVIDIA A100-SXM4-40GB", "550", 40 * GIB, 0, 8.0),) * 2,
                (Gpu("NVIDIA GB10", "580", None, None, 12.1),),
            ],
        }
        for experiment, cases in gpus.items():
            assert [suits(case) for case in cases] == [experiment] * len(cases)
            name, *options = experiment.split()
            assert name in experiment_names() and f"`{name}`" in read(self.path).cells[0].source
            launch_parser().parse_known_args(options)

    def test_a_checkout_is_told_from_other_folders(self, tmp_path):
        is_checkout = self.define("is_checkout")
        assert is_checkout(ROOT) and not is_checkout(tmp_path) and not is_checkout(ROOT / "jaxchat")

    def test_the_archive_keeps_what_chat_needs(self):
        wanted = self.define("wanted", Path=Path, model=SimpleNamespace(stage="sft"))
        kept = ["run", "run/config.json", "run/report.md", "run/plots/loss.png", "run/tokenizer/tokenizer.json"]
        kept += ["run/pretrain/stage.json", "run/sft/checkpoints/120/params", "run/sft/stage.json"]
        left = ["run/data/pretrain/shard_00000.parquet", "run/pretrain/checkpoints/360/params"]
        for name in kept + left:
            entry = SimpleNamespace(name=name)
            assert wanted(entry) == (entry if name in kept else None), name
