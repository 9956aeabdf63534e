"""NVIDIA FLARE: filters that vet, defend and gate at a site, a recorder for the server, and a site's privacy policy.

Imports `nvflare` (extra `medpfl[nvflare]`), which nothing else in MedPFL does. All parameters of filters are plain values,
so that a site's `local/privacy.json` and a job's configuration can name the classes by path.
"""

from __future__ import annotations

from importlib.util import find_spec

from medpfl.core.errors import MissingExtra

if find_spec("nvflare") is None:
    raise MissingExtra("the FLARE integration needs NVIDIA FLARE: pip install 'medpfl[nvflare]'")

from medpfl.integrations.flare.defense import DefenseFilter
from medpfl.integrations.flare.gate import GateFilter
from medpfl.integrations.flare.policy import policy_problems, write_policy
from medpfl.integrations.flare.recording import RecordingFilter
from medpfl.integrations.flare.vetting import ReceivedFilter, VettingFilter

__all__ = [
    "DefenseFilter",
    "GateFilter",
    "ReceivedFilter",
    "RecordingFilter",
    "VettingFilter",
    "policy_problems",
    "write_policy",
]
