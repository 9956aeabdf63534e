"""Soteria, PRECODE, Mixup, InstaHide and ATS do what their papers say, and what attackers who know them are left with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from medpfl.attacks.ats_decoding import ATSDecoding
from medpfl.attacks.gradinv import GradInv
from medpfl.attacks.mixture_decoding import MixtureDecoding
from medpfl.attacks.mixtures import extreme, taken_apart
from medpfl.attacks.undoing import undone
from medpfl.core.domain import Auxiliary, Batch, GlobalModel, Knowledge, Observation, Recipe, Reconstruction
from medpfl.core.mechanisms import Mixtures
from medpfl.core.tasks import SingleLabel
from medpfl.defenses import ATS, Defense, InstaHide, Mixup, Precode, Soteria
from medpfl.defenses.ats import privacy_score
from medpfl.defenses.augmentations import OPERATIONS, STRENGTHS, applied
from medpfl.defenses.precode import divergence
from medpfl.federation.client import client_step
from medpfl.models import build_model
from medpfl.models.bottleneck import bottleneck_of, classifier


@pytest.fixture
def net() -> GlobalModel:
    return build_model(
        "lenet_dlg", image_shape=(1, 12, 12), task=SingleLabel(3), generator=torch.Generator().manual_seed(0)
    )


def some(count: int = 4) -> Batch:
    images = torch.rand(count, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    return Batch(images, torch.arange(count) % 3)


def sent(net: GlobalModel, batch: Batch, defense: Defense, seed: int = 0) -> dict[str, torch.Tensor]:
    recipe = Recipe(batch_size=len(batch))
    update, _ = client_step(net, batch, recipe, hooks=defense, generator=torch.Generator().manual_seed(seed))
    return dict(update.trainable)


class TestSoteria:
    def test_only_the_classifiers_weights_differ_and_the_share_of_columns_is_exact(self, net: GlobalModel) -> None:
        plain, masked = sent(net, some(2), Defense()), sent(net, some(2), Soteria(percentile=25))
        name = f"{classifier(net)}.weight"
        for key in plain:
            if key != name:
                assert torch.equal(plain[key], masked[key])
        kept = (masked[name] != 0).any(dim=0)
        assert torch.equal(masked[name][:, kept], plain[name][:, kept])
        assert abs(float((~kept).float().mean()) - 0.25) < 2 / len(kept)

    def test_the_masked_features_are_those_with_the_smallest_ratio(self, net: GlobalModel) -> None:
        batch = some(1)
        path = classifier(net)
        assert path is not None

        def features(image: torch.Tensor) -> torch.Tensor:
            held: list[torch.Tensor] = []
            handle = net.module.get_submodule(path).register_forward_pre_hook(lambda _, given: held.append(given[0]))
            net.forward(image)
            handle.remove()
            return held[-1].flatten()

        jacobian: torch.Tensor = torch.autograd.functional.jacobian(features, batch.images)  # type: ignore[no-untyped-call]
        ratios = jacobian.flatten(1).norm(dim=1) / features(batch.images).abs()
        masked = sent(net, batch, Soteria(percentile=30))[f"{path}.weight"]
        gone = (masked == 0).all(dim=0)
        assert float(ratios[gone].max()) <= float(ratios[~gone].min())

    def test_an_attacker_who_knows_the_mask_is_not_stopped(self, net: GlobalModel) -> None:
        batch = some(1)
        update, _ = client_step(net, batch, Recipe(), hooks=Soteria(percentile=80))
        errors = {}
        for name, attack, known in (
            ("naive", GradInv(iterations=60, distance="l2", total_variation=0.0), None),
            (
                "informed",
                GradInv(iterations=60, distance="likelihood", total_variation=0.0),
                Soteria(percentile=80).mechanism(),
            ),
        ):
            observation = Observation(net, update, Recipe(), "honest_server", Knowledge(defense=known))
            (found,) = attack.reconstruct([observation], [torch.Generator().manual_seed(0)])
            assert isinstance(found, Reconstruction)
            errors[name] = float(functional.mse_loss(found.images, batch.images))
        assert errors["informed"] <= errors["naive"] * 1.05


class TestPrecode:
    def test_the_servers_model_is_deterministic_and_clients_gradients_are_not(self, net: GlobalModel) -> None:
        defense = Precode(width=8)
        wide = defense.model(net)
        assert torch.equal(wide.forward(some().images)[0], wide.forward(some().images)[0])
        first, again, other = (sent(wide, some(), defense, seed) for seed in (0, 0, 1))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)

    def test_its_weights_are_those_that_the_paper_counts(self, net: GlobalModel) -> None:
        width = 8
        path = classifier(net)
        features = net.parameters[f"{path}.weight"].shape[1]
        added = Precode(width=width).model(net).parameter_count - net.parameter_count
        assert added == 3 * features * width + 2 * width + features

    def test_the_gradient_is_that_of_loss_and_divergence_with_the_drawn_noise(self, net: GlobalModel) -> None:
        defense = Precode(width=8, weight=0.5)
        wide, batch = defense.model(net), some()
        path = bottleneck_of(wide)
        found = sent(wide, batch, defense, seed=3)
        noise = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).float()
        parameters = {name: tensor.clone().requires_grad_() for name, tensor in wide.parameters.items()}
        held: list[torch.Tensor] = []
        handle = wide.module.get_submodule(f"{path}.encoder").register_forward_pre_hook(
            lambda _, given: held.append(given[0])
        )
        output, _ = replace(wide, constants={**wide.constants, f"{path}.noise": noise}).forward(
            batch.images, parameters=parameters
        )
        handle.remove()
        encoded = functional.linear(held[-1], parameters[f"{path}.encoder.weight"], parameters[f"{path}.encoder.bias"])
        mean, deviation = encoded[:, :8], functional.softplus(encoded[:, 8:])
        normal = torch.distributions.Normal(mean, deviation)
        bits = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(
            1
        ).mean() / torch.log(torch.tensor(2.0))
        (functional.cross_entropy(output, batch.targets) + 0.5 * bits).backward()  # type: ignore[no-untyped-call]
        for name, tensor in parameters.items():
            assert tensor.grad is not None
            torch.testing.assert_close(found[name], tensor.grad, rtol=1e-4, atol=1e-6)

    def test_no_divergence_from_the_standard_normal(self) -> None:
        assert float(divergence(torch.zeros(3, 5), torch.ones(3, 5))) == 0.0


class TestMixtures:
    def test_pictures_and_labels_are_the_same_convex_mixture(self, net: GlobalModel) -> None:
        batch = Batch(torch.eye(6).reshape(6, 1, 1, 6).expand(6, 1, 6, 6).contiguous(), torch.arange(6) % 3)
        mixed = Mixup(images=3).batch(batch, net, torch.Generator().manual_seed(0))
        shares = mixed.images[:, 0, 0, :]  # of image j in mixture i
        torch.testing.assert_close(shares.sum(dim=1), torch.ones(6))
        torch.testing.assert_close(mixed.targets, shares @ functional.one_hot(batch.targets, 3).float())
        assert float(shares.max()) < 1.0

    def test_signs_are_all_that_instahide_adds(self, net: GlobalModel) -> None:
        plain = Mixup(images=2).batch(some(), net, torch.Generator().manual_seed(0)).images
        hidden = InstaHide(images=2).batch(some(), net, torch.Generator().manual_seed(0)).images
        torch.testing.assert_close((2 * hidden - 1).abs(), (2 * plain - 1).abs(), rtol=1e-4, atol=1e-5)
        turned = ((hidden - plain).abs() > 1e-6).float().mean()
        assert 0.4 < float(turned) < 0.6

    def test_mixtures_come_closer_to_the_images_when_taken_apart(self) -> None:
        torch.manual_seed(0)
        images = (torch.rand(4, 1, 8, 8) > 0.7).float()
        weights = torch.tensor([[0.6, 0.2, 0.1, 0.1], [0.1, 0.6, 0.2, 0.1], [0.1, 0.1, 0.6, 0.2], [0.2, 0.1, 0.1, 0.6]])
        mixtures = torch.einsum("ij,j...->i...", weights, images)
        found, shares, error = taken_apart(mixtures, Mixtures(4), 4, 400, 0.0, torch.Generator().manual_seed(0))
        assert error < 1e-3
        torch.testing.assert_close(shares.sum(dim=1), torch.ones(4))
        before, after = ((made - images).square().mean() for made in (mixtures, found))
        assert float(after) < 0.7 * float(before)

    def test_images_that_are_unmixed_once_are_the_corners_of_all_mixtures(self) -> None:
        torch.manual_seed(0)
        images = torch.rand(3, 64, dtype=torch.float64)
        weights = torch.cat(
            [torch.distributions.Dirichlet(torch.ones(3).double()).sample((20,)), torch.eye(3).double()]
        )
        order = torch.randperm(len(weights))
        places = extreme((weights @ images)[order], 3)
        assert sorted(order[places].tolist()) == [20, 21, 22]

    @pytest.mark.parametrize("signs", [False, True])
    def test_more_rounds_show_more_of_the_same_images(self, net: GlobalModel, signs: bool) -> None:
        torch.manual_seed(0)
        images = 0.4 * torch.rand(4, 1, 8, 8)
        defense = InstaHide() if signs else Mixup()
        draws = torch.Generator().manual_seed(0)
        encodings = [defense.batch(Batch(images, torch.arange(4) % 3), net, draws).images for _ in range(8)]
        errors = []
        for rounds in (1, 8):
            mixtures = torch.cat(encodings[:rounds])
            found, shares, _ = taken_apart(
                mixtures, Mixtures(4, signs), 4, 400, 0.0, torch.Generator().manual_seed(0), typical=images.mean(dim=0)
            )
            assert shares.shape == (4 * rounds, 4)
            apart = (found.flatten(1)[:, None] - images.flatten(1)).square().mean(dim=2)
            errors.append(float(apart.amin(dim=0).mean()))
        assert errors[1] < 0.5 * errors[0]

    def test_all_rounds_are_matched_on_their_own_and_decoded_together(self, net: GlobalModel) -> None:
        batch, defense, draws = some(2), Mixup(images=2), torch.Generator().manual_seed(0)
        *earlier, last = (
            client_step(net, batch, Recipe(batch_size=2), hooks=defense, generator=draws)[0] for _ in range(3)
        )
        observation = Observation(
            net,
            last,
            Recipe(batch_size=2, rounds=3),
            "honest_server",
            Knowledge(defense=defense.mechanism()),
            earlier=tuple(earlier),
        )
        attack = MixtureDecoding(iterations=5, decoding_steps=5)
        (found,) = attack.reconstruct([observation], [torch.Generator().manual_seed(0)])
        assert isinstance(found, Reconstruction)
        assert found.gradient_evaluations == 3 * attack.evaluations(net, 2)
        assert len(found.images) == 2
        assert "6 mixtures of 3 rounds" in found.notes[-1]

    def test_one_image_cannot_be_mixed(self, net: GlobalModel) -> None:
        for defense in (Mixup(), InstaHide()):
            assert "batch_size: 2" in defense.refusals(net, Recipe())[0]
            assert not defense.refusals(net, Recipe(batch_size=2))


class TestATS:
    @pytest.mark.parametrize("name", OPERATIONS)
    @pytest.mark.parametrize("strength", STRENGTHS)
    def test_operations_stay_in_range_and_change_something(self, name: str, strength: float) -> None:
        images = some(2).images
        changed = OPERATIONS[name](images, strength).clamp(0, 1)
        assert changed.shape == images.shape
        assert bool(torch.isfinite(changed).all())
        assert float((changed - images).abs().mean()) > 1e-4

    def test_images_go_through_one_of_the_sequences_and_labels_stay(self, net: GlobalModel) -> None:
        batch = some(8)
        changed = ATS(policy="4+0-14").batch(batch, net, torch.Generator().manual_seed(0))
        again = ATS(policy="4+0-14").batch(batch, net, torch.Generator().manual_seed(0))
        assert torch.equal(changed.images, again.images)
        assert torch.equal(changed.targets, batch.targets)
        options = [applied(batch.images, sequence) for sequence in ((4,), (0, 14))]
        which = [[torch.allclose(changed.images[i], option[i]) for option in options] for i in range(8)]
        assert all(any(row) for row in which)
        assert {row.index(True) for row in which} == {0, 1}

    def test_the_privacy_score_is_the_area_under_the_similarity(self, net: GlobalModel) -> None:
        batch = some(1)
        score = privacy_score(net, batch.images, batch.targets, "5", torch.Generator().manual_seed(0))
        stream = torch.Generator().manual_seed(0)
        torch.randint(1, (1,), generator=stream)
        goal = applied(batch.images, (5,))
        noise = torch.rand(goal.shape, generator=stream, dtype=torch.float64).float()

        def gradient(image: torch.Tensor) -> list[torch.Tensor]:
            update, _ = client_step(net, Batch(image, batch.targets), Recipe())
            return list(update.trainable.values())

        wanted, values = gradient(goal), []
        for share in np.linspace(0, 1, 21):
            found = gradient(noise + float(share) * (goal - noise))
            cosines = [
                float(functional.cosine_similarity(a.flatten(), b.flatten(), 0))
                for a, b in zip(found, wanted, strict=True)
            ]
            values.append(np.mean(cosines))
        assert score == pytest.approx(float(np.trapezoid(values, dx=0.05)), abs=1e-4)

    @pytest.mark.parametrize("policy", ["", "3-x", "50", "-1"])
    def test_policies_that_cannot_be_read_are_refused(self, policy: str) -> None:
        with pytest.raises(ValueError, match="found"):
            ATS(policy=policy)

    def test_a_negative_is_told_from_an_image_by_what_images_look_like(self) -> None:
        dark = 0.3 * torch.rand(24, 1, 12, 12, generator=torch.Generator().manual_seed(2))
        policy = (((("invert", 1.0),)), (("brightness", 0.2),))
        found, places, energies = undone(1.0 - dark[:3], policy, dark[3:], 300)
        assert places.tolist() == [0, 0, 0]
        assert bool((energies[:, 0] < energies[:, 1]).all())
        assert float((found - dark[:3]).abs().max()) < 0.05

    def test_of_a_shift_what_is_left_in_the_picture_comes_back_in_its_place(self) -> None:
        images = some(2).images
        moved = OPERATIONS["translate_x"](images, 0.4)
        found, _, _ = undone(moved, ((("translate_x", 0.4),),), None, 400)
        torch.testing.assert_close(OPERATIONS["translate_x"](found, 0.4), moved, atol=0.03, rtol=0)

    def test_who_knows_the_policy_sees_more_than_the_changed_image(self, net: GlobalModel) -> None:
        dark = Batch(0.3 * some(1).images, torch.tensor([1]))
        defense = ATS(policy="4")
        update, _ = client_step(net, dark, Recipe(), hooks=defense, generator=torch.Generator().manual_seed(0))
        auxiliary = Auxiliary(
            0.3 * torch.rand(16, 1, 12, 12, generator=torch.Generator().manual_seed(3)), torch.zeros(16).long()
        )
        knowledge = Knowledge(defense=defense.mechanism(), auxiliary=auxiliary)
        (found,) = ATSDecoding(iterations=200).reconstruct(
            [Observation(net, update, Recipe(), "honest_server", knowledge)], [torch.Generator().manual_seed(0)]
        )
        assert isinstance(found, Reconstruction)
        assert float((found.images - dark.images).square().mean()) < 1e-3
        assert "invert" in found.notes[-1]
