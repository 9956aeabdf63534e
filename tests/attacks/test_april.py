"""APRIL: patches of vision transformers come back exactly; what hides them is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medpfl.attacks.april import April
from medpfl.core.domain import Batch, Failure, GlobalModel, Observation, Recipe, Reconstruction
from medpfl.core.tasks import MultiLabel, SingleLabel
from medpfl.federation.client import client_step
from medpfl.models import Normalization, build_model, prepare

Observe = Callable[..., Observation]


class BareTransformer(nn.Module):
    """Attention directly on the tokens, no norm and no shortcut in front: the net of APRIL's theorem."""

    def __init__(
        self,
        *,
        width: int = 32,
        positions: bool = True,
        embedding: bool = True,
        norm: bool = False,
        shuffle: bool = False,
        joint: bool = True,
    ) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 5, width), requires_grad=positions)
        self.embedding = nn.Conv2d(1, width, 4, stride=4).requires_grad_(embedding)
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.weights = nn.ModuleList(
            [nn.Linear(width, 3 * width)] if joint else [nn.Linear(width, width) for _ in range(3)]
        )
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(5 * width, 3)
        self.shuffle = shuffle

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embedding(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1)
        positions = self.positions.flip(1) if self.shuffle else self.positions
        tokens = self.norm(tokens + positions)
        parts = torch.cat([weight(tokens) for weight in self.weights], dim=-1)
        queries, keys, values = parts.chunk(3, dim=-1)
        mixed = torch.softmax(queries @ keys.transpose(1, 2) / 6.0, dim=-1) @ values
        output: Tensor = self.head(torch.tanh(self.mix(mixed)).flatten(1))
        return output


def bare(**settings: Any) -> GlobalModel:
    """The net in float64."""
    torch.manual_seed(0)
    model = prepare(BareTransformer(**settings), name="bare", image_shape=(1, 8, 8), task=SingleLabel(3))
    return model.to(torch.float64)


def attacked(observation: Observation, **settings: Any) -> Reconstruction:
    result = April(**settings).reconstruct([observation], [torch.Generator()])[0]
    assert isinstance(result, Reconstruction), result
    return result


@pytest.mark.parametrize("source", ["auto", "patch_embedding", "attention"])
@pytest.mark.parametrize("joint", [True, False])
def test_every_way_is_exact_on_the_net_of_the_theorem(source: Any, joint: bool, observe: Observe) -> None:
    image = torch.rand((1, 1, 8, 8), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    result = attacked(observe(bare(joint=joint), image, torch.tensor([2])), source=source)
    assert float((result.images - image).abs().max()) < 1e-8
    assert result.labels is not None
    assert result.labels.tolist() == [2]
    assert result.objective < 1e-12


def test_frozen_patch_embeddings_are_read_through_attention(observe: Observe) -> None:
    model = bare(embedding=False)
    image = torch.rand((1, 1, 8, 8), dtype=torch.float64)
    update, _ = client_step(model, Batch(image, torch.tensor([1])), Recipe(precision="float64"))
    observation = Observation(model, update, Recipe(), "honest_server")
    assert float((attacked(observation).images - image).abs().max()) < 1e-8
    assert "is frozen" in str(April(source="patch_embedding").why_not(model, None, "gradient", 1))


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 16, 24)])
def test_a_pre_norm_vit_gives_its_image_away_in_float32(shape: tuple[int, ...], blobs: Any) -> None:
    normalize = Normalization(mean=(0.4,) * shape[0], std=(0.2,) * shape[0])
    generator = torch.Generator().manual_seed(0)
    model = build_model("vit", image_shape=shape, task=SingleLabel(4), normalize=normalize, generator=generator)
    image = blobs(1, shape)
    update, _ = client_step(model, Batch(image, torch.tensor([3])), Recipe())
    result = attacked(Observation(model, update, Recipe(), "eavesdropper"))
    assert float((result.images - image).square().mean()) < 1e-7
    reason = April(source="attention").why_not(model, Recipe(), "gradient", 1)
    assert reason is not None
    assert "not the only path" in reason


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(update="delta", epochs=3, learning_rate=0.05),
        Recipe(update="weights", learning_rate=0.1),
        Recipe(update="delta", epochs=2, momentum=0.9),
    ],
)
def test_several_steps_on_one_image_hide_nothing(recipe: Recipe) -> None:
    model = bare()
    image = torch.rand((1, 1, 8, 8), dtype=torch.float64)
    update, _ = client_step(model, Batch(image, torch.tensor([0])), replace(recipe, precision="float64"))
    result = attacked(Observation(model, update, recipe, "honest_server"))
    assert float((result.images - image).abs().max()) < 1e-6


def test_several_labels_per_image(observe: Observe) -> None:
    torch.manual_seed(0)
    model = prepare(BareTransformer(), name="bare", image_shape=(1, 8, 8), task=MultiLabel(3)).to(torch.float64)
    image = torch.rand((1, 1, 8, 8), dtype=torch.float64)
    result = attacked(observe(model, image, torch.tensor([[1.0, 0.0, 1.0]]).double()))
    assert float((result.images - image).abs().max()) < 1e-8
    assert result.labels is not None
    assert result.labels.tolist() == [[1.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("model", "settings", "reason"),
    [
        (bare(positions=False), {}, "no trained tensor holds positions"),
        (bare(norm=True, embedding=False), {}, "is frozen"),
        (bare(norm=True), {"source": "attention"}, "not the only path"),
        (bare(shuffle=True, embedding=False), {"source": "attention"}, "the only path"),
        (bare(width=3), {}, "has rank"),
        (bare(width=12), {"source": "attention"}, "cannot be inverted"),
    ],
    ids=["frozen-positions", "frozen-embedding", "norm", "shuffled", "narrow", "narrower-than-patches"],
)
def test_what_hides_the_tokens_is_refused(model: GlobalModel, settings: dict[str, Any], reason: str) -> None:
    found = April(**settings).why_not(model, Recipe(), "gradient", 1)
    assert found is not None
    assert reason in found


def test_positions_in_another_order_than_the_patches_are_noticed() -> None:
    found = April(source="patch_embedding").why_not(bare(shuffle=True), Recipe(), "gradient", 1)
    assert found is not None
    assert "do not come back" in found


def test_convolutional_nets_batches_and_adam_are_refused(observe: Observe, sigmoid_lenet: Any, make_model: Any) -> None:
    assert "does not cut" in str(April().why_not(make_model(sigmoid_lenet(), (1, 12, 12)), Recipe(), "gradient", 1))
    assert "mixes 4" in str(April().why_not(bare(), Recipe(batch_size=4), "gradient", 4))
    adam = Recipe(update="delta", optimizer="adam", epochs=2)
    assert "adam" in str(April().why_not(bare(), adam, "delta", 1))
    batch = observe(bare(), torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))
    result = April().reconstruct([replace(batch, recipe=None)], [torch.Generator()])[0]
    assert isinstance(result, Failure)
    assert "mixes 2" in result.reason


def test_noise_leaves_an_image_and_undetermined_patches_stay_grey(observe: Observe) -> None:
    observation = observe(bare(), torch.rand((1, 1, 8, 8), dtype=torch.float64), torch.tensor([1]))
    trainable = dict(observation.update.trainable)
    trainable["positions"] = trainable["positions"].clone()
    trainable["positions"][0, 2] = 0.0
    result = attacked(replace(observation, update=replace(observation.update, trainable=trainable)))
    patch = result.images[0, 0, :4, 4:]
    torch.testing.assert_close(patch, torch.full_like(patch, 0.5))
    assert any("rank 3" in note for note in result.notes)
