"""SecAgg+ as Flower has it today: the legacy workflow, kept in this one module.

The message API has no secure aggregation yet, so rounds run through `DefaultWorkflow` with a legacy strategy. Clients keep
their message-API app: `SecureMod` answers the protocol's messages with the same training function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid

from medpfl.core.domain import Tensors
from medpfl.federation.recording import Recorder
from medpfl.integrations.common.careful import carefully
from medpfl.integrations.flower.pins import SECURE_AGGREGATION

try:
    from flwr.compat.common.recorddict_compat import fitres_to_recorddict, recorddict_to_fitins
except ImportError:  # where the oldest Flower has them
    from flwr.common.recorddict_compat import fitres_to_recorddict, recorddict_to_fitins

Train = Callable[[list[Any], Mapping[str, Any], Context], tuple[list[Any], int, Mapping[str, Any]]]
"""Arrays, settings and the client's context -> new arrays, number of images, metrics."""

AGGREGATE = "aggregate"
"""Name in recordings of what comes out of secure aggregation."""


class SecureMod:
    """Answers SecAgg+ with Flower's own `secaggplus_mod` around `train`; other messages go on to the app."""

    def __init__(self, train: Train) -> None:
        self.train = train

    def __call__(self, message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        """The protocol's answer, or the app's."""
        if not message.has_content() or SECURE_AGGREGATION not in message.content.config_records:
            return call_next(message, context)
        answer: Message = secaggplus_mod(message, context, self._fit)
        return answer

    def _fit(self, message: Message, context: Context) -> Message:
        asked = recorddict_to_fitins(message.content, keep_input=True)
        arrays, examples, metrics = self.train(parameters_to_ndarrays(asked.parameters), dict(asked.config), context)
        result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters(arrays), examples, dict(metrics))
        return Message(fitres_to_recorddict(result, keep_input=False), reply_to=message)


class RecordingFedAvg(FedAvg):
    """Federated averaging that records what the server sees behind secure aggregation: the mean, once per round.

    names: of the arrays, in the order of the state dict. Flower hands every client's result with the same aggregated
    parameters to the strategy, and each client's number of images and metrics in clear beside it; the latter are
    recorded with the aggregate, as `examples_by_client`.
    """

    def __init__(self, recorder: Recorder, names: Sequence[str], **values: Any) -> None:
        super().__init__(**values)
        self.recorder = recorder
        self.names = list(names)
        self.sent: Parameters | None = None

    def configure_fit(self, server_round: int, parameters: Parameters, client_manager: Any) -> Any:
        """Records the model of the round."""
        carefully(self.recorder, server_round, lambda: self.recorder.sent(server_round, self._named(parameters)))
        return super().configure_fit(server_round, parameters, client_manager)

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        """Records the aggregate and hands it on."""
        carefully(self.recorder, server_round, lambda: self._record(server_round, results, failures))
        return super().aggregate_fit(server_round, results, failures)

    def _record(self, number: int, results: Any, failures: Any) -> None:
        for failure in failures:
            self.recorder.failed(number, "unknown", str(failure))
        if results:
            counts = [int(result.num_examples) for _, result in results]
            self.recorder.received(
                number,
                AGGREGATE,
                self._named(results[0][1].parameters),
                examples=sum(counts),
                config={"clients": len(counts), "examples_by_client": counts},
            )

    def _named(self, parameters: Parameters) -> dict[str, Any]:
        return dict(zip(self.names, parameters_to_ndarrays(parameters), strict=True))


def run_secure_rounds(
    grid: Grid,
    context: Context,
    initial: Tensors,
    recorder: Recorder,
    *,
    rounds: int,
    clients: int,
    evaluate: Callable[[int, Tensors], Mapping[str, float]] | None = None,
    shares: int = 3,
    threshold: int = 2,
    max_weight: float = 1000.0,
) -> dict[str, np.ndarray[Any, Any]]:
    """Trains behind SecAgg+ with all clients in every round and returns the final arrays by name.

    evaluate: what is measured after each round, and logged by Flower. max_weight: near the largest number of images of
    a client, since quantization is coarser the larger it is.
    """
    import torch

    names = list(initial)
    final: dict[str, np.ndarray[Any, Any]] = {}

    def measured(number: int, arrays: list[Any], _: Any) -> tuple[float, dict[str, Any]]:
        final.update(zip(names, arrays, strict=True))
        found = (
            {} if evaluate is None else evaluate(number, {n: torch.from_numpy(np.array(a)) for n, a in final.items()})
        )
        return float(found.get("loss", 0.0)), dict(found)

    strategy = RecordingFedAvg(
        recorder,
        names,
        fraction_fit=1.0,
        fraction_evaluate=0.0,
        min_fit_clients=clients,
        min_available_clients=clients,
        initial_parameters=ndarrays_to_parameters([np.array(tensor.numpy()) for tensor in initial.values()]),
        evaluate_fn=measured,
    )
    legacy = LegacyContext(context=context, config=ServerConfig(num_rounds=rounds), strategy=strategy)
    secure = SecAggPlusWorkflow(num_shares=shares, reconstruction_threshold=threshold, max_weight=max_weight)
    with recorder:
        DefaultWorkflow(fit_workflow=secure)(grid, legacy)
    return final
