"""The process of one peer: ``python -m bench.peers.worker PEER`` answers the requests of `PeerProcess`."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any

# Where each peer's class is; its methods are what can be asked.
PEERS = {
    "dynskip": "bench.peers.own:DynskipPeer",
    "vllm": "bench.peers.vllm_peer:VLLMPeer",
    "transformers": "bench.peers.transformers_peer:TransformersPeer",
    "ctranslate2": "bench.peers.ctranslate2_peer:CTranslate2Peer",
    "llama.cpp": "bench.peers.llama_cpp_peer:LlamaCppPeer",
}
_PR_SET_PDEATHSIG = 1


def main(name: str) -> int:
    """Answer requests until stdin ends."""
    # A stopped process would outlive a driver that was killed.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    peer: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if peer is None:
                module, _, kind = PEERS.get(name, name).partition(":")
                peer = getattr(importlib.import_module(module), kind)()
            answer = {"ok": getattr(peer, request.pop("do"))(**request)}
        except Exception as error:  # whatever a library raises is this peer's answer
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
