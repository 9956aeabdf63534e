"""Who is a victim and what is in the pool: properties that hold for any data set."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medpfl.core.errors import DataError
from medpfl.core.tasks import MultiLabel, SingleLabel
from medpfl.data import Dataset, PhantomReader, Split, load_dataset, near_duplicates_of, split


def dataset(
    labels: list[int], patients: list[str | None] | None = None, images: torch.Tensor | None = None, name: str = "d"
) -> Dataset:
    count = len(labels)
    noise = torch.rand((count, 1, 8, 8), generator=torch.Generator().manual_seed(count))
    return Dataset(
        name=name,
        images=noise if images is None else images,
        targets=torch.tensor(labels, dtype=torch.int64),
        items=tuple(str(index) for index in range(count)),
        patients=tuple(patients or [None] * count),
        class_names=tuple(str(label) for label in range(max(labels) + 1)),
        task=SingleLabel(max(2, max(labels) + 1)),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Dataset, int, int, int]:
    count = draw(st.integers(1, 40))
    labels = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    keys = st.one_of(st.none(), st.sampled_from(["a", "b", "c", "d", "e", "f", "g"]))
    patients = draw(st.one_of(st.none(), st.lists(keys, min_size=count, max_size=count)))
    victims = draw(st.integers(0, 5))
    size = draw(st.integers(1, max(1, count // max(1, victims))))
    return dataset(labels, patients), victims, size, draw(st.integers(0, 2**40))


def side_of(result: Split) -> dict[str, list[int]]:
    return {
        "victims": [index for victim in result.victims for index in victim],
        "bystanders": [index for bystander in result.bystanders for index in bystander],
        "training": list(result.training),
        "auxiliary": list(result.auxiliary),
        "null": list(result.null),
    }


def patients_of(data: Dataset, indices: list[int]) -> set[str]:
    return {patient for index in indices if (patient := data.patients[index]) is not None}


@settings(max_examples=150, deadline=None)
@given(cases())
def test_sides_are_disjoint_by_image_and_by_patient(case: tuple[Dataset, int, int, int]) -> None:
    data, victims, size, seed = case
    if victims * size > len(data):
        return
    result = split(data, victims=victims, images_per_victim=size, seed=seed)
    sides = side_of(result)
    assert [len(victim) for victim in result.victims] == [size] * victims
    everything = [index for indices in sides.values() for index in indices]
    assert len(everything) == len(set(everything))
    assert len(everything) + result.near_duplicates + result.dropped_by_patient == len(data)
    seen: set[str] = set()
    for indices in sides.values():
        patients = patients_of(data, indices)
        assert not seen & patients
        seen |= patients


@settings(max_examples=60, deadline=None)
@given(cases())
def test_the_same_seed_gives_the_same_split(case: tuple[Dataset, int, int, int]) -> None:
    data, victims, size, seed = case
    if victims * size > len(data):
        return
    torch.manual_seed(seed % 7)  # the global generator has no say
    assert split(data, victims=victims, images_per_victim=size, seed=seed) == split(
        data, victims=victims, images_per_victim=size, seed=seed
    )


@settings(max_examples=100, deadline=None)
@given(cases())
def test_larger_victims_contain_smaller_ones(case: tuple[Dataset, int, int, int]) -> None:
    data, victims, size, seed = case
    if victims * size > len(data):
        return
    large = split(data, victims=victims, images_per_victim=size, seed=seed).victims
    for smaller in range(1, size):
        small = split(data, victims=victims, images_per_victim=smaller, seed=seed).victims
        assert small == tuple(victim[:smaller] for victim in large)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**40))
def test_classes_are_balanced_over_victims_and_within_them(victims: int, size: int, seed: int) -> None:
    data = dataset([index % 4 for index in range(120)])
    result = split(data, victims=victims, images_per_victim=size, seed=seed)
    for position in range(size):
        counts = Counter(int(data.targets[victim[position]]) for victim in result.victims)
        assert max(counts.values()) - min(counts.get(label, 0) for label in range(4)) <= 1
    for victim in result.victims:
        assert len({int(data.targets[index]) for index in victim}) == size


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**40), st.integers(1, 8), st.integers(0, 10))
def test_bystanders_are_other_patients(seed: int, victims: int, bystanders: int) -> None:
    data = dataset([index % 2 for index in range(60)], [f"p{index // 2}" for index in range(60)])
    result = split(data, victims=victims, images_per_victim=2, bystanders=bystanders, seed=seed)
    sides = side_of(result)
    assert [len(bystander) for bystander in result.bystanders] == [2] * bystanders
    assert len(set(sides["bystanders"])) == 2 * bystanders
    taken = patients_of(data, sides["victims"])
    assert not taken & patients_of(data, sides["bystanders"])
    pool = sides["training"] + sides["auxiliary"] + sides["null"]
    assert not (taken | patients_of(data, sides["bystanders"])) & patients_of(data, pool)


def test_seeds_and_names_draw_different_victims() -> None:
    data = dataset([0] * 100)
    first = split(data, victims=8, images_per_victim=1, seed=0).victims
    assert first != split(data, victims=8, images_per_victim=1, seed=1).victims
    assert first != split(dataset([0] * 100, name="other"), victims=8, images_per_victim=1, seed=0).victims


def test_every_image_can_be_a_victim() -> None:
    data = dataset([index % 2 for index in range(10)])
    drawn = Counter(split(data, victims=1, images_per_victim=1, seed=seed).victims[0][0] for seed in range(400))
    assert set(drawn) == set(range(10))
    assert max(drawn.values()) < 4 * min(drawn.values())


def test_parts_have_their_shares_in_every_class() -> None:
    data = dataset([index % 3 for index in range(303)])
    result = split(data, victims=3, images_per_victim=1, seed=0)
    assert (len(result.training), len(result.auxiliary), len(result.null)) == (150, 75, 75)
    for part, share in ((result.training, 50), (result.auxiliary, 25), (result.null, 25)):
        counts = Counter(int(data.targets[index]) for index in part)
        assert all(abs(counts[label] - share) <= 1 for label in range(3))
    only = split(data, victims=3, images_per_victim=1, seed=0, parts=(0.0, 1.0, 0.0))
    assert (len(only.training), len(only.auxiliary), len(only.null)) == (0, 300, 0)


def test_half_of_the_patients_stay_in_the_pool_as_long_as_they_can() -> None:
    patients: list[str | None] = [f"p{index % 20}" for index in range(200)]
    data = dataset([0] * 200, patients)
    small = split(data, victims=4, images_per_victim=1, seed=3)
    assert len(patients_of(data, side_of(small)["victims"])) == 4
    large = split(data, victims=10, images_per_victim=10, seed=3)
    assert len(patients_of(data, side_of(large)["victims"])) == 10
    assert large.dropped_by_patient == 0
    assert len(large.training) + len(large.auxiliary) + len(large.null) == 100


@pytest.mark.parametrize("seed", range(5))
def test_victims_show_different_patients_also_where_patients_have_images_of_several_classes(seed: int) -> None:
    data = dataset([index % 2 for index in range(80)], [f"p{index // 4}" for index in range(80)])
    result = split(data, victims=8, images_per_victim=1, seed=seed)
    drawn = side_of(result)["victims"]
    assert len(patients_of(data, drawn)) == 8
    assert Counter(int(data.targets[index]) for index in drawn) == {0: 4, 1: 4}
    assert split(data, victims=8, images_per_victim=3, seed=seed).victims[5][0] == result.victims[5][0]


def test_dropped_patients_are_counted() -> None:
    data = dataset([0] * 12, ["a", "b", "c", "d"] * 3)
    result = split(data, victims=1, images_per_victim=1, seed=0)
    assert result.dropped_by_patient == 2
    assert len(result.training) + len(result.auxiliary) + len(result.null) == 9


def test_a_small_pool_serves_the_null_baselines_first() -> None:
    data = dataset([0] * 6, ["a", "a", "a", "b", "b", "b"])
    result = split(data, victims=1, images_per_victim=1, seed=0)
    assert len(result.null) == 3
    assert result.training == result.auxiliary == ()
    assert any("no training images" in note for note in result.notes)
    assert any("no auxiliary images" in note for note in result.notes)


def test_unknown_patients_are_noted() -> None:
    assert any("not known" in note for note in split(dataset([0] * 9), victims=1, images_per_victim=1, seed=0).notes)
    partly = split(dataset([0] * 9, [None, *"abcdefgh"]), victims=1, images_per_victim=1, seed=0)
    assert "The patient of 1 of 9 images is not known." in partly.notes
    fully = split(dataset([0] * 9, [*"abcdefghi"]), victims=1, images_per_victim=1, seed=0)
    assert fully.notes == ()


def test_victims_that_depend_on_each_other_are_noted() -> None:
    one_patient = split(dataset([0] * 6, ["a", "a", "a", "b", "b", "b"]), victims=2, images_per_victim=1, seed=0)
    assert any("The 2 victims come from 1 patient:" in note for note in one_patient.notes)
    images = torch.rand((1, 1, 8, 8)).repeat(4, 1, 1, 1)
    same = split(dataset([0] * 4, images=images), victims=2, images_per_victim=2, seed=0)
    assert any("2 of 2 victims have an image that nearly repeats" in note for note in same.notes)
    different = split(dataset([0] * 9, [*"abcdefghi"]), victims=2, images_per_victim=1, seed=0)
    assert not different.notes


def test_no_victims_is_an_auxiliary_entry() -> None:
    result = split(dataset([0, 1] * 10), victims=0, images_per_victim=4, seed=0)
    assert result.victims == ()
    assert len(result.training) + len(result.auxiliary) + len(result.null) == 20


def test_too_few_images_says_how_many() -> None:
    with pytest.raises(DataError, match="has 10 images and 12 are needed for 3 victims with 4 images each"):
        split(dataset([0] * 10), victims=3, images_per_victim=4, seed=0)
    with pytest.raises(
        DataError, match="7 of other patients than the victims' are left and 8 are needed for 8 bystanders"
    ):
        split(dataset([0] * 10), victims=3, images_per_victim=1, bystanders=8, seed=0)


def test_several_labels_are_stratified_by_the_rarest() -> None:
    rows = torch.zeros(60, 3)
    rows[:, 0] = 1
    rows[:12, 1] = 1
    rows[50:, :] = 0
    base = dataset([0] * 60)
    data = Dataset(**{**base.__dict__, "targets": rows, "task": MultiLabel(3)})
    for seed in range(5):
        victims = split(data, victims=3, images_per_victim=1, seed=seed).victims
        kinds = sorted(tuple(rows[index].tolist()) for (index,) in victims)
        assert kinds == [(0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (1.0, 1.0, 0.0)]


def test_near_duplicates_leave_the_pool() -> None:
    data = load_dataset(PhantomReader(count=16), name="d", size=32, channels=1)
    slightly = (data.images * 0.9 + 0.02 + 0.01 * torch.rand(data.images.shape)).clamp(0, 1)
    doubled = dataset([0] * 32, images=torch.cat([data.images, slightly]))
    result = split(doubled, victims=4, images_per_victim=1, seed=0)
    pool = {*result.training, *result.auxiliary, *result.null}
    for (index,) in result.victims:
        assert (index + 16) % 32 not in pool
    correlations = np.corrcoef(doubled.images.flatten(1).numpy())
    used = [index for (index,) in result.victims]
    expected = {index for index in range(32) if index not in used and correlations[index, used].max() > 0.95}
    assert result.near_duplicates == len(expected) >= 4
    assert pool == set(range(32)) - set(used) - expected
    kept = split(doubled, victims=4, images_per_victim=1, seed=0, near_duplicate_threshold=1.0)
    assert kept.near_duplicates == 0


def test_near_duplicates_of_other_data_sets_leave_the_pool() -> None:
    data = load_dataset(PhantomReader(count=16, resolution=128), name="d", size=48, channels=1)
    twins = load_dataset(PhantomReader(count=3, resolution=128), name="e", size=96, channels=3)
    result = split(data, victims=0, images_per_victim=1, seed=0, other_victims=[twins.images])
    pool = {*result.training, *result.auxiliary, *result.null}
    assert not pool & {0, 1, 2}
    assert result.near_duplicates >= 3
    same = split(data, victims=0, images_per_victim=1, seed=0, other_victims=twins.images)
    assert same == result


def test_near_duplicate_mask_agrees_with_numpy() -> None:
    images = torch.rand((20, 1, 12, 10), generator=torch.Generator().manual_seed(1))
    reference = torch.cat([images[3:4] * 0.5 + 0.1, (images[7:8] + images[8:9]) / 2, 1 - images[9:10]])
    correlations = np.corrcoef(images.flatten(1).numpy(), reference.flatten(1).numpy())[:20, 20:]
    for threshold in (0.5, 0.7, 0.95):
        mask = near_duplicates_of(images, reference, threshold)
        np.testing.assert_array_equal(mask.numpy(), correlations.max(axis=1) > threshold)


def test_constant_images_repeat_only_themselves() -> None:
    flat = torch.full((1, 1, 8, 8), 0.3)
    noise = torch.rand((2, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    assert near_duplicates_of(torch.cat([flat, noise]), flat).tolist() == [True, False, False]
    assert near_duplicates_of(flat, noise).tolist() == [False]
    assert near_duplicates_of(flat, torch.full((1, 1, 8, 8), 0.8)).tolist() == [False]
    assert near_duplicates_of(noise, noise[:0]).tolist() == [False, False]
