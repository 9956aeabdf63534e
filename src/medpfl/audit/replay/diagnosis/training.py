"""What an update shows of how it was made: images, steps, batch norm, labels, and how much the model had to learn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from medpfl.attacks.labels import infer_labels
from medpfl.attacks.layers import dense_layer, last_dense, why_no_single_input
from medpfl.attacks.updates import batch_norm_mode
from medpfl.audit.replay.diagnosis.noise import class_sums
from medpfl.audit.replay.diagnosis.subject import Fact, Subject, plural
from medpfl.core.domain import Batch, GlobalModel, Recipe
from medpfl.core.errors import InputError
from medpfl.core.seeding import generator
from medpfl.federation.changes import norm
from medpfl.federation.client import client_step
from medpfl.federation.recipes import has_batch_norm

MOST_DECOMPOSED = 4_000_000
"""Entries of a dense layer whose directions are counted."""

DRAWN = 8
"""Random images that an update is compared with."""

SURE = 0.5
"""Confidence from which inferred labels are relied on."""

CLEAR = 3.0
"""Noise deviations between two classes from which noise is no explanation of a label."""

LEARNT = 0.1
"""Share of the gradient of random images below which a model counts as one that has learnt its images."""


def examples(subject: Subject) -> Iterator[Fact]:
    """How many images are in the update, and of how many clients."""
    observation = subject.observation
    count, clients = observation.examples, observation.clients
    if clients > 1:
        yield Fact(
            "images",
            f"The update is the mean over {clients} clients with {plural(count, 'image')} in all: whatever comes back is not "
            "tied to a client, and what is read must be told apart from the others' images.",
            count,
            "hinders",
        )
        return
    who = "The client says that the update" if subject.stated else "By --examples the update"
    ending = "comes from one image" if count == 1 else f"mixes {plural(count, 'image')}"
    yield Fact("images", f"{who} {ending}.", count, "helps" if count == 1 else "hinders")


def recipe(subject: Subject) -> Iterator[Fact]:
    """What is said of how clients train, and whether the number of images fits it."""
    known, update = subject.recipe, subject.observation.update
    if known is None:
        if update.kind == "gradient":
            yield Fact("recipe", "How the client trains was not given; a gradient was sent, which shows one batch.")
            return
        yield Fact(
            "recipe",
            "How the client trains was not given: attacks take the update for one gradient of unknown length. A server "
            "usually knows it: give --recipe.",
            None,
            "hinders",
        )
        return
    steps, count = known.local_steps * known.epochs, subject.observation.examples
    most = known.batch_size * known.local_steps * subject.observation.clients
    if update.kind != "gradient" and not most - known.batch_size * subject.observation.clients < count <= most:
        yield Fact(
            "recipe",
            f"The recipe that was given trains on {plural(most, 'image')} ({known.local_steps} steps of {known.batch_size}), "
            f"the client says it held {count}: the recipe is not this client's.",
            count,
            "hinders",
        )
    elif update.kind == "gradient" or steps == 1:
        yield Fact(
            "recipe", "By the recipe the update is one gradient step, which shows the gradient itself.", 1, "helps"
        )
    else:
        yield Fact(
            "recipe",
            f"By the recipe the update comes from {plural(steps, 'local step')} ({known.epochs} × {known.local_steps}, "
            f"{known.optimizer}): attacks must train every candidate as the client did, or take a mean for a gradient.",
            steps,
            "hinders",
        )


def batch_norm(subject: Subject) -> Iterator[Fact]:
    """Batch norm's mode, as counters and running statistics show it."""
    model, update = subject.model, subject.observation.update
    if not has_batch_norm(model):
        return
    moved = max(
        (float((update.buffers[name].double() - model.buffers[name].double()).abs().max()) for name in update.buffers),
        default=None,
    )
    counts = sorted(
        {int(update.counters[name]) - int(model.counters[name]) for name in update.counters if name in model.counters}
    )
    counted = f"; counters say {_numbers(counts)} more" if counts else ""
    told = None if subject.recipe is None else subject.recipe.batch_norm
    if moved is None:
        yield Fact(
            "batch_norm", "The model has batch norm, and its running statistics were not sent: its mode is unknown."
        )
    elif moved > 0:
        against = " The recipe that was given says eval mode: it is not this client's." if told == "eval" else ""
        yield Fact(
            "batch_norm",
            f"Batch norm ran in train mode: running statistics moved by up to {moved:.3g}{counted}. Every image's gradient "
            f"depends on the whole batch, whose mean and variance the statistics show.{against}",
            moved,
            "hinders",
        )
    else:
        against = " The recipe that was given says train mode: it is not this client's." if told == "train" else ""
        yield Fact(
            "batch_norm",
            f"Batch norm's running statistics came back as they were sent{counted}: eval mode, or the client kept them "
            f"to itself.{against}",
            0.0,
        )
    yield from _counted(subject, counts)


def _counted(subject: Subject, counts: list[int]) -> Iterator[Fact]:
    """Whether counters fit the recipe."""
    known = subject.recipe
    if known is None or known.batch_norm != "train" or not counts or counts == [0]:
        return
    passes = known.local_steps * known.epochs * known.accumulation
    if counts != [passes]:
        yield Fact(
            "batches",
            f"Batch norm's counters say {_numbers(counts)} in train mode, the recipe that was given has {passes}: the recipe "
            "is not this client's, or a defense changed the counters.",
            counts[-1],
            "hinders",
        )


def _numbers(counts: list[int]) -> str:
    return " or ".join(plural(count, "batch") for count in counts)


