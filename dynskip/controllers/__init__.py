"""Controllers: what decides which layers a sequence, or a token, runs."""

from dynskip.controllers.accounting import CountingController
from dynskip.controllers.gate import HiddenStateGate
from dynskip.controllers.learned import (
    LearnedController,
    LearnedSequenceController,
    LearnedTokenController,
    ModelSizes,
)
from dynskip.controllers.protocol import SequenceController, TokenContext, TokenController
from dynskip.controllers.registry import make_controller
from dynskip.controllers.static import StaticController
from dynskip.controllers.storage import load_controller, save_controller

__all__ = [
    "CountingController",
    "HiddenStateGate",
    "LearnedController",
    "LearnedSequenceController",
    "LearnedTokenController",
    "ModelSizes",
    "SequenceController",
    "StaticController",
    "TokenContext",
    "TokenController",
    "load_controller",
    "make_controller",
    "save_controller",
]
