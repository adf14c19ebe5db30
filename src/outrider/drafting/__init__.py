"""What trained drafters share: network, cache of committed tokens, drawing, and the chain of autoregressive ones."""

from outrider.drafting.cache import DraftCache, Waiting
from outrider.drafting.calibrated import CalibratedDrafter
from outrider.drafting.chain import ChainDrafter, ChainState
from outrider.drafting.drawing import Drawing
from outrider.drafting.net import DraftNet, linear, load_net, rms_norm, rowwise
from outrider.drafting.trained import TrainedDrafter

__all__ = [
    "CalibratedDrafter",
    "ChainDrafter",
    "ChainState",
    "DraftCache",
    "DraftNet",
    "Drawing",
    "TrainedDrafter",
    "Waiting",
    "linear",
    "load_net",
    "rms_norm",
    "rowwise",
]
