"""Methods that compute the DPO loss from logits, behind one small interface; a new peer is one class in `PEERS`."""

from __future__ import annotations

from .base import Peer
from .compiled import Compiled
from .eager import Eager
from .ours import Ours, OursInPlace, OursInPlaceStatistics
from .trl_old import TRLOld
from .trl_triton import TRLTriton

#: In the order of the tables, by the names that `--peers` takes.
PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (Eager, TRLOld, Compiled, Ours, OursInPlace, OursInPlaceStatistics)
}

#: Peers that run on a GPU only; the GPU session also measures them.
GPU_PEERS: dict[str, type[Peer]] = {TRLTriton.name: TRLTriton}

#: Packages for the same purpose that are not measured, by their name on the package index, and the reason.
ABSENT = {
    "flash-pref": "shares prefixes inside models of transformers < 4.52; the trainer here needs transformers >= 5.0",
    "quack-kernels": "runs on NVIDIA GPUs only, and its chunked linear cross-entropy takes no gradient a token, which DPO needs",
}

__all__ = ["ABSENT", "GPU_PEERS", "PEERS", "Peer"]
