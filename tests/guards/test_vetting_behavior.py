"""Vetting of models at work: disguised crafted ones, honest ones at several stages, and what the images show of them."""

from __future__ import annotations

import math

import pytest
import torch
from crafted_models import CRAFTED, INPUTS, InFront, dead, dense, disguised, medleak, mlp, trap_weights
from torch import Tensor, nn

from medpfl.core.domain import GlobalModel
from medpfl.core.errors import MissingExtra, ModelError
from medpfl.core.tasks import MultiLabel, Segmentation, SingleLabel
from medpfl.guards.vetting import Vetting, vet
from medpfl.guards.vetting.images import drawn_images
from medpfl.guards.vetting.watch import watch
from medpfl.models import MODELS, SEGMENTATION, build_model, prepare


def built(module: nn.Module, classes: int = 4) -> GlobalModel:
    return prepare(module, name="net", image_shape=(1, 28, 28), task=SingleLabel(classes))


def found(vetting: Vetting, about: str = "behavior") -> set[str]:
    return {result.check for result in vetting.results if result.status == "found" and result.about == about}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SEEN_AT_WORK = {
    "medleak": "bins_at_work",
    "medleak at scale 1e-6": "bins_at_work",
    "medleak, permuted, scaled, rank 1": "bins_at_work",
    "medleak's dead module": "dead_layer",
    "robbing the fed": "bins_at_work",
    "robbing the fed, sparse": "units_of_one_image",
    "trap weights": "images_come_back",
    "trap weights, independent": "images_come_back",
    "loki": "bins_at_work",
    "scale-mia": "bins_at_work",
    "class fishing": "one_class_sends",
    "feature fishing": "one_class_sends",
}


@pytest.mark.parametrize("family", CRAFTED)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_crafted_models_are_found_at_work(family: str, seed: int) -> None:
    vetting = vet(built(CRAFTED[family](seeded(seed))))
    assert vetting.behavior_checked
    assert vetting.verdict == "crafted"
    assert SEEN_AT_WORK[family] in found(vetting)


def hidden_in_the_border(generator: torch.Generator, units: int = 256) -> nn.Module:
    """Bins on the middle of the image, with large random weights where images are always black: no two rows alike."""
    plain = disguised(generator, units)
    assert isinstance(plain, InFront)
    border = torch.ones(28, 28, dtype=torch.bool)
    border[4:24, 4:24] = False
    inside = int((~border).sum())
    noise = torch.randn(units, INPUTS, generator=generator)
    with torch.no_grad():
        weight = plain.first.weight
        sizes = weight.norm(dim=1, keepdim=True)
        middle = weight * (INPUTS / inside)
        weight.copy_(torch.where(border.flatten(), 3 * sizes * noise / math.sqrt(INPUTS), middle))
        # columns of random signs and sizes are of rank 1; noise that cancels for no image spreads them, too
        columns = plain.second.weight
        columns.add_(
            0.3 * columns.norm() / math.sqrt(columns.numel()) * torch.randn(columns.shape, generator=generator)
        )
    return plain


def images_with_a_black_border(count: int) -> Tensor:
    images = drawn_images((1, 28, 28), count)
    kept = torch.zeros_like(images)
    kept[:, :, 4:24, 4:24] = images[:, :, 4:24, 4:24]
    return kept


def test_a_disguise_that_fools_all_looks_at_rows_is_seen_on_the_clients_own_images() -> None:
    vetting = vet(built(hidden_in_the_border(seeded())), images=images_with_a_black_border(16))
    assert "proportional_rows" not in found(vetting, "structure")
    assert "low_rank" not in found(vetting, "structure")
    assert "bins_at_work" in found(vetting)
    assert vetting.verdict == "crafted"


def test_bins_behind_a_convolution_with_random_filters_are_seen() -> None:
    generator = seeded(4)
    front = nn.Conv2d(1, 4, 3, padding=1)
    query = torch.rand(4 * INPUTS, generator=generator)
    with torch.no_grad():
        values = front(torch.rand(64, 1, 28, 28, generator=generator)).relu().flatten(1) @ query
    edges = values.mean() + 20 * values.std() * torch.linspace(-2, 2, 128)
    sizes = torch.exp(torch.randn(128, generator=generator))
    bins = dense(sizes[:, None] * query, -sizes * edges)
    net = nn.Sequential(front, nn.ReLU(), nn.Flatten(), bins, nn.ReLU(), nn.Linear(128, 4))
    assert "bins_at_work" in found(vet(built(net)))


def test_an_honest_dense_first_layer_leaks_and_is_not_called_crafted() -> None:
    for units in (64, 256, 1024):
        vetting = vet(built(mlp(seeded(units), units)))
        assert vetting.verdict == "leaks"
        assert found(vetting) == {"images_come_back"}


