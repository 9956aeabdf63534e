"""The folder reader against pixels that were written with Pillow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from medpfl.core.errors import DataError
from medpfl.data import FolderReader
from medpfl.data.pixels import read_image_file

RANDOM = np.random.default_rng(0)
GRAY = RANDOM.integers(0, 256, (7, 9), dtype=np.uint8)
COLOR = RANDOM.integers(0, 256, (7, 9, 3), dtype=np.uint8)
ALPHA = RANDOM.integers(0, 256, (7, 9), dtype=np.uint8)
DEEP = RANDOM.integers(0, 65536, (7, 9), dtype=np.uint16)


def save(image: Image.Image, path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def read(path: Path) -> np.ndarray:
    return read_image_file(path).double().numpy()


def test_gray_8_bit(tmp_path: Path) -> None:
    np.testing.assert_allclose(read(save(Image.fromarray(GRAY), tmp_path / "a.png"))[0], GRAY / 255, atol=1e-7)


def test_gray_16_bit_keeps_its_precision(tmp_path: Path) -> None:
    image = read(save(Image.fromarray(DEEP), tmp_path / "a.png"))
    assert image.shape == (1, 7, 9)
    np.testing.assert_allclose(image[0], DEEP / 65535, atol=1e-7)


def test_color(tmp_path: Path) -> None:
    image = read(save(Image.fromarray(COLOR), tmp_path / "a.png"))
    np.testing.assert_allclose(image, COLOR.transpose(2, 0, 1) / 255, atol=1e-7)


def test_transparent_color_is_composited_on_black(tmp_path: Path) -> None:
    image = read(save(Image.fromarray(np.dstack([COLOR, ALPHA])), tmp_path / "a.png"))
    np.testing.assert_allclose(image, (COLOR / 255 * ALPHA[..., None] / 255).transpose(2, 0, 1), atol=1e-7)


def test_transparent_gray_stays_gray(tmp_path: Path) -> None:
    image = read(save(Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(ALPHA)]), tmp_path / "a.png"))
    np.testing.assert_allclose(image, (GRAY / 255 * ALPHA / 255)[None], atol=1e-7)


def test_palette_is_expanded(tmp_path: Path) -> None:
    indices = RANDOM.integers(0, 4, (7, 9), dtype=np.uint8)
    colors = np.array([[255, 0, 0], [0, 128, 0], [10, 20, 30], [1, 2, 3]], dtype=np.uint8)
    picture = Image.fromarray(indices)
    picture.putpalette(colors.flatten().tolist())
    image = read(save(picture, tmp_path / "a.png"))
    np.testing.assert_allclose(image, colors[indices].transpose(2, 0, 1) / 255, atol=1e-7)


def test_black_and_white(tmp_path: Path) -> None:
    image = read(save(Image.fromarray(GRAY > 127), tmp_path / "a.png"))
    np.testing.assert_array_equal(image[0], GRAY > 127)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_is_what_pillow_decodes(mode: str, tmp_path: Path) -> None:
    path = save(Image.fromarray(COLOR).convert(mode), tmp_path / "a.jpeg")
    expected = np.asarray(Image.open(path).convert("L" if mode == "L" else "RGB"), dtype=np.float64) / 255
    expected = expected[None] if mode == "L" else expected.transpose(2, 0, 1)
    np.testing.assert_allclose(read(path), expected, atol=1e-7)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(Image.fromarray(COLOR), tmp_path / "a.jpg", exif=exif)
    turned = ImageOps.exif_transpose(Image.open(path))
    assert read(path).shape == (3, 9, 7)
    np.testing.assert_allclose(read(path), np.asarray(turned).transpose(2, 0, 1) / 255, atol=1e-7)


def test_sub_folders_are_classes_and_items_are_relative_paths(tmp_path: Path) -> None:
    for name in ("no_tumor/b.png", "glioma/z.PNG", "glioma/deep/a.jpg", "glioma/.hidden.png", ".cache/c.png"):
        path = tmp_path / name
        save(Image.fromarray(GRAY), path, format="JPEG" if name.endswith("jpg") else "PNG")
    (tmp_path / "glioma" / "readme.txt").write_text("not an image")
    (tmp_path / "readme.txt").write_text("not an image")
    reader = FolderReader(path=tmp_path)
    assert reader.class_names() == ("glioma", "no_tumor")
    found = [(sample.item, sample.label) for sample in reader.read()]
    assert found == [("glioma/deep/a.jpg", 0), ("glioma/z.PNG", 0), ("no_tumor/b.png", 1)]


def test_flat_folder_has_one_class(tmp_path: Path) -> None:
    for name in ("10.png", "9.png"):
        save(Image.fromarray(GRAY), tmp_path / name)
    reader = FolderReader(path=tmp_path)
    assert reader.class_names() == ("unlabeled",)
    assert [(sample.item, sample.label) for sample in reader.read()] == [("10.png", 0), ("9.png", 0)]


def test_pattern_chooses_files(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/2.png", "test/a/3.png"):
        save(Image.fromarray(GRAY), tmp_path / name)
    assert [sample.item for sample in FolderReader(path=tmp_path, pattern="2*").read()] == ["train/b/2.png"]
    chosen = [sample.item for sample in FolderReader(path=tmp_path, pattern="train/*").read()]
    assert chosen == ["train/a/1.png", "train/b/2.png"]


def test_labels_can_be_switched_off(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png"):
        save(Image.fromarray(GRAY), tmp_path / name)
    reader = FolderReader(path=tmp_path, labels="none")
    assert reader.class_names() == ("unlabeled",)
    assert [sample.label for sample in reader.read()] == [0, 0]


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    save(Image.fromarray(GRAY), tmp_path / "source" / "1.png")
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").symlink_to(tmp_path / "source")
    (root / "a" / "loop").symlink_to(root)
    assert [sample.item for sample in FolderReader(path=root).read()] == ["a/1.png"]


def test_images_in_and_beside_sub_folders_are_refused(tmp_path: Path) -> None:
    save(Image.fromarray(GRAY), tmp_path / "a" / "1.png")
    save(Image.fromarray(GRAY), tmp_path / "stray.png")
    with pytest.raises(DataError, match=r"stray\.png"):
        FolderReader(path=tmp_path).class_names()


def test_empty_folder_and_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is empty"):
        list(FolderReader(path=tmp_path).read())
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="among its 1 files"):
        list(FolderReader(path=tmp_path).read())


def test_maximum_is_balanced_over_classes(tmp_path: Path) -> None:
    for name in [f"a/{number}.png" for number in range(8)] + ["b/0.png", "b/1.png"]:
        save(Image.fromarray(GRAY), tmp_path / name)
    labels = [sample.label for sample in FolderReader(path=tmp_path).read(4)]
    assert labels == [0, 0, 1, 1]


def test_one_file_is_a_data_set(tmp_path: Path) -> None:
    path = save(Image.fromarray(GRAY), tmp_path / "a.png")
    (sample,) = FolderReader(path=path).read()
    assert sample.item == "a.png"
    assert torch.equal(sample.image, read_image_file(path))
