"""Freeze parts of an encoder: the parts are found by its structure, not its class; each policy is a function."""

from __future__ import annotations

from functools import partial

from torch import nn
from transformers import PreTrainedModel

from distilbench.settings import FreezeSettings, SettingsError


def parameter_levels(model: PreTrainedModel) -> dict[str, int]:
    """Return the level of each of ``model.named_parameters()``, counted from the input.

    Level 0 is the embeddings (with ELECTRA's and ALBERT's projections), ``i + 1`` is encoder layer ``i``, and the last
    level is what follows the last layer: a final norm, a pooler, the head. Raises as :func:`layer_list`.
    """
    _, layers = layer_list(model)
    level_of = {id(parameter): 0 for module in embedding_modules(model) for parameter in module.parameters()}
    for level, layer in enumerate(layers, start=1):
        for parameter in layer.parameters():
            level_of.setdefault(id(parameter), level)
    return {name: level_of.get(id(p), len(layers) + 1) for name, p in model.named_parameters()}


def is_head(model: PreTrainedModel, name: str) -> bool:
    """Return whether a parameter belongs to the classifier: it is outside the base model (a pooler is inside)."""
    return not name.startswith(f"{model.base_model_prefix}.")


def embedding_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules before the layers, then what all layers read beside them; raises as :func:`layer_list`.

    That is MPNet's or DeBERTa's table of relative positions, and DeBERTa's norm of it.
    """
    before: list[nn.Module] = []
    module = model.base_model
    for step in layer_list(model)[0]:
        children = dict(module.named_children())
        before += list(children.values())[: list(children).index(step)]
        module = children[step]
    tables = [children[name] for name in ("relative_attention_bias", "rel_embeddings") if name in children]
    norms = [children["LayerNorm"]] if "rel_embeddings" in children and "LayerNorm" in children else []
    return [*before, *tables, *norms]


def layer_list(model: PreTrainedModel) -> tuple[list[str], nn.ModuleList]:
    """Return the path of names from the base model to the encoder's layers, and the layers.

    The layers are the module list of the length given in the configuration. Lists nested inside it don't count. Raises
    :class:`SettingsError` if there is none, or more than one (an encoder and a decoder).
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
            f"freeze, adapter and optim.layer_decay need an encoder with one list of {length} layers, got {len(found)} "
            f"in {config.model_type}; use freeze=none or another model"
        )
    [(name, layers)] = found.items()
    return name.split("."), layers


def frozen_names(model: PreTrainedModel, settings: FreezeSettings) -> frozenset[str]:
    """Return the names, as in ``model.named_parameters()``, of the parameters that are frozen throughout.

    ``settings`` must have passed :func:`~distilbench.models.resolve.check_trial`. Raises as :func:`layer_list`.
    """
    return frozenset() if settings.is_dynamic else frozenset(_POLICIES[settings.policy](model, settings))


def _below_depth(model: PreTrainedModel, settings: FreezeSettings) -> set[str]:
    """Return the names frozen by ``depth``: the first layers, and the embeddings as set by ``freeze.embeddings``."""
    frozen = {id(parameter) for module in _frozen_modules(model, settings) for parameter in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in frozen}


def _all_but_head(model: PreTrainedModel, settings: FreezeSettings) -> set[str]:
    """Return the names frozen by ``head``: all but the head, which includes DistilBERT's ``pre_classifier``."""
    return {name for name, _ in model.named_parameters() if not is_head(model, name)}


def _all_but_biases(model: PreTrainedModel, settings: FreezeSettings) -> set[str]:
    """Return all names but those of biases and head (``bias``; BitFit: Ben Zaken et al., 2022, arXiv 2106.10199)."""
    return {name for name in _all_but_head(model, settings) if not name.endswith("bias")}


_POLICIES = {"depth": _below_depth, "head": _all_but_head, "bias": _all_but_biases}
"""Functions by ``freeze.policy`` that return what is frozen throughout; the other policies change it in training."""


def freeze(model: PreTrainedModel, settings: FreezeSettings) -> None:
    """Freeze parameters of ``model`` in place.

    With ``settings.dropout`` false, frozen modules also stay in evaluation mode. Since Trainer calls ``model.train()``
    in every step, their ``train`` method is replaced; copies and pickles of the model keep the replacement.
    """
    names = frozen_names(model, settings)
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
    if not settings.dropout:
        for module in _frozen_modules(model, settings):
            module.eval()
            module.train = partial(_keep_eval_mode, module)  # type: ignore[method-assign]


def _frozen_modules(model: PreTrainedModel, settings: FreezeSettings) -> list[nn.Module]:
    """Return the modules that are frozen throughout."""
    if settings.policy == "head":
        return [model.base_model]
    if not settings.layers and not settings.freezes_embeddings:
        return []
    embeddings = embedding_modules(model) if settings.freezes_embeddings else []
    return [*embeddings, *layer_list(model)[1][: settings.layers]]


def _keep_eval_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    """Replace ``module.train`` without changing the mode."""
    return module


def freeze_levels(model: PreTrainedModel, count: int) -> None:
    """Freeze the lowest ``count`` levels of :func:`parameter_levels` in place, and unfreeze the others."""
    level_of = parameter_levels(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(level_of[name] >= count)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Return the number of trained and of all parameters; a head that an adapter has copied counts once."""
    sizes = [(p.numel(), p.requires_grad) for name, p in model.named_parameters() if ".original_module." not in name]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