@pytest.mark.parametrize("name", MODELS.names())
@pytest.mark.parametrize(("shape", "classes"), [((1, 32, 32), 2), ((3, 32, 32), 20)])
def test_no_model_of_the_zoo_raises_an_alarm(name: str, shape: tuple[int, ...], classes: int) -> None:
    if name == "vit_b16":
        pytest.skip("too large for a test of seconds; benchmarks/vetting_speed.py vets it")
    task = Segmentation(classes) if name in SEGMENTATION else SingleLabel(classes)
    try:
        model = build_model(name, image_shape=shape, task=task, generator=seeded())
    except MissingExtra:
        pytest.skip("needs MONAI")
    vetting = vet(model)
    assert vetting.passed, vetting.reasons
    assert vetting.behavior_checked


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 8, 16, 16)])
def test_volumes_and_several_labels_are_vetted_too(shape: tuple[int, ...]) -> None:
    model = build_model("cnn_fedavg", image_shape=shape, task=MultiLabel(5), generator=seeded())
    vetting = vet(model)
    assert vetting.passed, vetting.reasons
    assert vetting.behavior_checked


def trained(module: nn.Module, steps: int, seed: int) -> nn.Module:
    """Some steps of Adam on bright and dark halves, which any net learns."""
    generator = seeded(seed)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    for _ in range(steps):
        labels = torch.randint(4, (32,), generator=generator)
        images = 0.6 * torch.rand(32, 1, 28, 28, generator=generator)
        for place, label in enumerate(labels.tolist()):
            images[place, 0, 14 * (label // 2) : 14 * (label // 2) + 14, 14 * (label % 2) : 14 * (label % 2) + 14] += (
                0.4
            )
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return module.eval()


@pytest.mark.parametrize("name", ["cnn3", "lenet_dlg", "cnn_fedavg"])
@pytest.mark.parametrize("steps", [5, 60])
def test_honest_training_raises_no_alarm(name: str, steps: int) -> None:
    module = trained(MODELS[name].item((1, 28, 28), 4, seeded(steps)), steps, steps)
    vetting = vet(built(module))
    assert vetting.passed, vetting.reasons


@pytest.mark.parametrize("steps", [5, 60, 200])
def test_an_honest_dense_first_net_stays_honest_while_it_trains(steps: int) -> None:
    assert vet(built(trained(mlp(seeded(steps)), steps, steps))).verdict == "leaks"


def test_dominance_is_the_largest_gradient_over_the_others_and_has_its_floor() -> None:
    """A linear net without bias on images of one pixel each: gradients are (p - y) x, so norms follow the pixels."""
    linear = nn.Linear(784, 2, bias=False)
    nn.init.zeros_(linear.weight)
    net = nn.Sequential(nn.Flatten(), linear)
    for sizes in ((1.0, 1.0, 1.0, 1.0), (1.0, 0.1, 0.1, 0.2)):
        images = torch.zeros(4, 1, 28, 28)
        images[:, 0, 3, 3] = torch.tensor(sizes)
        vetting = vet(built(net, 2), images=images)
        score = next(result.score for result in vetting.results if result.check == "one_image_dominates")
        assert score == pytest.approx(max(sizes) / (sum(sizes) - max(sizes)), rel=1e-6)


def test_the_simulated_step_is_the_gradient_that_pytorch_computes() -> None:
    net = trap_weights(seeded(7))
    watched = watch(built(net), drawn_images((1, 28, 28), 16))
    loss = nn.functional.cross_entropy(net(watched.batch.images), watched.batch.targets)
    expected = torch.autograd.grad(loss, [parameter for parameter in net.parameters() if parameter.ndim == 2])
    for view, gradient in zip(watched.views, expected, strict=True):
        assert torch.allclose(view.errors @ view.samples(), gradient, rtol=1e-4, atol=1e-7)


def test_tensors_are_loaded_into_the_agreed_model_and_tried() -> None:
    agreed = built(medleak(seeded(1)))
    received = dict(dead(seeded(2)).state_dict())
    vetting = vet(received, agreed=agreed)
    assert vetting.behavior_checked
    assert "dead_layer" in found(vetting)


def test_tensors_that_do_not_fit_the_agreed_model_are_found_and_not_tried() -> None:
    honest = MODELS["cnn3"].item((1, 28, 28), 4, seeded())
    agreed = built(honest)
    assert vet(dict(honest.state_dict()), agreed=agreed).passed
    vetting = vet({**honest.state_dict(), "extra.weight": torch.zeros(3, 3)}, agreed=agreed)
    assert found(vetting, "reference") == {"agreed_model"}
    assert "'extra.weight' is unknown" in " ".join(vetting.reasons)
    assert not vetting.behavior_checked


def test_the_same_model_gets_the_same_scores() -> None:
    first, second = (vet(built(medleak(seeded(5)))) for _ in range(2))
    assert [result.score for result in first.results if result.status != "not checked"] == [
        result.score for result in second.results if result.status != "not checked"
    ]


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(ModelError, match=r"expected \(N, 1, 28, 28\)"):
        vet(built(mlp(seeded())), images=torch.zeros(4, 1, 32, 32))


def test_drawn_images_are_in_range_of_all_brightnesses_and_always_the_same() -> None:
    for shape in ((1, 28, 28), (3, 32, 32), (2, 20, 20), (1, 8, 16, 16)):
        images = drawn_images(shape, 16)
        assert images.shape == (16, *shape)
        assert float(images.min()) >= 0.0
        assert float(images.max()) <= 1.0
        means = images.flatten(1).mean(dim=1).sort().values
        assert float(means[-1] - means[0]) > 0.35
        assert torch.equal(images, drawn_images(shape, 16))


def pruned(module: nn.Module, share: float) -> nn.Module:
    """The smallest weights of every layer set to zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                limit = parameter.abs().flatten().kthvalue(int(share * parameter.numel())).values
                parameter.mul_(parameter.abs() > limit)
    return module


def rounded(module: nn.Module) -> nn.Module:
    """Weights on 255 levels, as after quantization to int8."""
    with torch.no_grad():
        for parameter in module.parameters():
            step = parameter.abs().max() / 127
            parameter.copy_((parameter / step).round() * step)
    return module


class LowRankAdapted(nn.Module):
    """A dense layer with an adapter of rank 4 whose second factor starts at zero (LoRA)."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(784, 64)
        self.frozen.requires_grad_(False)
        self.lora_a = nn.Linear(784, 16, bias=False)
        self.lora_b = nn.Linear(16, 64, bias=False)
        nn.init.zeros_(self.lora_b.weight)
        self.head = nn.Linear(64, 4)

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        output: Tensor = self.head(torch.relu(self.frozen(flat) + self.lora_b(self.lora_a(flat))))
        return output


def residual_from_zero() -> nn.Module:
    """ResNet18 whose residual branches start at zero, as training recipes have it, and whose head does."""
    net = MODELS["resnet18_cifar"].item((1, 28, 28), 4, seeded())
    for name, parameter in net.named_parameters():
        if name.endswith("bn2.weight") or name.startswith("fc."):
            nn.init.zeros_(parameter)
    return net


def head_from_zero() -> nn.Module:
    net = MODELS["cnn_fedavg"].item((1, 28, 28), 4, seeded())
    for name, parameter in net.named_parameters():
        if name.startswith("fc."):
            nn.init.zeros_(parameter)
    return net


def frozen_but_for_the_dense_layers() -> nn.Module:
    net = MODELS["cnn_fedavg"].item((1, 28, 28), 4, seeded(6))
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not name.startswith("body."))
    return net


