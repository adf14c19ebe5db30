"""The values that pass between packages, and the contracts of targets, drafters, policies, backends and caches.

Shape legend, used in names and docstrings everywhere:
B rows in a step   K drafted tokens at most   T packed tokens   R rows of logits   V vocabulary   D model width
F feature width (= auxiliary layers x D)   H heads   Hkv key/value heads   Dh head width   N training tokens
"""

from __future__ import annotations

from outrider.types.caches import KVCache, PagedCache, PagedTarget, SharesPrefixes
from outrider.types.fused_drafting import (
    AutoregressiveParts,
    BlockDrafter,
    BlockParts,
    CoreScaling,
    Drafts,
    DraftsBlocks,
    DraftsInTurn,
    InTurnDrafter,
    MarkovParts,
)
from outrider.types.passes import (
    Integers,
    Mask,
    RaggedBatch,
    StackOutput,
    TargetOutput,
    Values,
    joined,
    to_array,
    to_list,
    to_tensor,
)
from outrider.types.results import DraftReport, Event, Output, Piece, RequestStats, TokenLogprobs
from outrider.types.roles import Drafter, Forgets, ReadsHidden, ResetsRows, TargetModel, TargetSpec, readable_layers
from outrider.types.rounds import Context, Distribution, Processor, Proposal, RequestRows, Rng, Verification
from outrider.types.stacks import Backend, DraftLoop, FindsLargest, HasStack, Stack, TiedHead, finds_largest
from outrider.types.steps import RowRecord, SchedulerPolicy, StepCost, StepObserver, StepRecord, StepsAside, StepView

__all__ = [
    "AutoregressiveParts",
    "Backend",
    "BlockDrafter",
    "BlockParts",
    "Context",
    "CoreScaling",
    "Distribution",
    "DraftLoop",
    "DraftReport",
    "Drafter",
    "Drafts",
    "DraftsBlocks",
    "DraftsInTurn",
    "Event",
    "FindsLargest",
    "Forgets",
    "HasStack",
    "InTurnDrafter",
    "Integers",
    "KVCache",
    "MarkovParts",
    "Mask",
    "Output",
    "PagedCache",
    "PagedTarget",
    "Piece",
    "Processor",
    "Proposal",
    "RaggedBatch",
    "ReadsHidden",
    "RequestRows",
    "RequestStats",
    "ResetsRows",
    "Rng",
    "RowRecord",
    "SchedulerPolicy",
    "SharesPrefixes",
    "Stack",
    "StackOutput",
    "StepCost",
    "StepObserver",
    "StepRecord",
    "StepView",
    "StepsAside",
    "TargetModel",
    "TargetOutput",
    "TargetSpec",
    "TiedHead",
    "TokenLogprobs",
    "Values",
    "Verification",
    "finds_largest",
    "joined",
    "readable_layers",
    "to_array",
    "to_list",
    "to_tensor",
]
