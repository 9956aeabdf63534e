"""Published attacks on updates, one file each; importing this package registers them in `ATTACKS`."""

from medpfl.attacks import (
    april,
    ares,
    cpl,
    curious_abandon_honesty,
    dlg,
    feature_readout,
    fedavg_inversion,
    first_layer_readout,
    gradinv,
    gradinversion,
    idlg,
    loki,
    medleak,
    peeling,
    robbing_the_fed,
    scale_mia,
    spear,
)
from medpfl.attacks.base import ATTACKS, Attack

__all__ = [
    "ATTACKS",
    "Attack",
    "april",
    "ares",
    "cpl",
    "curious_abandon_honesty",
    "dlg",
    "feature_readout",
    "fedavg_inversion",
    "first_layer_readout",
    "gradinv",
    "gradinversion",
    "idlg",
    "loki",
    "medleak",
    "peeling",
    "robbing_the_fed",
    "scale_mia",
    "spear",
]
