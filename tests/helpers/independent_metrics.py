"""Independent implementations of metrics, to compare with."""

import scipy.ndimage


def ssim_by_scipy(one, two):
    """Wang et al. 2004 with a Gaussian of 1.5, images mirrored at their edges."""
    one, two = one.double().numpy(), two.double().numpy()

    def blurred(image):
        return scipy.ndimage.gaussian_filter(
            image, (0, 0, 1.5, 1.5), mode="mirror", radius=(0, 0, 5, 5)
        )

    mean1, mean2 = blurred(one), blurred(two)
    var1, var2 = blurred(one**2) - mean1**2, blurred(two**2) - mean2**2
    both = blurred(one * two) - mean1 * mean2
    top = (2 * mean1 * mean2 + 0.01**2) * (2 * both + 0.03**2)
    value = top / ((mean1**2 + mean2**2 + 0.01**2) * (var1 + var2 + 0.03**2))
    return value.mean()
