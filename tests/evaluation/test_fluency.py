"""Fluency and consistency against values worked out by hand, and the texts they are measured on."""

from __future__ import annotations

import dataclasses
import json
import math
import sys

import pytest
import torch
from example_cases import PROTOCOL, TEXT, make_cases, random_edit

from rep_fast.errors import (
    HparamError,
    MissingDependencyError,
    MissingFileError,
    PromptError,
    RecordError,
    RunMismatchError,
)
from rep_fast.evaluation import evaluate_single, read_references
from rep_fast.evaluation.fluency import (
    References,
    fluency,
    generation_prompts,
    ngram_entropy,
    word_tokenizer,
    write_text,
)

SHORT = dataclasses.replace(PROTOCOL, generated_tokens=24)


def test_entropies_of_a_text_worked_out_by_hand():
    """T-fluency. "a b a b c": bigrams ab ba ab bc (2/4, 1/4, 1/4), trigrams aba bab abc (1/3 each)."""
    words = "a b a b c".split()
    assert ngram_entropy(words, 2) == pytest.approx(1.5)
    assert ngram_entropy(words, 3) == pytest.approx(math.log2(3))
    assert fluency(words) == pytest.approx((2 / 3 * 1.5 + 4 / 3 * math.log2(3)) / 2)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("so so so so so so", 0.0),  # repetition: one n-gram only
        ("", 0.0),
        ("one", 0.0),
        ("one two", 0.0),
        ("one two three", 1 / 3),  # two bigrams, one trigram
        ("a b c d e f", math.log2(5) / 3 + 2 * math.log2(4) / 3),  # all n-grams different
    ],
)
def test_fluency_of_short_and_repeated_texts(text, value):
    assert fluency(text.split()) == pytest.approx(value)


def test_words_are_nltks_without_its_data():
    pytest.importorskip("nltk", reason="nltk is not installed")
    words = word_tokenizer()("Slovenia isn't in Asia, is it? (No.)")
    assert words == ["Slovenia", "is", "n't", "in", "Asia", ",", "is", "it", "?", "(", "No", ".", ")"]
    # a full stop inside the text ends a sentence and is a word; without a trained splitter it is one in "Mr." too
    words = word_tokenizer()("It is in Asia. Kobe isn't. 3.5 of Mr. Smith")
    assert words == ["It", "is", "in", "Asia", ".", "Kobe", "is", "n't", ".", "3.5", "of", "Mr", ".", "Smith"]
    assert word_tokenizer()("") == []


def test_without_nltk_the_remedy_is_named(monkeypatch, tiny_llama):
    monkeypatch.setitem(sys.modules, "nltk.tokenize", None)
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "rep-fast\[metrics\]"'):
        evaluate_single(tiny_llama, make_cases(1), {"none": lambda case, seed: pytest.fail("edited")}, protocol=SHORT)


def test_consistency_is_the_cosine_of_tf_idf_vectors():
    """By hand: of 2 references ice is in both (weight 1 + ln 3/3), cold in one (1 + ln 3/2), hot in none (1 + ln 3)."""
    references = References({"Antarctica": ["Ice, cold ICE a"], "Asia": ["ice land"]})
    ice, cold, hot = 1.0, 1 + math.log(1.5), 1 + math.log(3)
    found = references.consistency("Antarctica", ["cold hot", "ice"])
    norms = math.sqrt((2 * ice) ** 2 + cold**2) * math.sqrt(ice**2 + cold**2 + hot**2)
    assert found == pytest.approx((2 * ice * ice + cold * cold) / norms)
    assert references.consistency("Antarctica", ["cold ice ice"]) == pytest.approx(1.0)
    assert references.consistency("Antarctica", ["x"]) == 0.0
    assert references.consistency("Europe", ["ice"]) is None
    with pytest.raises(HparamError, match="no reference texts"):
        References({"Asia": []})


