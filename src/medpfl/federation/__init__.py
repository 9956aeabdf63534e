"""How clients train and what reaches the server."""

from medpfl.federation.channels import CHANNELS, Channel, Plain
from medpfl.federation.client import client_step
from medpfl.federation.hooks import NO_HOOKS, Hooks
from medpfl.federation.recipes import check_recipe
from medpfl.federation.rounds import run_round
from medpfl.federation.secure import SecAggPlus, SecureSum
from medpfl.federation.training import TrainingConfig, train

__all__ = [
    "CHANNELS",
    "NO_HOOKS",
    "Channel",
    "Hooks",
    "Plain",
    "SecAggPlus",
    "SecureSum",
    "TrainingConfig",
    "check_recipe",
    "client_step",
    "run_round",
    "train",
]
