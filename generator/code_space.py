"""Vocabulary, length and classes of a code dataset, as generators need them.

Shapes: B sequences, N codes per sequence.
"""

from typing import NamedTuple

from torch import Tensor


class CodeSpace(NamedTuple):
    """Vocabulary, length and classes of a code dataset; without classes every row is of the null class."""

    codebook_size: int
    num_tokens: int
    num_classes: int

    @property
    def null_class(self) -> int:
        """Return the class id that stands for no class."""
        return self.num_classes

    def check_classes(self, class_B: Tensor) -> None:
        """Check that class ids are classes or the null class.

        Raises:
            ValueError: an id is neither; names the first such id.
        """
        wrong = class_B[(class_B < 0) | (class_B > self.null_class)]
        if len(wrong):
            raise ValueError(f"class id {int(wrong[0])} is not in [0, {self.null_class}] ({self.null_class}: no class)")
