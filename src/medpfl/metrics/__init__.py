"""Pure functions that judge what came back, and the names under which `medpfl list metrics` shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medpfl.core.registry import Registry


@dataclass(frozen=True)
class Metric:
    """What a number means: its range and unit, which direction is a stronger leak, and what one number stands for."""

    range: str
    leak: Literal["higher", "lower", "neither"]
    level: Literal["image", "cell"]


METRICS: Registry[Metric] = Registry("metric")

_WANG = "Wang, Bovik, Sheikh, Simoncelli: Image quality assessment, IEEE TIP 2004, equation 13"
_MEDPFL = "Das, Amini, Wu: MedPFL, BIBM 2023 (arXiv 2311.06643)"

METRICS.add(
    "psnr",
    Metric("decibel, 0 to 100", "higher", "image"),
    summary="Peak signal-to-noise ratio in [0, 1] with range 1; the MSE is floored at 1e-10, so an exact copy has 100.",
    limits="Blind to structure: a blurred or class-average image can have a high value; read it beside the nulls.",
)
METRICS.add(
    "ssim",
    Metric("-1 to 1", "higher", "image"),
    summary="Structural similarity in [0, 1] with range 1, Gaussian window of 11, sigma 1.5, mean over channels.",
    paper=_WANG,
    limits="Needs at least 11 pixels along every axis; images that are flat over large areas score high easily.",
)
METRICS.add(
    "mse",
    Metric("0 to 1", "lower", "image"),
    summary="Mean squared error in [0, 1] over pixels and channels.",
)
METRICS.add(
    "asr",
    Metric("share, 0 to 1", "higher", "cell"),
    summary="Attack success rate: share of all private images with SSIM at the threshold or above (0.9 unless set).",
    paper=_MEDPFL,
    limits="Failed and blocked images count as not successful. One threshold hides most of what differs: see "
    "success_curve.",
)
METRICS.add(
    "success_curve",
    Metric("share, 0 to 1, at every threshold", "higher", "cell"),
    summary="The attack success rate at every SSIM threshold.",
)
METRICS.add(
    "recovered",
    Metric("share, 0 to 1", "higher", "cell"),
    summary="Recovery rate: share of all private images with a PSNR above 30 dB, beside the same of the null baselines.",
    limits="Failed and blocked images count as not recovered. Papers also use 18 dB, which another patient's picture "
    "often reaches.",
)
METRICS.add(
    "label_accuracy",
    Metric("share, 0 to 1", "higher", "cell"),
    summary="Share of the images with an inferred label whose label was inferred rightly.",
)
METRICS.add(
    "mask_dice",
    Metric("0 to 1", "higher", "image"),
    summary="Dice coefficient of the mask that the attack found and the true one, mean over the classes that either "
    "has, without the background; 1 where both are empty.",
    limits="Only for segmentation models whose masks were searched. A random mask has no 0: of half of the pixels, it "
    "scores 0.4 where the true one covers a third.",
)
METRICS.add(
    "null_class_mean",
    Metric("psnr, ssim and asr of an image that uses no update", "neither", "cell"),
    summary="What the mean image of the true class scores, made from other patients' images.",
)
METRICS.add(
    "null_nearest",
    Metric("psnr, ssim and asr of an image that uses no update", "neither", "cell"),
    summary="What the most similar image of another patient scores, chosen with the truth in hand.",
    limits="An upper bound on every adversary who ignores the update and hands back an image of the null part.",
)
METRICS.add(
    "null_noise",
    Metric("psnr, ssim and asr of an image that uses no update", "neither", "cell"),
    summary="What uniform noise scores.",
)
METRICS.add(
    "gain_psnr",
    Metric("decibel", "higher", "cell"),
    summary="Mean PSNR minus the best null baseline's mean PSNR on the same images.",
)
METRICS.add(
    "gain_ssim",
    Metric("-2 to 2", "higher", "cell"),
    summary="Mean SSIM minus the best null baseline's mean SSIM on the same images.",
)
METRICS.add(
    "utility_balanced_accuracy",
    Metric("share, 0 to 1", "neither", "cell"),
    summary="Mean share of each class that a model trained under the cell's defense recognizes on held-out images; of "
    "several labels the mean of sensitivity and specificity.",
    limits="Of a federation trained from the pool's training images, by the spec's `utility`. Guessing gives 1 / classes.",
)
METRICS.add(
    "utility_auc",
    Metric("share, 0 to 1", "neither", "cell"),
    summary="Area under the ROC curve of the same model, each class against the rest, mean over classes.",
    limits="Guessing gives 0.5.",
)
METRICS.add(
    "legacy_ssim",
    Metric("depends on the convention; may be NaN", "neither", "image"),
    summary="SSIM as the attack's source paper computed it (range 0, 1 or 255), for reproduction only.",
    paper=_MEDPFL,
    limits="Not comparable between attacks: with range 255 on normalized images pure noise scores about 0.9.",
)
METRICS.add(
    "legacy_mse",
    Metric("depends on the convention", "neither", "image"),
    summary="Mean squared error in the space in which the attack's source paper computed it, for reproduction only.",
    paper=_MEDPFL,
)
