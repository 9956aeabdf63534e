"""The model zoo, anybody's `nn.Module`, checkpoints, and what an audit of a model means."""

from medpfl.models import cnn, derivatives, lenet, monai_nets, patches, resnet, unet, vit
from medpfl.models.building import build_model
from medpfl.models.imagenet import imagenet_weights
from medpfl.models.inspection import VALIDATORS, Finding
from medpfl.models.normalization import Normalization, Normalize
from medpfl.models.preparation import prepare
from medpfl.models.registry import MODELS, SEGMENTATION, ModelFactory
from medpfl.models.state import fingerprint, load_checkpoint, load_model, save_model
from medpfl.models.validators import validate

__all__ = [
    "MODELS",
    "SEGMENTATION",
    "VALIDATORS",
    "Finding",
    "ModelFactory",
    "Normalization",
    "Normalize",
    "build_model",
    "cnn",
    "derivatives",
    "fingerprint",
    "imagenet_weights",
    "lenet",
    "load_checkpoint",
    "load_model",
    "monai_nets",
    "patches",
    "prepare",
    "resnet",
    "save_model",
    "unet",
    "validate",
    "vit",
]
