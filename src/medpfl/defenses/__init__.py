"""Defenses: one file each, registered by being imported here."""

from medpfl.defenses.ats import ATS
from medpfl.defenses.base import DEFENSES, Defense
from medpfl.defenses.censor import Censor
from medpfl.defenses.clip import Clip
from medpfl.defenses.compose import Composition
from medpfl.defenses.delta_bound import DeltaBound
from medpfl.defenses.dp_sgd import DPSGD
from medpfl.defenses.fed_cdp import FedCDP
from medpfl.defenses.fed_sdp import FedSDP
from medpfl.defenses.gaussian import Gaussian
from medpfl.defenses.group_norm import GroupNorm
from medpfl.defenses.instahide import InstaHide
from medpfl.defenses.laplace import Laplace
from medpfl.defenses.local_dp import LocalDP
from medpfl.defenses.lora import Lora
from medpfl.defenses.low_rank import LowRankFactors
from medpfl.defenses.mixup import Mixup
from medpfl.defenses.model_cloaking import ModelCloaking
from medpfl.defenses.none import NoDefense
from medpfl.defenses.precode import Precode
from medpfl.defenses.prune import Prune
from medpfl.defenses.quantize import Quantize
from medpfl.defenses.random_k import RandomEntries
from medpfl.defenses.share import Share
from medpfl.defenses.sign import Sign
from medpfl.defenses.soteria import Soteria
from medpfl.defenses.top_k import TopEntries

__all__ = [
    "ATS",
    "DEFENSES",
    "DPSGD",
    "Censor",
    "Clip",
    "Composition",
    "Defense",
    "DeltaBound",
    "FedCDP",
    "FedSDP",
    "Gaussian",
    "GroupNorm",
    "InstaHide",
    "Laplace",
    "LocalDP",
    "Lora",
    "LowRankFactors",
    "Mixup",
    "ModelCloaking",
    "NoDefense",
    "Precode",
    "Prune",
    "Quantize",
    "RandomEntries",
    "Share",
    "Sign",
    "Soteria",
    "TopEntries",
]
