"""Name the parts of DistilBERT's and BERT's encoders, so that one implementation serves both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_DISTILBERT = {
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

_BERT = {
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
    """What the forward pass needs to know beside the weights; rates are those of dropout."""

    names: Mapping[str, str]
    depth: int
    heads: int
    head_size: int
    eps: float
    activation: str
    head_activation: str
    embedding_rate: float
    attention_rate: float
    attention_output_rate: float
    output_rate: float
    head_rate: float

    @classmethod
    def of(cls, config: Any) -> Architecture:
        """Read a Hugging Face configuration of type distilbert or bert."""
        return _distilbert(config) if config.model_type == "distilbert" else _bert(config)

    def leaves(self) -> dict[str, tuple[str, ...]]:
        """Name the weights of the stacked model, with those of the Hugging Face model that lie side by side in each.

        The last layer keeps its query apart, for it is asked for [CLS] alone.
        """
        tables = [table for table in TABLES if table in self.names]
        leaves: dict[str, tuple[str, ...]] = {table: (f"{self.names[table]}.weight",) for table in tables}
        self._add(leaves, "embedding_norm", self.names["embedding_norm"])
        for i in range(self.depth):
            layer = f"{self.names['layer']}.{i}."
            for joined in ("q", "kv") if i == self.depth - 1 else ("qkv",):
                self._add(leaves, f"{i}.{joined}", *(layer + self.names[piece] for piece in joined))
            for part in ("out", "attention_norm", "up", "down", "output_norm"):
                self._add(leaves, f"{i}.{part}", layer + self.names[part])
        for part in ("dense", "classifier"):
            self._add(leaves, part, self.names[part])
        return leaves

    @staticmethod
    def _add(leaves: dict[str, tuple[str, ...]], leaf: str, *modules: str) -> None:
        for kind in ("weight", "bias"):
            leaves[f"{leaf}.{kind}"] = tuple(f"{module}.{kind}" for module in modules)


def _distilbert(config: Any) -> Architecture:
    return Architecture(
        names=_DISTILBERT,
        depth=config.n_layers,
        heads=config.n_heads,
        head_size=config.dim // config.n_heads,
        eps=1e-12,
        activation=config.activation,
        head_activation="relu",
        embedding_rate=config.dropout,
        attention_rate=config.attention_dropout,
        attention_output_rate=0.0,
        output_rate=config.dropout,
        head_rate=config.seq_classif_dropout,
    )


def _bert(config: Any) -> Architecture:
    head_rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
    return Architecture(
        names=_BERT,
        depth=config.num_hidden_layers,
        heads=config.num_attention_heads,
        head_size=config.hidden_size // config.num_attention_heads,
        eps=config.layer_norm_eps,
        activation=config.hidden_act,
        head_activation="tanh",
        embedding_rate=config.hidden_dropout_prob,
        attention_rate=config.attention_probs_dropout_prob,
        attention_output_rate=config.hidden_dropout_prob,
        output_rate=config.hidden_dropout_prob,
        head_rate=head_rate,
    )