def rank(subject: Subject) -> Iterator[Fact]:
    """Whether dense layers changed in more directions than so many images can move them."""
    known = subject.recipe
    if known is None or known.optimizer != "sgd" or known.weight_decay:
        return
    passes = known.epochs if subject.observation.update.kind != "gradient" else 1
    most = subject.observation.examples * passes
    found = class_sums(subject)
    added = found.deviation if not isinstance(found, str) and found.noised else 0.0
    for name, tensor in subject.change.items():
        if tensor.ndim != 2 or min(tensor.shape) <= most or tensor.numel() > MOST_DECOMPOSED:
            continue
        if why_no_single_input(subject.model, dense_layer(subject.model, name)) is not None:
            continue
        values = torch.linalg.svdvals(tensor)
        spread = math.sqrt(len(tensor)) + math.sqrt(tensor.shape[1])
        floor = max(10 * subject.rounding(name) * spread, 1.2 * added * spread)
        count = int((values > floor).sum())
        if count > most:
            yield Fact(
                "rank",
                f"'{name}' changed in {count} directions beyond rounding{' and noise' if added else ''}; "
                f"{plural(subject.observation.examples, 'image')} in {plural(passes, 'pass')} move it "
                f"in at most {most}: the number of images or the recipe is wrong, or something was added.",
                count,
                "hinders",
            )
            return


def labels(subject: Subject) -> Iterator[Fact]:
    """What the last layer says about the labels."""
    found = infer_labels(subject.observation)
    if found.labels is None:
        yield Fact("labels", f"{(found.reason or 'labels cannot be inferred')[:1].upper()}{(found.reason or '')[1:]}.",
                   None, "hinders")  # fmt: skip
        return
    notes = f" ({'; '.join(dict.fromkeys(found.notes))})" if found.notes else ""
    apart = _apart(subject)
    doubt = (
        "" if apart is None else f" In its bias alone the two lowest classes are {apart:.1f} noise deviations apart."
    )
    sure = found.confidence >= SURE and (apart is None or apart >= CLEAR)
    yield Fact(
        "labels",
        f"The last layer says {_labels(found.labels)}, with a confidence of {found.confidence:.2f} between 0 and 1{notes}."
        f"{doubt}",
        found.confidence,
        "helps" if sure else "hinders",
    )


def _apart(subject: Subject) -> float | None:
    """How far noise would have to go to give a single image another label, in its standard deviations; None without."""
    found, layer = class_sums(subject), last_dense(subject.model)
    if isinstance(found, str) or not found.noised or isinstance(layer, str) or layer.bias not in subject.change:
        return None
    if subject.observation.examples > 1 or found.classes < 2:
        return None
    sign = 1 if subject.observation.update.kind == "gradient" else -1
    lowest = (sign * subject.change[layer.bias]).sort().values[:2]
    return float(lowest[1] - lowest[0]) / (math.sqrt(2) * found.deviation)


def _labels(found: Tensor) -> str:
    if found.is_floating_point():
        present = found[0].nonzero().flatten().tolist()
        return f"classes {', '.join(map(str, present)) or 'none'} are present"
    classes, counts = torch.unique(found, return_counts=True)
    return ", ".join(
        f"{plural(int(count), 'image')} of class {int(one)}" for one, count in zip(classes, counts, strict=True)
    )


def learnt(subject: Subject) -> Iterator[Fact]:
    """How large the gradient is beside that of random images, under the received and under a fresh model."""
    loss = subject.said.get("loss", subject.said.get("train_loss"))
    classes = subject.model.task.classes
    if isinstance(loss, float | int) and subject.model.task.name == "single_label":
        yield Fact(
            "loss",
            f"The client reports a loss of {float(loss):.3g} (guessing among {classes} classes has {math.log(classes):.3g}).",
            float(loss),
        )
    own = subject.gradient_size
    if own is None:
        yield Fact("learnt", "How large the gradient is cannot be told: the recipe that scales it is not known.")
        return
    known = subject.recipe
    count = min(subject.observation.examples, DRAWN if known is None else max(known.batch_size, 1), DRAWN)
    mode = batch_norm_mode(known)
    received, fresh = (_random_gradients(model, count, mode) for model in (subject.model, subject.fresh))
    if not received:
        return
    typical = sorted(received)[len(received) // 2]
    small = own < LEARNT * typical
    drawn = f"; under a freshly drawn model {min(fresh):.3g} to {max(fresh):.3g}" if fresh else ""
    yield Fact(
        "learnt",
        f"The mean gradient has norm {own:.3g}; {DRAWN} draws of {plural(count, 'random image')} with random labels "
        f"have {min(received):.3g} to {max(received):.3g} under the same model{drawn}."
        + (" The model has learnt these images, so that rounding and noise cover more of them." if small else ""),
        own / typical if typical else None,
        "hinders" if small else "neutral",
    )


def _random_gradients(model: GlobalModel, count: int, mode: Literal["train", "eval"]) -> list[float]:
    """Norms of the mean gradients of so many random images; none where these cannot be computed."""
    if model.task.name == "segmentation":
        return []
    stream = generator("random images", model.name)
    found = []
    for _ in range(DRAWN):
        batch = random_batch(model, count, stream)
        try:
            update, _ = client_step(model, batch, Recipe(update="gradient", batch_norm=mode))
        except InputError:  # one value per channel has no batch statistics
            return []
        found.append(norm(update.trainable))
    return found


def random_batch(model: GlobalModel, count: int, stream: torch.Generator) -> Batch:
    """Uniform noise with random labels."""
    images = torch.rand((count, *model.image_shape), generator=stream)
    classes = model.task.classes
    targets: Any = torch.randint(0, classes, (count,), generator=stream)
    if model.task.name == "multi_label":
        targets = torch.randint(0, 2, (count, classes), generator=stream).float()
    return Batch(images, targets)
