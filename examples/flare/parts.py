"""What the job of the case `policy` brings, to show what a site's own policy does and does not rule."""

from __future__ import annotations

from nvflare.apis.dxo import DXO
from nvflare.apis.dxo_filter import DXOFilter
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable


class RealPolicy(FLComponent):
    """FLARE's simulator reads a site's privacy policy and never applies it; this puts back what its real clients do."""

    def __init__(self) -> None:
        super().__init__()
        from nvflare.private.fed.client.client_run_manager import ClientRunManager
        from nvflare.private.fed.simulator.simulator_app_runner import SimulatorClientRunManager

        method = "create_job_processing_context_properties"
        setattr(SimulatorClientRunManager, method, getattr(ClientRunManager, method))


class JobFilter(DXOFilter):
    """A filter that the job brings: says what it saw, to tell whether it runs before or after those of the site."""

    def __init__(self) -> None:
        super().__init__(supported_data_kinds=None, data_kinds_to_filter=None)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """The same with the sum of all numbers beside it."""
        total = float(sum(float(array.sum(dtype="float64")) for array in dxo.data.values()))
        return DXO(dxo.data_kind, data=dxo.data, meta={"NUM_STEPS_CURRENT_ROUND": 1, "seen_by_the_job": total})
