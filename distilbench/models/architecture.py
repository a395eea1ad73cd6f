"""Module names of DistilBERT and BERT, to share one implementation and to convert BERT into DistilBERT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DISTILBERT = {
    "word": "distilbert.embeddings.word_embeddings",
    "position": "distilbert.embeddings.position_embeddings",
    "embedding_norm": "distilbert.embeddings.LayerNorm",
    "layer": "distilbert.transformer.layer",
    "q": "attention.q_lin",
    "k": "attention.k_lin",
    "v": "attention.v_lin",
    "out": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "up": "ffn.lin1",
    "down": "ffn.lin2",
    "output_norm": "output_layer_norm",
    "dense": "pre_classifier",
    "classifier": "classifier",
}

BERT = {
    "word": "bert.embeddings.word_embeddings",
    "position": "bert.embeddings.position_embeddings",
    "type": "bert.embeddings.token_type_embeddings",
    "embedding_norm": "bert.embeddings.LayerNorm",
    "layer": "bert.encoder.layer",
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "output_norm": "output.LayerNorm",
    "dense": "bert.pooler.dense",
    "classifier": "classifier",
}

TABLES = ("word", "position", "type")


@dataclass(frozen=True)
class Architecture:
    """What the forward pass needs besides the weights; the rates are dropout rates."""

    names: Mapping[str, str]
    depth: int
    heads: int
    head_size: int
    eps: float
    activation: str
    head_activation: str
    hidden_rate: float
    attention_rate: float
    attention_output_rate: float
    head_rate: float

    @classmethod
    def of(cls, config: Any) -> Architecture:
        """Read a Hugging Face configuration of type distilbert or bert."""
        depth, heads = config.num_hidden_layers, config.num_attention_heads
        size = depth, heads, config.hidden_size // heads
        if config.model_type == "distilbert":
            rates = config.dropout, config.attention_dropout, 0.0, config.seq_classif_dropout
            return cls(DISTILBERT, *size, 1e-12, config.activation, "relu", *rates)
        hidden, head = config.hidden_dropout_prob, config.classifier_dropout
        rates = hidden, config.attention_probs_dropout_prob, hidden, hidden if head is None else head
        return cls(BERT, *size, config.layer_norm_eps, config.hidden_act, "tanh", *rates)

    def parameter_names(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the stacked model's weights, each with those of the Hugging Face parameters it joins.

        The last layer's query is separate, because it is computed only for [CLS].
        """
        modules: dict[str, tuple[str, ...]] = {"embedding_norm": (self.names["embedding_norm"],)}
        for i in range(self.depth):
            layer = f"{self.names['layer']}.{i}."
            for joined in ("q", "kv") if i == self.depth - 1 else ("qkv",):
                modules[f"{i}.{joined}"] = tuple(layer + self.names[piece] for piece in joined)
            for part in ("out", "attention_norm", "up", "down", "output_norm"):
                modules[f"{i}.{part}"] = (layer + self.names[part],)
        modules |= {part: (self.names[part],) for part in ("dense", "classifier")}
        tables = {table: (f"{self.names[table]}.weight",) for table in TABLES if table in self.names}
        return tables | {
            f"{name}.{kind}": tuple(f"{module}.{kind}" for module in joined)
            for name, joined in modules.items()
            for kind in ("weight", "bias")
        }
