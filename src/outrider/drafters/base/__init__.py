"""What trained drafters share: network, cache of committed tokens, drawing, and the chain of autoregressive ones."""

from outrider.drafters.base.autoregressive import AutoregressiveDrafter, AutoregressiveState
from outrider.drafters.base.calibrated import CalibratedDrafter
from outrider.drafters.base.draft_cache import DraftCache, Waiting
from outrider.drafters.base.draft_sampling import Drawing
from outrider.drafters.base.network import DraftNet, linear, load_net, rms_norm, rowwise
from outrider.drafters.base.trained import TrainedDrafter

__all__ = [
    "AutoregressiveDrafter",
    "AutoregressiveState",
    "CalibratedDrafter",
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
