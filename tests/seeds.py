"""Random numbers on the device that tests run on."""

import torch


def generator(seed: int) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def reseed(seed: int) -> None:
    """What the default device draws from; the CPU alone where it is one, as the others take milliseconds."""
    (torch.default_generator if torch.get_default_device().type == "cpu" else torch).manual_seed(seed)
