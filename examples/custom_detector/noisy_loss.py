"""A detector of one's own: is the training loss mostly noise?"""

from __future__ import annotations

import numpy as np

from layerwatch.monitor.detectors import History, Unjudged, detector
from layerwatch.monitor.findings import Finding

LOSSES = 50  # the last so many are judged
NOISY = 0.5  # noise over level


@detector("noisy_loss")
def noisy_loss(history: History) -> Finding | None:
    """The last 50 training losses swing by half of their level and more.

    Noise is the robust standard deviation of the differences of neighbours, so that a trend is no noise; it
    is divided by the median loss, so that the scale of the loss does not matter.
    """
    steps, losses = history.train_loss
    if losses.size < LOSSES:
        raise Unjudged(f"fewer than {LOSSES} training losses were logged")  # becomes a note
    last = losses[-LOSSES:]
    level = abs(float(np.median(last)))
    noise = 1.4826 * float(np.median(np.abs(np.diff(last)))) / 2**0.5
    if not noise >= NOISY * level > 0:
        return None
    return history.finding(
        "noisy_loss",
        "warning",
        f"The training loss is mostly noise: it swings by {noise:.3g} around {level:.3g}.",
        first=steps[-LOSSES],
        evidence={"noise_over_level": noise / level, "threshold": NOISY},
        advice="Average over larger batches, or lower the learning rate.",
    )
