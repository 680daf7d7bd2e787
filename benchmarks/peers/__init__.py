"""Everyone who computes the DPO loss from logits, behind one small interface; a new peer is one class in `PEERS`."""

from __future__ import annotations

from .base import Peer
from .compiled import Compiled
from .eager import Eager
from .ours import Ours, OursInPlace, OursInPlaceStatistics
from .trl_old import TRLOld

#: In the order of the tables; names are what `--peers` takes.
PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (Eager, TRLOld, Compiled, Ours, OursInPlace, OursInPlaceStatistics)
}

__all__ = ["PEERS", "Peer"]
