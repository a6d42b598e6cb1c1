"""Imports run one way: a module imports only what stands above it in ``ORDER``, or in its own package."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dynskip

ROOT = Path(__file__).resolve().parents[2]

# Top to bottom. An entry is a module of dynskip, or a package, whose modules may import each other.
ORDER = [
    # what to run: pure data, no device
    "version",
    "arguments",
    "paths",
    "flat_rows",
    "plan",
    "cost",
    # the ops: what they compute, who computes it
    "checks",
    "reference",
    "torch_backend",
    "kernels",
    "native",
    "backends",
    "prompt_attention",
    "ops",
    "row_reference",
    "row_ops",
    # the model and its state
    "assets",
    "linear",
    "threads",
    "cgroup",
    "memory",
    "slot_pool",
    "kv_cache",
    "controllers",
    "routing",
    "step",
    "opt",
    "reference_executor",
    "decode_work",
    "fused_decode",
    "decode_graphs",
    "decode_steps",
    "executor",
    "model",
    "source",
    "source_files",
    "source_model",
    "checkpoint",
    # from prompts to texts
    "sampling",
    "engine",
    "generate",
    "tokenizer",
    "prompts",
    "llm",
    "async_llm",
    # what stands around it
    "training",
    "validation_draws",
    "row_validation_cases",
    "validation_cases",
    "validation_errors",
    "row_validation",
    "validation",
    "cubin",
    "ptx",
    "offline_compile",
    "offline_worker",
    "benchmark",
    "tuning",
    "evaluation",
    "cli",
    "__main__",
]
# (importer, imported): why the way back is needed. Such an import stands inside a function.
EXCEPTIONS = {
    ("model", "checkpoint"): "from_pretrained, from_hf and save_pretrained are methods of the class checkpoint builds",
}
KERNELS_MAY_IMPORT = {"torch", "triton", "dynskip.kernels", *sys.stdlib_module_names}


def sources() -> dict[str, str]:
    """Source text of every module of dynskip and kernels, by dotted name without ``dynskip.``; the facade is ''."""
    found = {}
    for folder, prefix in ((ROOT / "dynskip", ()), (ROOT / "kernels", ("kernels",))):
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            if not prefix and parts[0] == "kernels":
                continue  # the symlink, where a Python version follows it
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path.read_text(encoding="utf-8")
    return found


def imported_names(source: str) -> Iterator[tuple[str, bool]]:
    """Every module that ``source`` imports, wherever, and whether the import stands inside a function.

    ``from a import b`` yields ``a.b``: b may be a module; if it is not, its module is a prefix of the name.
    """

    def visit(node: ast.AST, deferred: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{'.' * node.level}{node.module or ''}.{alias.name}", deferred) for alias in node.names)
        deferred = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, deferred)

    return visit(ast.parse(source), False)


def unit_of(name: str) -> str:
    """The entry of ``ORDER`` that the module ``name`` (without ``dynskip.``) belongs to."""
    return name.split(".")[0]


def complaints(name: str, source: str) -> list[str]:
    """What is wrong with the imports of the module ``name``."""
    unit, found = unit_of(name), []
    if unit and unit not in ORDER:
        return [f"{name}: not in ORDER of tests/package/test_imports.py. Add it where it belongs."]
    for imported, deferred in imported_names(source):
        if imported.startswith("."):
            found.append(f"{name}: {imported}: relative imports hide the direction; write dynskip.<module>")
            continue
        package, _, rest = imported.partition(".")
        if package == "kernels":
            found.append(f"{name}: {imported}: that is Hugging Face's package; ours is dynskip.kernels")
        if unit == "kernels" and not any(
            imported == allowed or imported.startswith(f"{allowed}.") for allowed in KERNELS_MAY_IMPORT
        ):
            found.append(f"{name}: {imported}: kernels import torch, triton and each other only")
        # The facade imports from all, nobody imports from it: `from dynskip import LLM` would be a cycle.
        if package != "dynskip" or not unit:
            continue
        target = unit_of(rest)
        if target not in ORDER:
            found.append(f"{name}: {imported}: import the name from its module, not from the facade")
        elif target != unit and ORDER.index(target) > ORDER.index(unit):
            if (unit, target) not in EXCEPTIONS:
                found.append(f"{name}: {imported}: {target} stands below {unit}")
            elif not deferred:
                found.append(f"{name}: {imported}: the exception holds inside a function only")
    return found


def test_imports_run_one_way() -> None:
    modules = sources()
    assert {"", "paths", "cli.generate", "kernels.scatter_add"} <= set(modules), "the walk has lost part of the tree"
    found = [complaint for name, source in modules.items() for complaint in complaints(name, source)]
    assert not found, "\n".join(found)


def test_the_facade_has_what_it_names_and_loads_it_late() -> None:
    code = "import sys, dynskip; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'triton')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    assert set(dynskip.__all__) == {*dynskip._HOME, "__version__", "ops", "reference"}
    assert dir(dynskip) == sorted(dynskip.__all__)
    for name, home in dynskip._HOME.items():
        assert getattr(dynskip, name) is vars(importlib.import_module(home))[name]


def test_every_exception_is_needed() -> None:
    modules = sources()
    for importer, imported in EXCEPTIONS:
        names = [name for name, _ in imported_names(modules[importer])]
        assert any(name.startswith(f"dynskip.{imported}") for name in names), (importer, imported)


def test_structures_names_every_module() -> None:
    page = (ROOT / "docs" / "structures.md").read_text(encoding="utf-8")
    sections = {title.strip("/\n "): text for title, _, text in (part.partition("\n") for part in page.split("\n## "))}
    missing = []
    for name in filter(None, sources()):
        *packages, module = name.split(".")
        section = sections.get("kernels" if packages == ["kernels"] else "/".join(["dynskip", *packages]), "")
        if f"`{module}.py`" not in section and f"`{module}/`" not in section:
            missing.append(name)
    assert not missing, f"docs/structures.md must have a line on {', '.join(missing)}"


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("paths", "import dynskip.llm", "llm stands below paths"),
        ("paths", "from dynskip.llm import LLM", "llm stands below paths"),
        ("paths", "from dynskip import llm", "llm stands below paths"),
        ("plan", "def f():\n    from dynskip.causal_lm import OPTForCausalLM", "model stands below plan"),
        ("model", "from dynskip.models.checkpoint import load", "inside a function only"),
        ("llm", "from dynskip import LayerPath", "not from the facade"),
        ("llm", "from .paths import LayerPath", "relative imports"),
        ("llm", "import kernels.scatter_add", "Hugging Face's package"),
        ("llm", "from kernels import scatter_add", "Hugging Face's package"),
        ("kernels.scatter_add", "from dynskip.paths import LayerPath", "kernels import torch, triton"),
        ("kernels.scatter_add", "import transformers", "kernels import torch, triton"),
        ("kernels.scatter_add", "import torchvision", "kernels import torch, triton"),
        ("newcomer", "", "not in ORDER"),
    ],
)
def test_a_bad_import_is_found(name: str, source: str, complaint: str) -> None:
    assert any(complaint in found for found in complaints(name, source)), complaints(name, source)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("llm", "from dynskip.paths import LayerPath\nfrom dynskip import reference\nimport torch"),
        ("model", "def f():\n    from dynskip.models.checkpoint import load"),
        ("kernels.scatter_add", "import triton.language as tl\nfrom collections import Counter\nimport torch"),
        ("kernels.scatter_add", "from dynskip.kernels.launches import launch"),
        ("training.run", "from dynskip.data.batches import Batch"),
        ("", "from dynskip.llm import LLM"),
    ],
)
def test_a_good_import_passes(name: str, source: str) -> None:
    assert complaints(name, source) == []
