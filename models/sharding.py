"""Which parts of a network are gathered and freed together when its weights are sharded over ranks.

A unit's weights are gathered only for its forward and backward pass, so the largest unit determines the memory of the
gathered weights, and each unit costs one round of communication. Each transformer block is a unit; so is each stage
of a residual network, whose single blocks are too small to be worth a round.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def sharding_units(network: nn.Module) -> list[nn.Module]:
    """The modules of `network` to shard one by one, in order; weights outside of them are sharded with the root.

    A unit is a transformer block (a module with an attention among its children) or a residual stage (an nn.Sequential
    of blocks of one class). A network with neither is split at the top level: into its children with weights, but a
    large container into its own children. Units never nest. The list is empty when there is nothing to split.
    """
    return list(_blocks_and_stages(network)) or list(_top_level(network))


def _blocks_and_stages(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if _is_transformer_block(child) or _is_residual_stage(child):
            yield child
        else:
            yield from _blocks_and_stages(child)


def _is_transformer_block(module: nn.Module) -> bool:
    return not _is_container(module) and any(_is_attention(child) for child in module.children())


def _is_attention(module: nn.Module) -> bool:
    # By name: torch's, torchvision's, timm's and Hugging Face's have no common base class.
    return any(cls.__name__.endswith("Attention") for cls in type(module).__mro__)


def _is_residual_stage(module: nn.Module) -> bool:
    blocks = list(module.children())
    of_one_class = isinstance(module, nn.Sequential) and len({type(block) for block in blocks}) == 1
    return of_one_class and not _is_torchs(type(blocks[0])) and not any(map(_is_transformer_block, blocks))


def _top_level(network: nn.Module) -> Iterator[nn.Module]:
    """For AlexNet, `features` and each layer of `classifier`: a unit of half the weights would save little."""
    whole = _count(network)
    for child in network.children():
        if isinstance(child, nn.Sequential) and _count(child) * 2 > whole:
            yield from filter(_can_be_unit, child)
        elif _can_be_unit(child):
            yield child


def _can_be_unit(module: nn.Module) -> bool:
    # FSDP refuses lists and dictionaries: they are usually never called, and the call triggers gathering.
    return _count(module) > 0 and not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))


def _is_torchs(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "torch"
