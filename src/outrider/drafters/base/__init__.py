"""What trained drafters share: network, KV cache of committed tokens, sampling drafts, and autoregressive drafting."""

from outrider.drafters.base.autoregressive import AutoregressiveDrafter, AutoregressiveState
from outrider.drafters.base.calibrated import CalibratedDrafter
from outrider.drafters.base.draft_cache import DraftCache, Waiting
from outrider.drafters.base.draft_sampling import Drawing, draft_keys, packed_proposal
from outrider.drafters.base.network import DraftNet, head_rows, linear, load_net, measured_softcap, rms_norm, rowwise
from outrider.drafters.base.several import SeveralDrafters
from outrider.drafters.base.trained import CachedDrafter, TrainedDrafter

__all__ = [
    "AutoregressiveDrafter",
    "AutoregressiveState",
    "CachedDrafter",
    "CalibratedDrafter",
    "DraftCache",
    "DraftNet",
    "Drawing",
    "SeveralDrafters",
    "TrainedDrafter",
    "Waiting",
    "draft_keys",
    "head_rows",
    "linear",
    "load_net",
    "measured_softcap",
    "packed_proposal",
    "rms_norm",
    "rowwise",
]
