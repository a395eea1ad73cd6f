"""Classify texts with a saved model: a trial's, or any Transformers directory with a classification head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from distilbench.cli import pluralize
from distilbench.models.build import load_tokenizer, load_weights, silence_transformers
from distilbench.models.padding import set_padding
from distilbench.models.resolve import resolve_model
from distilbench.settings import ModelSettings, SettingsError, require

LONGEST = 512
"""Maximum number of tokens of a text if neither the tokenizer nor the model's positions limit it."""


@dataclass(frozen=True)
class Classifier:
    """A model in evaluation mode, with what its directory says about its texts.

    ``trained_on`` is what a trial has written to config.json: ``text_column``, ``pair_column``, ``hub_name`` and
    ``hub_config``, each of which may be None; empty for other models.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    label_names: tuple[str, ...]
    max_length: int
    trained_on: dict[str, str | None]

    @property
    def columns(self) -> list[str]:
        """The column of the texts and, if it was trained on pairs, of the second texts."""
        pair = self.trained_on.get("pair_column")
        return [self.trained_on.get("text_column") or "text", *([pair] if pair else [])]

    def predict(self, model_input: pandas.DataFrame, params: object = None) -> pandas.DataFrame:
        """Return :meth:`predict_texts` for the rows of a frame with :attr:`columns`, as MLflow expects."""
        rows = model_input[self.columns].itertuples(index=False, name=None)
        return self.predict_texts([tuple(text if isinstance(text, str) else None for text in row) for row in rows])

    def predict_texts(self, texts: Sequence[tuple[str | None, ...]], batch_size: int = 64) -> pandas.DataFrame:
        """Return ``prediction`` and ``probability_<label>`` for each label, one row per text, missing for blank texts.

        Each of ``texts`` holds one text, or the two of a pair. Texts of similar length share a batch.
        """
        asked = [i for i, row in enumerate(texts) if all(text and not text.isspace() for text in row)]
        columns = [list(column) for column in zip(*(texts[i] for i in asked), strict=True)]
        rows = self.tokenizer(*columns, truncation=True, max_length=self.max_length) if asked else {"input_ids": []}
        lengths = [len(ids) for ids in rows["input_ids"]]  # 0 if a tokenizer without special tokens knows no character
        order = sorted(np.flatnonzero(lengths).tolist(), key=lengths.__getitem__, reverse=True)
        found = np.full((len(texts), len(self.label_names)), np.nan, dtype=np.float32)  # (texts, labels)
        labels = np.full(len(texts), None, dtype=object)
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = {name: [values[i] for i in chosen] for name, values in rows.items()}
                inputs = self.tokenizer.pad(batch, return_tensors="pt").to(self.model.device)  # (chosen, longest)
                own = self.model(**inputs).logits.float().softmax(dim=1).cpu().numpy()  # (chosen, labels)
                places = [asked[i] for i in chosen]
                found[places], labels[places] = own, np.array(self.label_names, dtype=object)[own.argmax(axis=1)]
        frame = pandas.DataFrame(found, columns=[f"probability_{name}" for name in self.label_names])
        frame.insert(0, "prediction", pandas.Series(labels, dtype="object"))
        return frame


def load_classifier(directory: Path, device: torch.device | str) -> Classifier:
    """Load a model for prediction; raises :class:`SettingsError` if ``directory`` has no trained classifier."""
    try:
        resolved = resolve_model(ModelSettings("local", str(directory)))
        tokenizer = load_tokenizer(resolved)
        with silence_transformers():
            model, lacking = load_weights(resolved)
        set_padding(model, tokenizer.pad_token_id, resolved.used)
    except SettingsError as error:
        raise SettingsError(str(error).replace("model.checkpoint", "dir", 1)) from None
    require(not lacking, "dir", "a model with a trained classification head", str(directory),
            f"missing are {pluralize(len(lacking), 'weight')}, such as {min(lacking, default='')}; fine-tune it first: "
            "python -m distilbench.train model=local model.checkpoint=...")  # fmt: skip
    config: Any = model.config
    own = getattr(config, "distilbench", None)
    bounds = (tokenizer.model_max_length, resolved.max_tokens or LONGEST)
    names = tuple(str(name) for _, name in sorted(config.id2label.items()))
    single = getattr(config, "problem_type", None) in (None, "single_label_classification")
    require(single and len(set(names)) == len(names) > 1, "dir",
            "a model that gives each text one of several labels, named apart", str(directory))  # fmt: skip
    return Classifier(model.eval().to(device), tokenizer, names, min(bounds), own if isinstance(own, dict) else {})


def _load_pyfunc(directory: str) -> Classifier:
    """Load a model for MLflow's python_function flavor; this needs only the modules imported above."""
    return load_classifier(Path(directory), "cuda" if torch.cuda.is_available() else "cpu")
