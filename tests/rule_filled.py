"""Fills state_dicts for parity tests by a rule, so that no weights need to be stored."""

import zlib

import torch
from torch import nn


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill(module: nn.Module) -> nn.Module:
    """Fill each entry of the state_dict, seeded by the checksum of its name; return the module in eval mode."""
    state = {}
    for name, tensor in module.state_dict().items():
        g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if not tensor.is_floating_point():
            state[name] = _kept_channels(module, name, tensor, g)
        elif name.endswith("running_var"):
            state[name] = 0.5 + torch.rand(tensor.shape, generator=g)
        elif tensor.dim() >= 2:
            state[name] = torch.randn(tensor.shape, generator=g) / (tensor.numel() / tensor.shape[0]) ** 0.5
        elif name.endswith("weight"):
            state[name] = 1 + 0.1 * torch.randn(tensor.shape, generator=g)
        else:
            state[name] = 0.1 * torch.randn(tensor.shape, generator=g)
    module.load_state_dict(state)
    return module.eval()


def _kept_channels(module: nn.Module, name: str, tensor: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    if not name.startswith("afs.indexes."):
        return tensor
    layer = name.rpartition("_")[2]
    return torch.randperm(module.backbone.channels[layer], generator=g)[: len(tensor)].sort().values


def names_and_shapes(module: nn.Module) -> list[list]:
    return [[name, list(tensor.shape)] for name, tensor in module.state_dict().items()]


def relative_error(got: torch.Tensor, expected) -> float:
    expected = torch.as_tensor(expected).double()
    return float((got.double() - expected).abs().max() / expected.abs().max())