def test_texts_are_written_by_the_edited_model_and_repeat(tiny_llama64):
    lm, case = tiny_llama64, make_cases(1)[0]
    (prompt,) = generation_prompts(lm, case, seed=3, n_tokens=24)
    clean = write_text(lm, prompt, n_tokens=24)
    assert clean == write_text(lm, prompt, n_tokens=24)
    assert clean.startswith(case.fact.text)
    assert clean == lm.decode(
        lm.generate_ids(case.fact.text, max_new_tokens=24 - len(prompt.ids), top_k=5, seed=prompt.seed)
    )
    with random_edit(lm, case, 0).applied(lm):
        assert write_text(lm, prompt, n_tokens=24) != clean
    (other,) = generation_prompts(lm, case, seed=4, n_tokens=24)
    assert other.seed != prompt.seed
    # a prompt that is long enough by itself is left as it is
    assert write_text(lm, prompt, n_tokens=3) == case.fact.text


def test_a_record_brings_its_own_generation_prompts(tiny_llama64):
    case = dataclasses.replace(make_cases(1)[0], extra={"generation_prompts": ["Slovenia lies", "Go to Slovenia"]})
    prompts = generation_prompts(tiny_llama64, case, seed=0, n_tokens=24)
    assert [prompt.kind for prompt in prompts] == ["prompt", "generation", "generation"]
    assert len({prompt.seed for prompt in prompts}) == 3
    broken = dataclasses.replace(case, extra={"generation_prompts": "Slovenia lies"})
    with pytest.raises(PromptError, match="must be a list of texts, got 'Slovenia lies'"):
        generation_prompts(tiny_llama64, broken, seed=0, n_tokens=24)


def test_a_run_writes_texts_only_when_asked(tiny_llama64, tmp_path):
    pytest.importorskip("nltk", reason="nltk is not installed")
    lm, cases = tiny_llama64, make_cases(2)
    cases[1] = dataclasses.replace(cases[1], extra={"generation_prompts": ["Slovenia lies"]})
    columns = {"random": lambda case, seed: random_edit(lm, case, seed)}
    plain = evaluate_single(lm, cases, columns, seeds=(0,), text=TEXT, protocol=PROTOCOL)
    references = {"Antarctica": ["Antarctica is a continent of ice"]}
    options = {"seeds": (0,), "text": TEXT, "protocol": SHORT, "references": references, "out_dir": tmp_path / "run"}
    summary = evaluate_single(lm, cases, columns, **options)
    assert not {"fluency", "consistency"} & set(plain["random"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    words = word_tokenizer()
    values = [fluency(words(line["generated"][0]["text"])) for line in lines]
    cell = summary["random"]["fluency"]
    assert (cell.mean, cell.n, cell.protocol) == (pytest.approx(100 * sum(values) / 2), 2, "REP")
    assert summary["random"]["generation_fluency"].n == 1
    assert 0.0 <= summary["random"]["consistency"].mean <= 100.0
    assert [len(line["generated"]) for line in lines] == [1, 2]
    # the scores beside them are the same
    assert {name: cell for name, cell in summary["random"].items() if name in plain["random"]} == plain["random"]
    assert evaluate_single(lm, cases, columns, resume=True, **options).cells == summary.cells
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings.pop("fluency_words") == "per sentence"
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(RunMismatchError, match=" fluency_words="):
        evaluate_single(lm, cases, columns, resume=True, **options)


def test_references_are_read_from_a_file(tmp_path):
    path = tmp_path / "references.json"
    with pytest.raises(MissingFileError, match=r"references\.json"):
        read_references(path)
    for content, told in (
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ('{"Asia": "ice"}', "references of 'Asia' must be a list of texts, got 'ice'"),
    ):
        path.write_text(content)
        with pytest.raises(RecordError, match=told):
            read_references(path)
    path.write_text('{"Asia": ["ice"]}')
    assert read_references(path) == {"Asia": ["ice"]}


def test_nothing_is_drawn_from_the_global_generator(tiny_llama):
    (prompt,) = generation_prompts(tiny_llama, make_cases(1)[0], seed=0, n_tokens=16)
    state = torch.random.get_rng_state()
    write_text(tiny_llama, prompt, n_tokens=16)
    assert torch.equal(torch.random.get_rng_state(), state)