class DensePatches(nn.Module):
    """A dense layer on patches of the image comes first, as in some vision transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(49, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(2, 7, 7).unfold(3, 7, 7).reshape(len(images), 16, 49)
        output: Tensor = self.head(torch.relu(self.embed(patches)).mean(dim=1))
        return output


HONEST = {
    "frozen but for the dense layers": frozen_but_for_the_dense_layers,
    "dense layer on patches": DensePatches,
    "pruned to a half": lambda: pruned(MODELS["cnn_fedavg"].item((1, 28, 28), 4, seeded(1)), 0.5),
    "pruned to a tenth": lambda: pruned(MODELS["cnn_fedavg"].item((1, 28, 28), 4, seeded(2)), 0.9),
    "small kernels pruned to a tenth": lambda: pruned(MODELS["cnn3"].item((1, 28, 28), 4, seeded(2)), 0.9),
    "int8": lambda: rounded(MODELS["cnn_fedavg"].item((1, 28, 28), 4, seeded(3))),
    "adapter of low rank": LowRankAdapted,
    "residuals from zero": residual_from_zero,
    "head from zero": head_from_zero,
}


@pytest.mark.parametrize("kind", HONEST)
def test_what_honest_people_do_to_models_raises_no_alarm(kind: str) -> None:
    vetting = vet(built(HONEST[kind]()))
    dense_first = kind == "adapter of low rank"
    assert vetting.verdict == ("leaks" if dense_first else "passed"), vetting.reasons


def test_a_model_whose_numbers_overflow_is_refused() -> None:
    net = mlp(seeded())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1e30)
    model = built(mlp(seeded()))
    with pytest.raises(ModelError, match="not finite"):
        vet(dict(net.state_dict()), agreed=model)
