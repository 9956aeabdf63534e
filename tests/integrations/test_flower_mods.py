"""Mods in Flower's own messages: what passes, what is withheld, and what of the update is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("flwr")

from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod

from medpfl.core.domain import Batch, GlobalModel, Recipe
from medpfl.core.errors import InputError
from medpfl.core.tasks import SingleLabel
from medpfl.defenses import DPSGD, Clip, Composition, Gaussian, NoDefense
from medpfl.federation.client import client_step
from medpfl.integrations.flower import AuditLog, DefenseMod, GateMod, PinsMod, SecureAggregationPins, VettingMod
from medpfl.models import prepare

RECIPE = Recipe(update="weights", batch_size=16, learning_rate=0.1)


def arrays(message: Any) -> dict[str, torch.Tensor]:
    return dict(message.content.array_records["arrays"].to_torch_state_dict())


def dense() -> GlobalModel:
    """A net whose first layer gives single images back."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(144, 400), nn.ReLU(), nn.Linear(400, 2))
    return prepare(module, name="dense", image_shape=(1, 12, 12), task=SingleLabel(2))


def trained(net: GlobalModel, batch: Batch) -> dict[str, torch.Tensor]:
    update, _ = client_step(net, batch, RECIPE)
    return dict(update.trainable)


class TestGate:
    """The leakage gate."""

    def test_an_update_that_gives_images_back_is_withheld_without_a_reason(
        self, instruct: Any, context: Any, answer: Any, batch: Batch, tmp_path: Path
    ) -> None:
        net = dense()
        mod = GateMod(net, lambda _: batch, RECIPE, log=AuditLog(tmp_path / "log.jsonl"))
        reply = mod(instruct(net.parameters), context, answer(trained(net, batch)))
        assert reply.has_error()
        assert reply.error.reason == "withheld"
        (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
        assert json.loads(line)["outcome"] == "withheld"
        assert "images come back" in line

    def test_an_update_that_gives_nothing_back_passes_as_it_is(
        self, instruct: Any, context: Any, answer: Any, net: GlobalModel, batch: Batch
    ) -> None:
        sent = trained(net, batch)
        reply = GateMod(net, lambda _: batch, RECIPE)(instruct(net.parameters), context, answer(sent))
        assert not reply.has_error()
        assert all(torch.equal(arrays(reply)[name], tensor) for name, tensor in sent.items())

    @pytest.mark.parametrize("broken", ["images", "nan", "missing", "unknown", "empty"])
    def test_what_it_cannot_look_at_is_not_sent(
        self, instruct: Any, context: Any, answer: Any, net: GlobalModel, batch: Batch, broken: str
    ) -> None:
        sent = trained(net, batch)
        first = next(iter(sent))
        if broken == "nan":
            sent[first] = torch.full_like(sent[first], float("nan"))
        elif broken == "missing":
            sent.pop(first)
        elif broken == "unknown":
            sent["other"] = torch.ones(2)
        elif broken == "empty":
            sent = {}

        def images(_: Any) -> Batch:
            if broken == "images":
                raise RuntimeError("the disk is gone")
            return batch

        reply = GateMod(net, images, RECIPE)(instruct(net.parameters), context, answer(sent))
        assert reply.has_error()
        assert reply.error.reason == "withheld"

    def test_after_too_many_withheld_rounds_the_client_stays_away(
        self, instruct: Any, context: Any, answer: Any, batch: Batch
    ) -> None:
        net = dense()
        calls: list[int] = []
        app = answer(trained(net, batch))
        mod = GateMod(net, lambda _: batch, RECIPE)

        def counted(message: Any, context: Any) -> Any:
            calls.append(1)
            return app(message, context)

        for _ in range(5):
            mod(instruct(net.parameters), context, counted)
        assert len(calls) == mod.limit.withheld

    def test_other_messages_are_not_its_business(
        self, context: Any, net: GlobalModel, batch: Batch, instruct: Any
    ) -> None:
        message = instruct(net.parameters)
        message.metadata.message_type = "evaluate"
        assert GateMod(net, lambda _: batch, RECIPE)(message, context, lambda one, _: one) is message


class TestVetting:
    """Vetting of the received model."""

    def test_an_honest_model_is_trained_on(self, instruct: Any, context: Any, answer: Any, net: GlobalModel) -> None:
        assert not VettingMod(net)(instruct(net.parameters), context, answer(net.parameters)).has_error()

    def test_a_crafted_first_layer_is_not(self, instruct: Any, context: Any, answer: Any) -> None:
        net = dense()
        crafted = dict(net.parameters)
        crafted["1.weight"] = torch.full((400, 144), 1 / 144)
        crafted["1.bias"] = -torch.linspace(0.3, 0.7, 400)
        crafted["3.weight"] = torch.full((2, 400), 0.1) * torch.tensor([[1.0], [-1.0]])
        called: list[int] = []
        reply = VettingMod(net)(instruct(crafted), context, lambda *_: called.append(1))
        assert reply.has_error()
        assert not called

    def test_a_model_of_another_architecture_is_not_trained_on(
        self, instruct: Any, context: Any, net: GlobalModel
    ) -> None:
        reply = VettingMod(net)(
            instruct({"other.weight": torch.ones(2, 2)}), context, lambda *_: pytest.fail("trained")
        )
        assert reply.has_error()


class TestDefense:
    """Defenses of updates as a mod."""

    def test_flowers_own_clipping_is_ruled_by_the_batch_counter_and_ours_is_not(
        self, normed: Any, instruct: Any, context: Any, answer: Any
    ) -> None:
        before, after = normed

        def change(reply: Any) -> float:
            return float((arrays(reply)["0.weight"] - before["0.weight"]).norm())

        true = float((after["0.weight"] - before["0.weight"]).norm())
        stock = LocalDpMod(clipping_norm=1.0, sensitivity=0.0, epsilon=1.0, delta=1e-5)
        broken = stock(instruct(before), context, answer(after))
        assert change(broken) < 0.05 * true
        ours = DefenseMod(Clip(bound=1.0))(instruct(before), context, answer(after))
        assert change(ours) == pytest.approx(true, rel=1e-4)
        assert int(arrays(ours)["1.num_batches_tracked"]) == 50

    def test_noise_falls_on_weights_only_and_is_fresh_in_every_round(
        self, normed: Any, instruct: Any, context: Any, answer: Any
    ) -> None:
        before, after = normed
        mod = DefenseMod(Gaussian(std=0.5))
        first, second = (arrays(mod(instruct(before), context, answer(after))) for _ in range(2))
        assert not torch.equal(first["0.weight"], second["0.weight"])
        assert torch.equal(first["1.running_mean"], after["1.running_mean"])
        noise = first["0.weight"] - after["0.weight"]
        assert 0.2 < float(noise.std()) < 0.9

    def test_types_and_names_stay_what_the_app_sends(
        self, normed: Any, instruct: Any, context: Any, answer: Any
    ) -> None:
        before, after = normed
        after["0.weight"] = after["0.weight"].to(torch.float16)
        reply = arrays(DefenseMod(NoDefense())(instruct(before), context, answer(after)))
        assert list(reply) == list(after)
        assert {name: tensor.dtype for name, tensor in reply.items()} == {
            name: one.dtype for name, one in after.items()
        }

    def test_an_update_that_cannot_be_defended_is_not_sent(
        self, normed: Any, instruct: Any, context: Any, answer: Any
    ) -> None:
        before, _ = normed
        reply = DefenseMod(Clip(bound=1.0))(instruct(before), context, answer({"unknown": torch.ones(3)}))
        assert reply.has_error()

    def test_defenses_inside_training_are_refused_at_once(self) -> None:
        with pytest.raises(InputError, match="inside training"):
            DefenseMod(DPSGD())

    def test_clipping_and_noise_go_together(self, normed: Any, instruct: Any, context: Any, answer: Any) -> None:
        before, after = normed
        mod = DefenseMod(Composition(parts=(Clip(bound=0.01), Gaussian(std=1e-6))))
        found = arrays(mod(instruct(before), context, answer(after)))
        assert float((found["0.weight"] - before["0.weight"]).norm()) <= 0.0101
        with pytest.raises(InputError, match="dp_sgd"):
            DefenseMod(Composition(parts=(DPSGD(), Clip(bound=1.0))))

    def test_it_runs_in_a_client_app(self, normed: Any, instruct: Any, context: Any, answer: Any) -> None:
        before, after = normed
        app = ClientApp(mods=[DefenseMod(Clip(bound=0.001))])
        app.train()(answer(after))
        found = arrays(app(instruct(before), context))
        changes = torch.cat([(found[n] - before[n]).flatten() for n in ("0.weight", "0.bias", "1.weight", "1.bias")])
        assert float(changes.norm()) <= 0.001 * 1.01


SETUP = {
    "stage": "setup", "sample_num": 4, "share_num": 3, "threshold": 2, "clipping_range": 8.0, "target_range": 4194304,
    "mod_range": 4294967296, "max_weight": 1000.0,
}  # fmt: skip


class TestPins:
    """What the server may not choose."""

    def ends(self, mod: PinsMod, message: Any, context: Any) -> bool:
        return bool(mod(message, context, lambda one, _: one) is not message)

    @pytest.mark.parametrize(
        ("told", "ends"), [({"lr": 0.01}, False), ({"lr": 1.0}, True), ({}, False), ({"other": 1}, False)]
    )
    def test_the_recipe(self, instruct: Any, context: Any, told: Any, ends: bool) -> None:
        mod = PinsMod(config={"lr": 0.01})
        assert self.ends(mod, instruct({"w": torch.ones(1)}, told), context) is ends

    def test_only_what_was_agreed(self, instruct: Any, context: Any) -> None:
        mod = PinsMod(config={"lr": 0.01}, only_known=True)
        assert self.ends(mod, instruct({"w": torch.ones(1)}, {"lr": 0.01, "steps": 5}), context)
        assert not self.ends(mod, instruct({"w": torch.ones(1)}, {"lr": 0.01, "server-round": 5}), context)

    def test_too_few_images_of_its_own(self, instruct: Any, context: Any) -> None:
        assert self.ends(PinsMod(examples=5, fewest_examples=16), instruct({"w": torch.ones(1)}), context)

    @pytest.mark.parametrize(
        ("changed", "ends"),
        [({}, False), ({"clipping_range": 1e6}, True), ({"max_weight": 1.0}, True), ({"sample_num": 2}, True),
         ({"threshold": 1}, True), ({"target_range": 2**30}, True)],
    )  # fmt: skip
    def test_parameters_of_secure_aggregation(self, instruct: Any, context: Any, changed: Any, ends: bool) -> None:
        mod = PinsMod(secure_aggregation=SecureAggregationPins())
        message = instruct({"w": torch.ones(1)}, secaggplus_configs={**SETUP, **changed})
        assert self.ends(mod, message, context) is ends

    def test_secure_aggregation_that_is_left_out_or_was_not_agreed(self, instruct: Any, context: Any) -> None:
        assert self.ends(PinsMod(secure_aggregation=SecureAggregationPins()), instruct({"w": torch.ones(1)}), context)
        assert self.ends(PinsMod(), instruct({"w": torch.ones(1)}, secaggplus_configs=SETUP), context)

    @pytest.mark.parametrize(
        ("active", "dead", "ends"),
        [
            ([1, 2, 3], [], False),
            ([1, 2], [3], False),
            ([1, 2, 3], [3], True),
            ([1, 2, 9], [3], True),
            ([1], [2, 3], True),
        ],
    )
    def test_unmask_requests(self, instruct: Any, context: Any, active: Any, dead: Any, ends: bool) -> None:
        mod = PinsMod(secure_aggregation=SecureAggregationPins())
        keys = {str(node): [b"a", b"b"] for node in (1, 2, 3)}
        for stage in (SETUP, {"stage": "share_keys", **keys}):
            assert not self.ends(mod, instruct({"w": torch.ones(1)}, secaggplus_configs=stage), context)
        last = {"stage": "unmask", "active_nids": active, "dead_nids": dead}
        assert self.ends(mod, instruct({"w": torch.ones(1)}, secaggplus_configs=last), context) is ends
