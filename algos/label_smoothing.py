"""Label smoothing (Szegedy 2016, arXiv 1512.00567): a share of each target spread over all classes.

Shapes: N samples, K classes.
"""

from __future__ import annotations

from torch import Tensor

from .framework.base import Contract, Event, Logger, Resource, SpeedUp, State
from .framework.batches import IGNORE_INDEX, check_num_classes, count_classes, soften, split_batch


def smooth_labels(
    targets: Tensor, *, smoothing: float, num_classes: int | None = None, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Probabilities [N, K]: (1 - smoothing) · y + smoothing / K, with y the one-hot or soft targets.

    This is the convention of torch.nn.functional.cross_entropy(label_smoothing=...); the true class gets
    1 - smoothing + smoothing / K. A row keeps its sum (smoothing / K is multiplied by it), so the map is linear:
    smoothing before or after mixing samples gives the same targets.

    targets: class indices [N] of an integer type, or probabilities [N, K]; they are not changed.
    smoothing: share of a row that is spread over all classes, in [0, 1].
    num_classes: K; needed for indices only.
    ignore_index: an index that marks a sample without a label. Its row is all zero and adds nothing to a soft cross
        entropy's sum; a mean over N still counts the sample, while PyTorch's mean over indices leaves it out. Binary
        cross entropy treats the row as "none of the classes".

    Returns floating-point [N, K]: torch.get_default_dtype() for indices, the targets' own dtype for probabilities.
    Raises ValueError for a smoothing outside [0, 1] and for targets of neither form.

    Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision", section 7.
    """
    _check_smoothing(smoothing)
    probabilities = soften(targets, num_classes=num_classes, ignore_index=ignore_index)
    spread = probabilities.sum(dim=1, keepdim=True) * (smoothing / probabilities.shape[1])
    return probabilities * (1 - smoothing) + spread


class LabelSmoothing(SpeedUp):
    """Smooths the targets of every training batch; evaluation uses the true ones.

    smoothing: share of each target that is spread over all classes, in [0, 1].
    num_classes: classes; None reads the model's `num_classes`.

    Acts once per device batch, on all of it, after any mixing of samples.
    """

    contract = Contract(owns=[Resource.SMOOTHING], writes=[Resource.TARGETS], after=[Resource.MIXING])
    events = (Event.BATCH_START,)

    def __init__(self, *, smoothing: float = 0.1, num_classes: int | None = None) -> None:
        _check_smoothing(smoothing)
        check_num_classes(num_classes)
        self.smoothing = smoothing
        self.num_classes = num_classes

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Replace the batch's targets."""
        images, targets = split_batch(state.batch)
        num_classes = count_classes(state.model, num_classes=self.num_classes)
        state.batch = (images, smooth_labels(targets, smoothing=self.smoothing, num_classes=num_classes))


def _check_smoothing(smoothing: float) -> None:
    if not 0 <= smoothing <= 1:
        raise ValueError(
            f"smoothing {smoothing} must lie in [0, 1]; 0.1 is usual, and 0 leaves the targets as they are"
        )
