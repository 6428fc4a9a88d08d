"""The toy text encoder: one fixed vector for each word, one sentence for each mistake."""

from __future__ import annotations

import pytest
import torch

from sfmodel.toy import world
from sfmodel.toy.text import VOCABULARY, ToyTextEncoder

encode = ToyTextEncoder()


def test_each_word_has_a_vector_of_its_own() -> None:
    assert len(set(VOCABULARY)) == len(VOCABULARY) <= encode.text_dim
    rows_VE = encode(VOCABULARY)[:, 0]
    torch.testing.assert_close(rows_VE @ rows_VE.T, torch.eye(len(VOCABULARY)))


def test_rows_follow_the_words_and_short_sentences_end_in_zeros() -> None:
    out_BLE = encode(["a red ball", "red"])
    assert out_BLE.shape == (2, 3, encode.text_dim)
    assert out_BLE.dtype == torch.float32
    torch.testing.assert_close(out_BLE[0, 1], out_BLE[1, 0])
    assert out_BLE[1, 1:].abs().max() == 0
    assert out_BLE[0].norm(dim=-1).tolist() == [1, 1, 1]


def test_case_and_punctuation_do_not_matter() -> None:
    assert torch.equal(encode(["A small, RED ball!"]), encode(["a small red ball"]))


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_the_empty_sentence_is_one_row_of_zeros(empty: str) -> None:
    assert torch.equal(encode([empty]), torch.zeros(1, 1, encode.text_dim))


def test_every_sentence_of_the_world_is_understood() -> None:
    truth = world.draw(2000, 1, seed=0)
    sentences = world.sentences(truth, drop=0.2, empty=0.1)
    said = {word for sentence in sentences for word in sentence.split()}
    assert said == set(VOCABULARY)
    assert encode(sentences).shape[1] <= encode.text_len


@pytest.mark.parametrize(
    ("sentence", "reason"),
    [
        ("a purple ball", "'purple'"),
        ("un ballon rouge", "'un', 'ballon', 'rouge'"),
        ("?!", "no word"),
        ("ball " * 17, "17 words"),
    ],
)
def test_a_sentence_it_cannot_read_names_the_words_it_knows(sentence: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        encode(["a ball", sentence])
    assert all(word in str(error.value) for word in VOCABULARY)


@pytest.mark.parametrize("wrong", ["a ball", []])
def test_sentences_must_be_a_list(wrong: str | list[str]) -> None:
    with pytest.raises(ValueError, match="list of at least one sentence"):
        encode(wrong)
