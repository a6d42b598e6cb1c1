"""Controllers: what decides which layers a sequence, or a token, runs."""

from dynskip.controllers.gate import HiddenStateGate
from dynskip.controllers.protocol import SequenceController, TokenContext, TokenController
from dynskip.controllers.static import StaticController

__all__ = ["HiddenStateGate", "SequenceController", "StaticController", "TokenContext", "TokenController"]
