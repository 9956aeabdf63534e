"""The recipe: how a client trains on what it received, and what it sends."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.core.config import STRICT

UpdateKind = Literal["gradient", "delta", "weights"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """How a client trains on the model that it received, and what it sends."""

    update: Annotated[UpdateKind, Field(description="what is sent: gradient (FedSGD), delta or weights (FedAvg)")] = (
        "gradient"
    )
    batch_size: Annotated[int, Field(ge=1, description="images per local step")] = 1
    local_steps: Annotated[int, Field(ge=1, description="optimizer steps per epoch, each on the next batch")] = 1
    epochs: Annotated[int, Field(ge=1, description="how often the local steps are repeated on the same images")] = 1
    shuffle: Annotated[
        bool, Field(description="every epoch takes the images in a new random order; without, always in the same order")
    ] = False
    images: Annotated[int | None, Field(ge=1, description="private images; default batch_size * local_steps")] = None
    rounds: Annotated[
        int,
        Field(ge=1, description="how often the same model is sent and answered with the same images, state carried"),
    ] = 1
    optimizer: Annotated[Literal["sgd", "adam", "adamw"], Field(description="the client's optimizer")] = "sgd"
    learning_rate: Annotated[float, Field(gt=0, description="the client's learning rate")] = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1, description="SGD momentum")] = 0.0
    weight_decay: Annotated[float, Field(ge=0, description="L2 penalty (decoupled for adamw)")] = 0.0
    betas: Annotated[tuple[float, float], Field(description="Adam's moment decay rates")] = (0.9, 0.999)
    epsilon: Annotated[float, Field(gt=0, description="Adam's denominator constant")] = 1e-8
    gradient_clip: Annotated[float | None, Field(gt=0, description="norm bound on each step's batch gradient")] = None
    accumulation: Annotated[int, Field(ge=1, description="micro-batches whose gradients are averaged per step")] = 1
    batch_norm: Annotated[
        Literal["train", "eval"], Field(description="batch statistics (train) or running statistics (eval)")
    ] = "eval"
    precision: Annotated[
        Literal["float32", "float64", "bfloat16", "float16"],
        Field(description="bfloat16 and float16 mean autocast, as a client would run it"),
    ] = "float32"

    @property
    def private_images(self) -> int:
        """Number of private images that one victim holds."""
        return self.images if self.images is not None else self.batch_size * self.local_steps

    @property
    def default_id(self) -> str:
        """Id of an unlabeled entry, for instance `gradient-b1` or `delta-s4-b8`."""
        repeated = f"-r{self.rounds}" if self.rounds > 1 else ""
        if self.update == "gradient":
            return f"gradient-b{self.batch_size}{repeated}"
        epochs = f"-e{self.epochs}" if self.epochs > 1 else ""
        shuffled = "-shuffled" if self.shuffle else ""
        return f"{self.update}-s{self.local_steps}{epochs}-b{self.batch_size}{shuffled}{repeated}"
