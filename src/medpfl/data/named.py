"""Data sets of the papers: what they hold, where they are published, and whether a folder or file looks like them.

Nothing is downloaded. A user points at what they downloaded, and `check_named` says what is missing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medpfl.core.errors import DataError
from medpfl.core.registry import Registry
from medpfl.data.listing import find_files
from medpfl.data.npz import SPLITS, holds_volumes, npz_keys, split_images, split_labels
from medpfl.data.pixels import IMAGE_SUFFIXES

_MEDMNIST = (
    "Yang J. et al., MedMNIST v2 - A large-scale lightweight benchmark for 2D and 3D biomedical image classification, "
    "Scientific Data 10, 41, 2023"
)
_ORGANS = (
    "bladder",
    "femur-left",
    "femur-right",
    "heart",
    "kidney-left",
    "kidney-right",
    "liver",
    "lung-left",
    "lung-right",
    "pancreas",
    "spleen",
)


@dataclass(frozen=True)
class NamedDataset:
    """A published data set.

    `images` counts the published images, by split for npz files. `layout` says what `path` must point at. `unsure`
    says which of these facts were not checked against the publication or differ between its versions.
    """

    name: str
    title: str
    reader: Literal["folder", "medmnist"]
    classes: tuple[str, ...]
    channels: Literal[1, 3]
    images: tuple[int, ...]
    license: str
    source: str
    citation: str
    layout: str
    multi_label: bool = False
    unsure: str = ""


DATASETS: Registry[NamedDataset] = Registry("named data set")


def _add(named: NamedDataset) -> None:
    DATASETS.add(
        named.name,
        named,
        summary=f"{named.title}; {len(named.classes)} classes, {named.channels} channels, {sum(named.images)} images; "
        f"license: {named.license}",
        paper=named.citation,
        limits=named.unsure,
    )


_add(
    NamedDataset(
        name="brain_mri",
        title="Brain Tumor MRI Dataset (Nickparvar)",
        reader="folder",
        classes=("glioma", "meningioma", "no_tumor", "pituitary"),
        channels=1,
        images=(5712, 1311),
        license="CC0 1.0",
        source="Kaggle, masoudnickparvar/brain-tumor-mri-dataset, doi:10.34740/KAGGLE/DSV/2645886",
        citation="Nickparvar M., Brain Tumor MRI Dataset, Kaggle, 2021; Cheng J., brain tumor dataset, figshare, 2017",
        layout="the folder Training or Testing with sub-folders glioma, meningioma, notumor, pituitary (JPEG)",
        unsure="counts are those of the 2021 version (Training 5712, Testing 1311); later versions may differ",
    )
)
_add(
    NamedDataset(
        name="covid_cxr",
        title="Covid-19 Image Dataset (Raikote)",
        reader="folder",
        classes=("covid", "normal", "viral_pneumonia"),
        channels=1,
        images=(251, 66),
        license="CC BY-SA 4.0",
        source="Kaggle, pranavraikokte/covid19-image-dataset",
        citation="Raikote P., Covid-19 Image Dataset, Kaggle, 2020",
        layout="the folder train or test with sub-folders Covid, Normal, Viral Pneumonia (PNG and JPEG)",
        unsure="the license is the one stated on Kaggle as remembered; single images come from other sources",
    )
)
_add(
    NamedDataset(
        name="melanoma",
        title="Melanoma Skin Cancer Dataset of 10000 Images (Javid)",
        reader="folder",
        classes=("benign", "malignant"),
        channels=3,
        images=(9605, 1000),
        license="CC0 1.0",
        source="Kaggle, hasnainjaved/melanoma-skin-cancer-dataset-of-10000-images, from the ISIC archive",
        citation="Javid M. H., Melanoma Skin Cancer Dataset of 10000 Images, Kaggle, 2022",
        layout="the folder train or test with sub-folders benign, malignant (JPEG)",
        unsure="license and counts (train 9605, test 1000) as remembered from Kaggle",
    )
)


def _add_medmnist(
    name: str,
    title: str,
    classes: tuple[str, ...],
    channels: Literal[1, 3],
    images: tuple[int, int, int],
    *,
    multi_label: bool = False,
    license: str = "CC BY 4.0",
    unsure: str = "",
) -> None:
    _add(
        NamedDataset(
            name=name,
            title=title,
            reader="medmnist",
            classes=classes,
            channels=channels,
            images=images,
            license=license,
            source="Zenodo, MedMNIST v2, doi:10.5281/zenodo.6496656 (28 pixels); MedMNIST+ for 64, 128 and 224 pixels",
            citation=_MEDMNIST,
            layout=f"the file {name}.npz (28 pixels), or {name}_64.npz, {name}_128.npz, {name}_224.npz",
            multi_label=multi_label,
            unsure=unsure,
        )
    )


_add_medmnist(
    "pathmnist",
    "PathMNIST, colorectal cancer histology",
    (
        "adipose",
        "background",
        "debris",
        "lymphocytes",
        "mucus",
        "smooth muscle",
        "normal colon mucosa",
        "cancer-associated stroma",
        "colorectal adenocarcinoma epithelium",
    ),
    3,
    (89996, 10004, 7180),
)
_add_medmnist(
    "chestmnist",
    "ChestMNIST, frontal chest films (NIH ChestX-ray14)",
    (
        "atelectasis",
        "cardiomegaly",
        "effusion",
        "infiltration",
        "mass",
        "nodule",
        "pneumonia",
        "pneumothorax",
        "consolidation",
        "edema",
        "emphysema",
        "fibrosis",
        "pleural",
        "hernia",
    ),
    1,
    (78468, 11219, 22433),
    multi_label=True,
)
_add_medmnist(
    "dermamnist",
    "DermaMNIST, dermoscopy (HAM10000)",
    (
        "actinic keratoses and intraepithelial carcinoma",
        "basal cell carcinoma",
        "benign keratosis-like lesions",
        "dermatofibroma",
        "melanoma",
        "melanocytic nevi",
        "vascular lesions",
    ),
    3,
    (7007, 1003, 2005),
    license="CC BY-NC 4.0",
    unsure="early releases stated CC BY 4.0; later ones CC BY-NC 4.0, as HAM10000",
)
_add_medmnist(
    "octmnist",
    "OCTMNIST, retinal optical coherence tomography",
    ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"),
    1,
    (97477, 10832, 1000),
)
_add_medmnist("pneumoniamnist", "PneumoniaMNIST, pediatric chest films", ("normal", "pneumonia"), 1, (4708, 524, 624))
_add_medmnist(
    "retinamnist",
    "RetinaMNIST, fundus photographs graded 0 to 4 (DeepDRiD)",
    ("0", "1", "2", "3", "4"),
    3,
    (1080, 120, 400),
    unsure="the published task is ordinal regression; here the grades are classes",
)
_add_medmnist("breastmnist", "BreastMNIST, breast ultrasound", ("malignant", "normal, benign"), 1, (546, 78, 156))
_add_medmnist(
    "bloodmnist",
    "BloodMNIST, blood cells in microscopy",
    (
        "basophil",
        "eosinophil",
        "erythroblast",
        "immature granulocytes",
        "lymphocyte",
        "monocyte",
        "neutrophil",
        "platelet",
    ),
    3,
    (11959, 1712, 3421),
)
_add_medmnist(
    "tissuemnist",
    "TissueMNIST, kidney cortex cells in microscopy",
    (
        "collecting duct, connecting tubule",
        "distal convoluted tubule",
        "glomerular endothelial cells",
        "interstitial endothelial cells",
        "leukocytes",
        "podocytes",
        "proximal tubule segments",
        "thick ascending limb",
    ),
    1,
    (165466, 23640, 47280),
)
for _plane, _letter, _images in (
    ("axial", "a", (34561, 6491, 17778)),
    ("coronal", "c", (12975, 2392, 8216)),
    ("sagittal", "s", (13932, 2452, 8827)),
):
    _add_medmnist(
        f"organ{_letter}mnist",
        f"Organ{_letter.upper()}MNIST, abdominal CT, {_plane} slices (LiTS)",
        _ORGANS,
        1,
        _images,
        unsure="counts of the current release as remembered; earlier releases have up to 52 images more per split",
    )


def class_names_of_file(path: Path, count: int) -> tuple[str, ...]:
    """The published class names for a file such as `pathmnist_64.npz`, else the numbers 0 to `count` - 1 as text.

    >>> class_names_of_file(Path("breastmnist.npz"), 2)
    ('malignant', 'normal, benign')
    >>> class_names_of_file(Path("mine.npz"), 2)
    ('0', '1')
    """
    name = path.stem.lower().split("_")[0]
    if name in DATASETS and len(DATASETS[name].item.classes) >= count:
        return DATASETS[name].item.classes
    return tuple(str(number) for number in range(count))


def check_named(name: str, path: Path) -> list[str]:
    """What is missing or unexpected at `path` for the named data set, in plain sentences; empty if all is there.

    Advice only: a subset is fine for an audit. A name that is not in the table gives no findings. Never raises for
    bad files; it says what is wrong with them.
    """
    if name not in DATASETS:
        return []
    named = DATASETS[name].item
    try:
        return _check_npz(named, path) if named.reader == "medmnist" else _check_folder(named, path)
    except DataError as error:
        return [f"{error}. Expected {named.layout}; published at: {named.source}."]


def _check_folder(named: NamedDataset, path: Path) -> list[str]:
    if path.is_file():
        return [f"'{path}' is a file; {named.name} is {named.layout}."]
    found = find_files(path, suffixes=IMAGE_SUFFIXES)
    folders = Counter(file.folder or "" for file in found)
    present = {_plain(folder) for folder in folders}
    expected = {_plain(class_name): class_name for class_name in named.classes}
    if not present & set(expected):
        deeper = sorted({file.folder for file in found if file.folder and _holds(file.name, set(expected))})
        hint = f" Point at {' or '.join(repr(str(path / folder)) for folder in deeper)} instead." if deeper else ""
        return [f"'{path}' has none of the class folders of {named.name}; expected {named.layout}.{hint}"]
    findings = [
        f"The class folder '{class_name}' of {named.name} is missing."
        for plain, class_name in expected.items()
        if plain not in present
    ]
    findings += [
        f"'{folder}' is not a class of {named.name}." if folder else f"{count} images lie beside the class folders."
        for folder, count in sorted(folders.items())
        if _plain(folder) not in expected
    ]
    if len(found) not in (*named.images, sum(named.images)):
        published = " or ".join(str(count) for count in (*named.images, sum(named.images)))
        findings.append(f"{len(found)} images are there; {published} were published.")
    return findings


def _check_npz(named: NamedDataset, path: Path) -> list[str]:
    if path.is_dir():
        return [f"'{path}' is a folder; {named.name} is {named.layout}."]
    keys = set(npz_keys(path))
    findings = [
        f"The array '{split}_{kind}' is missing."
        for split in SPLITS
        for kind in ("images", "labels")
        if f"{split}_{kind}" not in keys
    ]
    for split, published in zip(SPLITS, named.images, strict=True):
        if not {f"{split}_images", f"{split}_labels"} <= keys:
            continue
        images, labels = split_images(path, split), split_labels(path, split)
        if holds_volumes(images):
            findings.append(f"{split}_images holds volumes; {named.name} has images.")
            continue
        channels = 1 if images.ndim == 3 else 3
        if channels != named.channels:
            findings.append(f"{split}_images has {channels} channels; {named.name} has {named.channels}.")
        if (labels.shape[1] > 1) != named.multi_label or (named.multi_label and labels.shape[1] != len(named.classes)):
            expected = len(named.classes) if named.multi_label else 1
            findings.append(f"{split}_labels has {labels.shape[1]} entries per image; {named.name} has {expected}.")
        elif not named.multi_label and int(labels.max(initial=0)) >= len(named.classes):
            findings.append(f"{split}_labels reach {labels.max()}; {named.name} has {len(named.classes)} classes.")
        if len(images) != published:
            findings.append(f"{split} has {len(images)} images; {published} were published.")
    return findings


def _holds(name: str, expected: set[str]) -> bool:
    parts = name.split("/")
    return len(parts) > 2 and _plain(parts[1]) in expected


def _plain(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum())
