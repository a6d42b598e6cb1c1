"""A peer without a model, for the driver's tests: ``python -m bench.peers.worker fake_peer:FakePeer``."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time


class FakePeer:
    """Answers like an engine that needs a millisecond for everything, and counts on while it runs."""

    def __init__(self) -> None:
        self.count = 0
        threading.Thread(target=self._count, daemon=True).start()

    def _count(self) -> None:
        while True:
            self.count += 1
            time.sleep(0.001)

    def load(self, folder: str, ms: float = 1.0) -> dict[str, str]:
        """Print what is no answer, and load nothing."""
        self.ms = ms
        print("loading", folder, flush=True)
        return {"version": "0", "settings": "none"}

    def ticks(self) -> int:
        """How often it has counted."""
        return self.count

    def spawn(self) -> int:
        """The id of a child that runs until it is killed."""
        self.child = subprocess.Popen([sys.executable, "-c", "import time\nwhile True: time.sleep(0.001)"])
        return self.child.pid

    def prefill(self, batch: int, prompt_len: int, num_new: int) -> float:
        """So many milliseconds a prompt."""
        return self.ms * batch

    def decode(self, num_steps: int) -> list[float]:
        """The first step is slow, as if something had to wake up."""
        return [100.0] + [self.ms] * (num_steps - 1)

    def begin_stream(self, name: str, num_requests: int) -> dict[str, float]:
        """A stream of as many tokens as requests."""
        return {"tokens": num_requests, "layers": 1.0}

    def stream(self, name: str, share: float) -> float:
        """Each part takes the same: so many milliseconds, and half of that at the paper's depths."""
        return self.ms / (2e3 if name == "paper" else 1e3)

    def fail(self) -> None:
        """Raise."""
        raise ValueError("nothing to give")

    def die(self) -> None:
        """End the process without an answer."""
        print("out of luck", flush=True)
        os._exit(3)

    def sleep(self) -> None:
        """Take long."""
        time.sleep(60)
