"""The two sides of a comparison, old and new: files, extension, and the environment that their processes run in."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Not under version control: old states, built extensions, records, random weights.
FOLDER = ROOT / ".golden"
_EXTENSION = Path("dynskip") / "_C.abi3.so"


@dataclass(frozen=True)
class Side:
    """One state of the project. root: its files. commit: 12 digits, with ``+`` for a working tree that differs."""

    name: str
    root: Path
    commit: str

    def start(self, script: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        """A process of this state that runs ``script``, which lies beside this file; its pipes speak lines of text."""
        command = [sys.executable, str(ROOT / "bench" / "golden" / script), *map(str, arguments)]
        # PYTHONPATH chooses the state, whatever is installed; nothing is fetched, and no GPU is seen.
        environment = {
            "PYTHONPATH": str(self.root),
            "DYNSKIP_CACHE": str(FOLDER / "no-cache"),
            **dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRITON_INTERPRET"), "1"),
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
            **environment,
        }
        pipe, environment = subprocess.PIPE, {**os.environ, **environment}
        return subprocess.Popen(command, env=environment, cwd=FOLDER, stdin=pipe, stdout=pipe, text=True)


def make_side(name: str, commit: str | None) -> Side:
    """The state of ``commit``, or the working tree for None, with its extension built.

    Raises ValueError for what git does not know as a commit, RuntimeError where the extension cannot be built.
    """
    if commit is None:
        side = Side(name, ROOT, git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else ""))
    else:
        try:
            full = git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
        except subprocess.CalledProcessError:
            raise ValueError(f"golden: {name.upper()} must be a commit, got {commit!r}. See git log.") from None
        side = Side(name, FOLDER / full[:12], full[:12])
    FOLDER.mkdir(exist_ok=True)
    _build(ROOT)  # most states have its sources
    if side.root != ROOT:
        if not side.root.exists():
            _extract(full, side.root)
        _build(side.root)
    return side


def git(*arguments: str) -> str:
    """What git prints."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _extract(commit: str, root: Path) -> None:
    """The files of ``commit``, in one piece: what is broken off leaves no ``root``."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    partial = root.with_name(f"{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        tar.extractall(partial, filter="fully_trusted")  # our own history; dynskip/kernels is a link
    partial.rename(root)


def _build(root: Path) -> None:
    """Put the extension in place: the one that is there, or one built from the same sources, or else built now."""
    target, sources = root / _EXTENSION, [root / "setup.py", *sorted((root / "csrc").rglob("*"))]
    sources = [path for path in sources if path.is_file()]
    digest = hashlib.sha256(f"{sys.version} {importlib.metadata.version('torch')}".encode())
    for path in sources:
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    kept = FOLDER / "extensions" / f"{digest.hexdigest()[:16]}.so"
    is_built = target.exists() and target.stat().st_mtime >= max(path.stat().st_mtime for path in sources)
    if not is_built and kept.exists():
        shutil.copy(kept, target)
    elif not is_built:
        print(f"building the extension of {root}", file=sys.stderr, flush=True)
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        environment = {**os.environ, "DYNSKIP_BUILD_EXT": "1", "DYNSKIP_BUILD_CUDA": "0"}
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or not target.exists():
            raise RuntimeError(f"golden: {root} must build, got:\n{(done.stdout + done.stderr)[-4000:]}")
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        shutil.copy(target, kept)
