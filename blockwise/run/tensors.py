"""Tensors as the bytes of a safetensors file, one at a time; the library itself wants all of them in memory."""

from collections.abc import Iterator

import torch

from blockwise.run import files

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def content_of(tensors: dict[str, torch.Tensor]) -> Iterator:
    """Yields the header and then the bytes of each tensor, for files.write."""
    yield files.tensor_header({name: (NAMES[tensor.dtype], list(tensor.shape)) for name, tensor in tensors.items()})
    for tensor in tensors.values():
        yield tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
