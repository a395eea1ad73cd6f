"""Depth -> the parameters of the frozen prefix."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import nn
from transformers import PreTrainedModel

from distilbench.settings import FreezeSettings, SettingsError, require


def frozen_names(model: PreTrainedModel, settings: FreezeSettings) -> frozenset[str]:
    """Return the names, as in ``model.named_parameters()``, of the parameters that stay as they were.

    The encoder is read from its structure, not from its class: its layers are the module list as long as the
    configuration says, and the embeddings are the modules that come before that list (with ELECTRA's and ALBERT's
    projections). Raises :class:`SettingsError` for a depth the model lacks, layers that share their weights (ALBERT),
    or a structure that can't be read.
    """
    frozen = {id(p) for module in _frozen_modules(model, settings) for p in module.parameters()}
    return frozenset(name for name, p in model.named_parameters() if id(p) in frozen)


def freeze(model: PreTrainedModel, settings: FreezeSettings) -> None:
    """Keep the prefix as it is, in place: its parameters get no gradient.

    With ``settings.dropout`` false, it also stays in evaluation mode whatever ``model.train()`` is called with, by a
    ``train`` method on the frozen modules themselves: Trainer calls ``model.train()`` in every step, so a mode set once
    would not last. Copies and pickles of the model keep it.
    """
    names = frozen_names(model, settings)
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
    if not settings.dropout:
        for module in _frozen_modules(model, settings):
            module.eval()
            module.train = partial(_stay_in_evaluation, module)  # type: ignore[method-assign]


def _stay_in_evaluation(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stand in for ``module.train``."""
    return module


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters are trained, and how many there are."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _frozen_modules(model: PreTrainedModel, settings: FreezeSettings) -> list[nn.Module]:
    """The embeddings' modules, where they are frozen, and the first ``settings.layers`` layers, from the input up."""
    if not settings.layers and not settings.freezes_embeddings:
        return []
    name = model.config.model_type
    require(
        settings.layers == 0 or not hasattr(model.config, "num_hidden_groups"),
        "freeze.layers",
        f"0 for {name}",
        settings.layers,
        "its layers share one set of weights, so the lower ones can't be frozen alone",
    )
    path, layers = layer_list(model)
    require(settings.layers <= len(layers), "freeze.layers", f"0..{len(layers)} for {name}", settings.layers)
    embeddings = list(modules_before(model.base_model, path)) if settings.freezes_embeddings else []
    return [*embeddings, *layers[: settings.layers]]


def layer_list(model: PreTrainedModel) -> tuple[list[str], nn.ModuleList]:
    """The encoder's layers and the path of names that leads to them from the base model.

    Lists inside a list that was found (a layer's own) don't count; two lists side by side (an encoder and a decoder)
    are ambiguous.
    """
    config = model.config
    length = getattr(config, "num_hidden_groups", getattr(config, "num_hidden_layers", None))
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.base_model.named_modules():
        outermost = not any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == length and outermost:
            found[name] = module
    if len(found) != 1:
        raise SettingsError(
            f"freeze.layers and freeze.embeddings need an encoder with one list of {length} layers, got {len(found)} "
            f"in {config.model_type}; use freeze=none or another model"
        )
    [(name, layers)] = found.items()
    return name.split("."), layers


def modules_before(base: nn.Module, path: list[str]) -> Iterator[nn.Module]:
    """What stands before the layer list, at every level on the way down to it."""
    module = base
    for name in path:
        for child_name, child in module.named_children():
            if child_name == name:
                module = child
                break
            yield child
