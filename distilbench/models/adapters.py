"""Adapters on frozen weights, through peft: which modules they adapt."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distilbench.models.freezing import is_head, layer_list
from distilbench.models.resolve import ResolvedModel
from distilbench.settings import AdapterSettings, SettingsError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


def adapt(model: PreTrainedModel, settings: AdapterSettings, resolved: ResolvedModel, seed: int) -> PeftModel | None:
    """Add an adapter to ``model`` in place, and freeze all but adapter and head; return None for ``adapter.name=none``.

    Initial values depend only on ``seed``. Raises :class:`SettingsError` for layers whose modules can't be identified.
    """
    if settings.name == "none":
        return None
    from peft import get_peft_model

    model.name_or_path = resolved.settings.checkpoint  # the saved adapter names it as its base model
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses deprecated names of transformers
        torch.default_generator.manual_seed(seed)
        return get_peft_model(model, _CONFIGS[settings.name](model, settings))


def merge(adapted: PeftModel) -> PreTrainedModel:
    """Return the plain model of an adapted one, whose modules are changed in place."""
    model = adapted.get_base_model()
    for name, module in [*model.named_modules()]:
        if hasattr(module, "modules_to_save"):  # the head: beside IA3, peft can merge only one of a single module
            model.set_submodule(name, module.modules_to_save["default"])
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged


def _lora(model: PreTrainedModel, settings: AdapterSettings) -> PeftConfig:
    """Configure LoRA for queries and values, as in section 4.2 of Hu et al. (2021, arXiv 2106.09685)."""
    from peft import LoraConfig

    scale: dict[str, Any] = {"r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
    targets = [name for query, _, value, _ in _parts(model) for name in {query, value}]
    return LoraConfig(**scale, task_type="SEQ_CLS", target_modules=targets, modules_to_save=_head_modules(model))


def _ia3(model: PreTrainedModel, settings: AdapterSettings) -> PeftConfig:
    """Configure IA3 for keys, values and last feed-forward inputs (Liu et al., arXiv 2205.05638, section 3.3)."""
    from peft import IA3Config

    down = [last for *_, last in _parts(model)]
    targets = [name for _, key, value, _ in _parts(model) for name in {key, value}]
    return IA3Config(
        task_type="SEQ_CLS", target_modules=[*targets, *down], feedforward_modules=down,
        modules_to_save=_head_modules(model),
    )  # fmt: skip


_CONFIGS = {"lora": _lora, "ia3": _ia3}


def _head_modules(model: PreTrainedModel) -> list[str]:
    return sorted({name.partition(".")[0] for name, _ in model.named_parameters() if is_head(model, name)})


def _parts(model: PreTrainedModel) -> list[tuple[str, str, str, str]]:
    """Return each layer's names of the linear modules of query, key and value, and the last one of the feed-forward.

    They are identified by their order, the same in all encoders of Transformers: first three adjacent modules of one
    shape, or one module three times as wide for all three; the last module whose output is narrower than its input.
    """
    path, layers = layer_list(model)
    found = []
    for i, layer in enumerate(layers):
        prefix = ".".join([model.base_model_prefix, *path, str(i)])
        maps = [(f"{prefix}.{name}", part) for name, part in layer.named_modules() if isinstance(part, nn.Linear)]
        attention = _query_key_value(maps)
        down = [name for name, part in maps if part.in_features > part.out_features]
        if not attention or not down:
            raise SettingsError(
                f"adapter.name needs layers with linear maps for query, key and value, and a feed-forward part, got "
                f"{model.config.model_type}; use adapter=none"
            )
        found.append((*attention, down[-1]))
    return found


def _query_key_value(maps: list[tuple[str, nn.Linear]]) -> tuple[str, str, str] | None:
    for (one, a), (two, b), (three, c) in zip(maps, maps[1:], maps[2:], strict=False):
        side_by_side = len({name.rpartition(".")[0] for name in (one, two, three)}) == 1
        if side_by_side and a.weight.shape == b.weight.shape == c.weight.shape:
            return one, two, three
    return next(((name, name, name) for name, part in maps if part.out_features == 3 * part.in_features), None)
