"""How the clients of a round are run; every engine gives the same updates for the same tasks."""

from fslora.engines.sequential import sequential
from fslora.engines.wire import over_wire

__all__ = ["over_wire", "sequential"]
