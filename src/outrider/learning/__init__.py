"""Drafters with gradients: what the trainer trains. Each kind's options say how a new one starts."""

from outrider.learning.block import BlockLoss, DFlashTraining, DSparkTraining, TrainableBlock
from outrider.learning.chain import ChainLoss, Eagle3Training, MTPTraining, TrainableChain
from outrider.learning.fresh import training_of
from outrider.learning.frozen import Frozen
from outrider.learning.model import DraftModelTraining, TrainableModel

__all__ = [
    "BlockLoss",
    "ChainLoss",
    "DFlashTraining",
    "DSparkTraining",
    "DraftModelTraining",
    "Eagle3Training",
    "Frozen",
    "MTPTraining",
    "TrainableBlock",
    "TrainableChain",
    "TrainableModel",
    "training_of",
]
