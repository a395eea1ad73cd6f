"""Which parameters stay as they were: one function a policy, named in :data:`_POLICIES`."""

from __future__ import annotations

from functools import partial

from torch import nn
from transformers import PreTrainedModel

from distilbench.models.layers import embedding_modules, is_head, layer_list, levels
from distilbench.settings import FreezeSettings


def frozen_names(model: PreTrainedModel, settings: FreezeSettings) -> frozenset[str]:
    """Return the names, as in ``model.named_parameters()``, of the parameters that stay as they were.

    ``settings`` have passed :func:`~distilbench.models.resolve.check_trial`. Raises :class:`SettingsError` for a model
    whose structure can't be read.
    """
    return frozenset() if settings.moves else frozenset(_POLICIES[settings.policy](model, settings))


def _to_a_depth(model: PreTrainedModel, settings: FreezeSettings) -> set[str]:
    """``depth``: the first layers, and the embeddings as ``freeze.embeddings`` says."""
    if not settings.layers and not settings.freezes_embeddings:
        return set()
    frozen = range(0 if settings.freezes_embeddings else 1, settings.layers + 1)
    return {name for name, level in levels(model).items() if level in frozen}


def _all_but_head(model: PreTrainedModel, settings: FreezeSettings) -> set[str]:
    """``head``: the whole base model; the classifier trains alone, with DistilBERT's ``pre_classifier``."""
    return {name for name, _ in model.named_parameters() if not is_head(model, name)}


def _all_but_biases(model: PreTrainedModel, settings: FreezeSettings) -> set[str]:
    """``bias``: all but biases and the head (BitFit: Ben Zaken et al., 2022, arXiv 2106.10199)."""
    return {name for name in _all_but_head(model, settings) if not name.endswith("bias")}


_POLICIES = {"depth": _to_a_depth, "head": _all_but_head, "bias": _all_but_biases}
"""``freeze.policy`` -> what stays frozen; nothing does throughout with one that moves."""


def freeze(model: PreTrainedModel, settings: FreezeSettings) -> None:
    """Keep what is frozen as it is, in place: its parameters get no gradient.

    With ``settings.dropout`` false, it also stays in evaluation mode whatever ``model.train()`` is called with, by a
    ``train`` method on the frozen modules themselves: Trainer calls ``model.train()`` in every step, so a mode set once
    would not last. Copies and pickles of the model keep it.
    """
    names = frozen_names(model, settings)
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
    if not settings.dropout:
        for module in _deterministic_modules(model, settings):
            module.eval()
            module.train = partial(_stay_in_evaluation, module)  # type: ignore[method-assign]


def _deterministic_modules(model: PreTrainedModel, settings: FreezeSettings) -> list[nn.Module]:
    if settings.policy == "head":
        return [model.base_model]
    if not settings.layers and not settings.freezes_embeddings:
        return []
    embeddings = embedding_modules(model) if settings.freezes_embeddings else []
    return [*embeddings, *layer_list(model)[1][: settings.layers]]


def _stay_in_evaluation(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stand in for ``module.train``."""
    return module


def freeze_levels(model: PreTrainedModel, count: int) -> None:
    """Freeze the lowest ``count`` levels of :func:`~distilbench.models.layers.levels`, in place, and thaw the rest."""
    level_of = levels(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(level_of[name] >= count)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters are trained, and how many there are; an adapter's copy of the head counts once."""
    sizes = [(p.numel(), p.requires_grad) for name, p in model.named_parameters() if ".original_module." not in name]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
