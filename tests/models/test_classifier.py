"""Predicting with a saved model: which texts get an answer."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from distilbench.models.classifier import Classifier


def test_a_text_without_a_token_gets_no_answer_like_a_blank_one():
    letters = Tokenizer(
        BPE({"[PAD]": 0, "a": 1, "b": 2}, [])
    )  # without special tokens, and without one for the unknown
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="[PAD]")
    sizes = {"hidden_size": 4, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 4}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=3, **sizes)).eval()
    classifier = Classifier(model, tokenizer, ("bad", "good"), 8, {})
    answers = classifier.predict_texts([("?!",), ("ab",), (" ",), (None,), ("b",)])
    assert answers["prediction"].isna().tolist() == [True, False, True, True, False]
    assert answers["probability_good"].isna().tolist() == [True, False, True, True, False]
    torch.testing.assert_close(
        torch.tensor(answers["probability_good"].dropna().tolist()),
        torch.tensor([classifier.predict_texts([(text,)])["probability_good"][0] for text in ("ab", "b")]),
    )
