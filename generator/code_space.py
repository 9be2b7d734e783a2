"""What the codes of a dataset are like, as every generator needs to know it.

Shapes: B sequences, N codes a sequence.
"""

from typing import NamedTuple

from torch import Tensor


class CodeSpace(NamedTuple):
    """Vocabulary, length and classes of a code dataset; without classes everything is of the null class."""

    codebook_size: int
    num_tokens: int
    num_classes: int

    @property
    def null_class(self) -> int:
        """The class id that stands for no class."""
        return self.num_classes

    def check_classes(self, class_B: Tensor) -> None:
        """Refuse class ids that are neither classes nor the null class.

        Raises:
            ValueError: naming the first such id.
        """
        wrong = class_B[(class_B < 0) | (class_B > self.null_class)]
        if len(wrong):
            raise ValueError(f"class id {int(wrong[0])} is not in [0, {self.null_class}] ({self.null_class}: no class)")
