"""Read the embeddings and the layers of an encoder from its structure, not from its class."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from distilbench.settings import SettingsError


def levels(model: PreTrainedModel) -> dict[str, int]:
    """Return how far from the input each of ``model.named_parameters()`` stands.

    0 are the embeddings (with ELECTRA's and ALBERT's projections), ``i + 1`` is encoder layer ``i``, and what follows
    the last layer comes last: a final norm, a pooler, the head. Raises as :func:`layer_list`.
    """
    parts = [*embedding_modules(model), *layer_list(model)[1]]
    layers = len(layer_list(model)[1])
    level_of: dict[int, int] = {}
    for number, module in enumerate(parts, start=1 - (len(parts) - layers)):
        for parameter in module.parameters():
            level_of.setdefault(id(parameter), max(0, number))
    return {name: level_of.get(id(p), layers + 1) for name, p in model.named_parameters()}


def is_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a parameter belongs to the classifier: it stands outside the base model (a pooler stands within)."""
    return not name.startswith(f"{model.base_model_prefix}.")


def embedding_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules that come before the layers, from the input up; raises as :func:`layer_list`."""
    before: list[nn.Module] = []
    module = model.base_model
    for step in layer_list(model)[0]:
        names = [name for name, _ in module.named_children()]
        before += list(module.children())[: names.index(step)]
        module = module.get_submodule(step)
    return before


def layer_list(model: PreTrainedModel) -> tuple[list[str], nn.ModuleList]:
    """Return the encoder's layers, after the path of names that leads to them from the base model.

    They are the module list as long as the configuration says. Lists inside a list that was found (a layer's own) don't
    count; two lists side by side (an encoder and a decoder) are ambiguous. Raises :class:`SettingsError` for those.
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
