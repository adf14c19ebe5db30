"""Drafters with gradients: what the trainer trains. Each kind's options say how a new one starts."""

from outrider.training.networks.autoregressive_network import (
    AutoregressiveLoss,
    Eagle3Training,
    MTPTraining,
    TrainableAutoregressive,
)
from outrider.training.networks.base import TrainableNet
from outrider.training.networks.batch import FeatureBatch
from outrider.training.networks.block_network import BlockLoss, DFlashTraining, DSparkTraining, TrainableBlock
from outrider.training.networks.draft_model_network import DraftModelTraining, TrainableModel
from outrider.training.networks.four_bits import in_four_bits, matrices_of, second_moments
from outrider.training.networks.frozen import Frozen, fill
from outrider.training.networks.initial import training_of

__all__ = [
    "AutoregressiveLoss",
    "BlockLoss",
    "DFlashTraining",
    "DSparkTraining",
    "DraftModelTraining",
    "Eagle3Training",
    "FeatureBatch",
    "Frozen",
    "MTPTraining",
    "TrainableAutoregressive",
    "TrainableBlock",
    "TrainableModel",
    "TrainableNet",
    "fill",
    "in_four_bits",
    "matrices_of",
    "second_moments",
    "training_of",
]
