"""Copy the state of a training into memory, from where it is written while training goes on."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from infra.training.marker import Dtype
from infra.training.parallel import own_part, takes_turn

DTYPES: dict[Dtype, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

SIZE_BYTES = 8  # of a header's size, with which a file begins
NUMBER = 20  # digits and a comma of an offset or a size in a header


class Staging:
    """Copies of tensors in one buffer on the CPU, which is laid out as a safetensors file and reused.

    The buffer is pinned if the tensors are on CUDA. Written as it is, without another copy: safetensors' own `save`
    makes two, and keeps Python, and so the training, from running meanwhile.
    """

    def __init__(self) -> None:
        self._layout: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._copies: dict[str, Tensor] = {}
        self._file = torch.empty(0, dtype=torch.uint8)
        self._header = 0

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors, of a DTensor this rank's part; the copies of the last call are overwritten."""
        parts = {name: own_part(tensor).detach() for name, tensor in tensors.items()}
        is_cuda = any(part.is_cuda for part in parts.values())
        layout = {name: (part.shape, part.dtype) for name, part in parts.items()}
        if layout != self._layout:
            self._allocate(parts, is_pinned=is_cuda)
            self._layout = layout
        for name, part in parts.items():
            self._copies[name].copy_(part, non_blocking=True)
        if is_cuda:
            torch.cuda.current_stream().synchronize()

    def file(self, keys: Mapping[str, str]) -> memoryview:
        """Return the copies as a safetensors file, valid until the next copy.

        Args:
            keys: under which key each tensor is stored; those without elements may be left out.
        """
        header, end = {}, 0
        for name, copied in self._copies.items():
            start, end = end, end + copied.nbytes
            if name in keys or copied.nbytes:
                entry = {"dtype": NAMES[copied.dtype], "shape": list(copied.shape), "data_offsets": [start, end]}
                header[keys[name]] = entry
        text = json.dumps(header).encode().ljust(self._header)
        beginning = bytearray(self._header.to_bytes(SIZE_BYTES, "little") + text)
        self._file[: len(beginning)] = torch.frombuffer(beginning, dtype=torch.uint8)
        return self._file.numpy().data

    def _allocate(self, parts: Mapping[str, Tensor], *, is_pinned: bool) -> None:
        self._copies, self._file = {}, torch.empty(0, dtype=torch.uint8)  # freed before the next ones are there
        names = sorted(parts, key=lambda name: (-parts[name].element_size(), name))  # so that all are aligned
        entries = [len(json.dumps(name)) + NUMBER * (2 * parts[name].ndim + 2) + 60 for name in names]
        self._header = 8 + -(-sum(entries) // 8) * 8
        end = SIZE_BYTES + self._header
        # One allocation, since that of pinned memory is rounded up to a power of two.
        self._file = torch.empty(end + sum(p.nbytes for p in parts.values()), dtype=torch.uint8, pin_memory=is_pinned)
        for name in names:
            part, start = parts[name], end
            end += part.nbytes
            self._copies[name] = self._file[start:end].view(part.dtype).view(part.shape)


def share_out(tensors: Mapping[str, Tensor], rank: int, size: int) -> list[str]:
    """Return the names of the tensors that a rank writes: its shards, and a share of what several ranks have alike."""
    names, loads = [], [0] * size
    for turn, name in enumerate(sorted(tensors, key=lambda name: (-tensors[name].nbytes, name))):
        is_own = takes_turn(tensors[name], turn)
        if is_own is None:  # all ranks have it
            least = loads.index(min(loads))
            loads[least] += tensors[name].nbytes
            is_own = least == rank
        if is_own:
            names.append(name)
    return names
