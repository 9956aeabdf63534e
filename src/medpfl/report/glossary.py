"""What the numbers mean, in words for readers who do not work with them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """A word of the report and its meaning."""

    word: str
    meaning: str


def glossary(threshold: float) -> tuple[Term, ...]:
    """The terms of the report, with the audit's own threshold."""
    return (
        Term(
            "Reconstructed, ASR",
            f"Attack success rate: share of all private images whose reconstruction has an SSIM of at least "
            f"{threshold:g}. Images of failed cases and of cases that a guard stopped count as not reconstructed.",
        ),
        Term(
            "SSIM",
            "Structural similarity of reconstruction and private image, from -1 to 1; 1 is an exact copy. Computed "
            "on images in [0, 1] with range 1, a Gaussian window of 11 pixels (sigma 1.5), K 0.01 and 0.03, "
            "population covariance, borders of half a window cropped, mean over color channels. In volumes the window is a cube, so a volume "
            "counts as one image; its picture shows up to 16 of its slices in rows.",
        ),
        Term(
            "PSNR",
            "Peak signal-to-noise ratio in decibel (dB) of images in [0, 1]: higher is closer. An exact copy has "
            "100 dB, because the error is floored at 1e-10. Ten decibel more are a tenth of the squared error.",
        ),
        Term(
            "Above 30 dB, recovered",
            "Recovery rate: share of all private images whose reconstruction has a PSNR above 30 dB, counted as the success "
            "rate is. Some papers count 18 dB as recovered, which pictures of other patients often reach.",
        ),
        Term("MSE", "Mean squared error over pixels and color channels of images in [0, 1]: lower is closer."),
        Term(
            "Null baselines",
            "Pictures that owe nothing to any update, scored in the same way. Most similar other image: the picture "
            "of the pool with the lowest squared error, chosen with the truth in hand, so an upper bound on "
            "somebody who merely hands over a picture. Class mean: the mean of the pool's images of the true class. "
            "Noise: uniform noise. A reconstruction that scores no better than these shows nothing that the update "
            "gave away.",
        ),
        Term(
            "Gain",
            "Mean PSNR (or SSIM) minus that of the best null baseline on the same images.",
        ),
        Term(
            "Intervals",
            "95% intervals that resample victims, because images of one victim are not independent. Where all "
            "images succeeded or none did, the interval of the rate is the exact binomial one. One victim has no "
            "interval.",
        ),
        Term(
            "Assignment",
            "Where a victim holds several images, reconstructions are assigned to them so that the summed squared "
            "error is least. A private image for which nothing came back is scored against the adversary's best "
            "guess without an update: the mean of its auxiliary images, or mid-grey.",
        ),
        Term(
            "Oracle",
            "Knowledge that a real adversary would not have, such as the true labels. Results with it are upper "
            "bounds; they are marked, and not counted in the answer.",
        ),
        Term(
            "Label accuracy",
            "Share of the labels that the attack inferred from the update and that are right, among the images for "
            "which it inferred one.",
        ),
        Term(
            "Mask, Dice",
            "A segmentation model is trained with masks, a class for every pixel. An attack that does not know them "
            "searches them with the image. Mask Dice is 2 |A and B| / (|A| + |B|) of the mask that it found and the true "
            "one, from 0 to 1, mean over the classes that either has, without the background; 1 where both are empty.",
        ),
        Term(
            "Utility, balanced accuracy, AUC",
            "What a model is worth that a federation trained under the same defense, on held-out images of the pool. "
            "Balanced accuracy: the share of each class that is recognized, mean over classes; guessing gives 1 / classes. "
            "AUC: the share of pairs of an image inside and one outside a class that are in the right order, mean over "
            "classes; guessing gives 0.5. Their 95% intervals resample the federations, which differ in their seed, and the "
            "held-out images, by patient where patients are known. Differences are of the same seeds and images.",
        ),
        Term(
            "Dominated, recommended",
            "A setting is dominated where another one leaks no more and its model is worth no less. Recommended is the "
            "setting with the highest AUC of those whose whole interval of leakage stays on the right side of the limit.",
        ),
        Term("Evaluations", "Gradient computations that the attack spent on all cases of a cell, restarts included."),
        Term(
            "Legacy SSIM, legacy MSE",
            "For reproduction only: the scores by the convention of the code behind each attack's paper. CPL and "
            "iDLG: SSIM with dynamic range 0, so without stabilizers, on images that are not clamped. DLG: range 1 "
            "after a passage through 8-bit numbers, in which values outside [0, 1] wrap around. GradInv: range 255 "
            "on images that are normalized by mean and standard deviation, which brings nearly any picture close to "
            "1, noise included. These numbers cannot be compared between attacks and say nothing about privacy.",
        ),
    )


LIMITS = (
    "The attacks are the ones listed in the spec, with the budgets listed there. Another attack, a larger budget or "
    "more knowledge can reconstruct more.",
    "Numbers belong to the audited images, sizes, models, weights and settings. Other images, a later round or "
    "another batch-norm mode can change them in either direction.",
    "SSIM and PSNR measure closeness of pixels. They do not say whether a person could be recognized, or whether a "
    "finding could be read, from a picture below the threshold.",
    "Small images, a batch of one image and untrained weights are easier to attack than most practice; they give "
    "upper bounds. A trained model, larger batches and several local steps should be audited as they will be used.",
)
"""What an audit cannot show."""
