"""What trained drafters share: network, KV cache of committed tokens, sampling drafts, and autoregressive drafting."""

from outrider.drafters.base.autoregressive import AutoregressiveDrafter, AutoregressiveState
from outrider.drafters.base.calibrated import CalibratedDrafter
from outrider.drafters.base.draft_cache import DraftCache, Waiting
from outrider.drafters.base.draft_sampling import Drawing, block_proposal, draft_keys
from outrider.drafters.base.network import DraftNet, linear, load_net, rms_norm, rowwise
from outrider.drafters.base.trained import CachedDrafter, TrainedDrafter

__all__ = [
    "AutoregressiveDrafter",
    "AutoregressiveState",
    "CachedDrafter",
    "CalibratedDrafter",
    "DraftCache",
    "DraftNet",
    "Drawing",
    "TrainedDrafter",
    "Waiting",
    "block_proposal",
    "draft_keys",
    "linear",
    "load_net",
    "rms_norm",
    "rowwise",
]
