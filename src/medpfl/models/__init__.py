"""The model zoo, anybody's `nn.Module`, checkpoints, and what an audit of a model means."""

from medpfl.models import lenet, resnet
from medpfl.models.building import build_model
from medpfl.models.normalization import Normalization
from medpfl.models.preparation import prepare
from medpfl.models.registry import MODELS, ModelFactory

__all__ = ["MODELS", "ModelFactory", "Normalization", "build_model", "lenet", "prepare", "resnet"]
