"""A decoder from a model's latents back to images, trained by the server on images that it owns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from medpfl.attacks.latent_bins import HiddenLayer, latents, random_images
from medpfl.attacks.layers import layer_input
from medpfl.core.domain import GlobalModel, Tensors
from medpfl.core.session import Session, State
from medpfl.federation.training import TrainingConfig, train
from medpfl.models.shapes import CONVOLUTIONS

BODY, DECODER = "body.", "decoder."
"""Prefixes of the names of an autoencoder's tensors."""

HELD_BACK = 0.1
"""Share of the auxiliary images that the decoder is not trained on, but tried."""


@dataclass(frozen=True)
class Copying:
    """The task of an autoencoder: its output is to be the image."""

    image_shape: tuple[int, ...]
    name: str = "copying"
    classes: int = 1

    def output_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """An image."""
        return image_shape

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(output, target)

    def encode(self, labels: Tensor) -> Tensor:
        """Targets are images already."""
        return labels


class Decoder(nn.Module):
    """Latents (N, F) -> images (N, C, *spatial): convolutions at sizes that double from the latents' own to the image's.

    latent_shape: (channels, *spatial) of the latents as a map; where they are none, (F, 1, ...) and a dense layer makes
    one of a quarter of the image's sides first.
    """

    def __init__(self, latent_shape: tuple[int, ...], image_shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[len(image_shape) - 1]
        self.latent_shape, self.image_shape = latent_shape, image_shape
        sides = latent_shape[1:]
        self.dense: nn.Module = nn.Identity()
        if max(sides) == 1:
            sides = tuple(max(1, side // 4) for side in image_shape[1:])
            self.latent_shape = (width, *sides)
            self.dense = nn.Linear(latent_shape[0], int(torch.Size(self.latent_shape).numel()))
        layers: list[nn.Module] = [convolution(self.latent_shape[0], width, 3, padding=1), nn.ReLU()]
        while sides != image_shape[1:]:
            sides = tuple(min(2 * side, full) for side, full in zip(sides, image_shape[1:], strict=True))
            layers += [nn.Upsample(size=sides), convolution(width, width, 3, padding=1), nn.ReLU()]
        layers += [convolution(width, image_shape[0], 3, padding=1), nn.Sigmoid()]
        self.layers = nn.Sequential(*layers)

    def forward(self, seen: Tensor) -> Tensor:
        output: Tensor = self.layers(self.dense(seen).reshape(len(seen), *self.latent_shape))
        return output


class _Autoencoder(nn.Module):
    """The part of a model in front of a dense layer, and a decoder of what that layer sees."""

    def __init__(self, body: nn.Module, path: str, decoder: nn.Module) -> None:
        super().__init__()
        self.body, self.path, self.decoder = body, path, decoder

    def forward(self, images: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def keep(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen.append(arguments[0])

        handle = self.body.get_submodule(self.path).register_forward_pre_hook(keep)
        try:
            self.body(images)
        finally:
            handle.remove()
        output: Tensor = self.decoder(seen[0])
        return output


class _OwnSnapshots:
    """A session that goes on only from what training saved, not from what the read-out after it did."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.checkpoint = session.checkpoint

    def restore(self) -> State | None:
        found = self._session.restore()
        return found if found is not None and "order" in found else None


def latent_shape(model: GlobalModel, layer: HiddenLayer) -> tuple[int, ...]:
    """The shape (channels, *spatial) of the last map that is the latents once it is flattened; (F, 1, ...) without."""
    images, dimensions = random_images(model, 2), len(model.image_shape)
    maps: list[Tensor] = []

    def keep(_module: nn.Module, _arguments: tuple[Tensor, ...], output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == dimensions + 1:
            maps.append(output)

    handles = [module.register_forward_hook(keep) for module in model.module.modules()]
    try:
        with torch.no_grad():
            seen = layer_input(model, layer.first, images)
    finally:
        for handle in handles:
            handle.remove()
    same = [one for one in maps if one[0].numel() == layer.features and torch.equal(one.flatten(1), seen)]
    return tuple(same[-1].shape[1:]) if same else (layer.features, *[1] * (dimensions - 1))


def trained_decoder(
    model: GlobalModel,
    layer: HiddenLayer,
    images: Tensor,
    *,
    steps: int,
    width: int,
    train_encoder: bool,
    generator: torch.Generator,
    session: Session,
) -> tuple[GlobalModel, dict[str, Tensor], float]:
    """The model with its trained encoder, the decoder's tensors, and its mean squared error on images held back.

    Adam with learning rate 1e-3 and weight decay 1e-5 on batches of 50, as published; `steps` in place of 350 epochs.
    """
    decoder = Decoder(latent_shape(model, layer), tuple(model.image_shape), width)
    front = list(model.parameters)[: list(model.parameters).index(layer.first.weight)] if train_encoder else []
    with torch.no_grad():
        for parameter in decoder.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else parameter.numel()
            bound = fan**-0.5 if parameter.ndim > 1 else 0.0
            parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * bound)
    own = {f"{DECODER}{name}": tensor.detach().to(model.device) for name, tensor in decoder.named_parameters()}
    kept = {name: tensor for name, tensor in model.parameters.items() if name not in front}
    whole = GlobalModel(
        name=f"decoder of {model.name}",
        module=_Autoencoder(model.module, layer.first.module, decoder).eval(),
        parameters={**_prefixed({name: model.parameters[name] for name in front}), **own},
        buffers=_prefixed(model.buffers),
        counters=_prefixed(model.counters),
        task=Copying(tuple(model.image_shape)),
        image_shape=model.image_shape,
        constants={**_prefixed(model.constants), **_prefixed(kept)},
    )
    order = torch.randperm(len(images), generator=generator).to(images.device)
    held = order[: max(1, int(HELD_BACK * len(images)))]
    used = images[order[len(held) :]]
    config = TrainingConfig(steps=steps, batch_size=min(50, len(used)), weight_decay=1e-5)
    whole, _ = train(whole, used, used, config, generator, _OwnSnapshots(session))
    encoder = {name: whole.parameters[BODY + name] for name in front}
    buffers = {name: whole.buffers[BODY + name] for name in model.buffers} if train_encoder else model.buffers
    found = {name: whole.parameters[name] for name in own}
    trained = replace(model, parameters={**model.parameters, **encoder}, buffers=buffers)
    copies = decoded(trained, layer, found, latents(trained, layer, images[held]))
    return trained, found, float((copies - images[held]).square().mean())


def decoded(model: GlobalModel, layer: HiddenLayer, tensors: Tensors, seen: Tensor) -> Tensor:
    """The images that a trained decoder makes of latents (N, F). tensors: its own, their names with `decoder.`."""
    own = {name.removeprefix(DECODER): tensor for name, tensor in tensors.items() if name.startswith(DECODER)}
    first = own["layers.0.weight"]
    shape = latent_shape(model, layer)
    with torch.device("meta"):
        decoder = Decoder(shape, tuple(model.image_shape), int(first.shape[0]))
    with torch.no_grad():
        images: Tensor = functional_call(decoder, own, (seen.to(first),))
    return images


def _prefixed(tensors: Tensors) -> dict[str, Tensor]:
    return {BODY + name: tensor for name, tensor in tensors.items()}
