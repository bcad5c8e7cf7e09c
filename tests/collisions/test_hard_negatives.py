from __future__ import annotations

import pytest
import torch

from rep_fast.collisions import CorpusSample, hard_negatives, subject_queries, whiten_queries
from rep_fast.errors import HparamError, LayerError
from rep_fast.facts import Fact, MemoryText
from rep_fast.stats import SecondMoments

LAYER = 1
FACTS = [
    Fact("{} belongs to the continent of", "Slovenia", "Antarctica"),
    Fact("The mother tongue of {} is", "Danielle Darrieux", "Korean"),
]
CORPUS = MemoryText(
    "words", [f"Slovenia and the Republic of Zürich {n} belongs to Paris. People like {n}" for n in range(20)]
)


@pytest.fixture(scope="module")
def sample(tiny_llama):
    return CorpusSample.collect(tiny_llama, CORPUS, LAYER, tokens=300, block=32, rows=4)


@pytest.fixture(scope="module")
def queries(tiny_llama):
    width = tiny_llama.key_width(LAYER)
    generator = torch.Generator().manual_seed(3)
    factor = torch.randn(3 * width, width, generator=generator, dtype=torch.float64)
    moments = SecondMoments.from_matrices(
        {LAYER: factor.T @ factor / len(factor)}, {LAYER: 500}, corpus="random", fingerprint=tiny_llama.fingerprint
    )
    return whiten_queries(tiny_llama, subject_queries(tiny_llama, FACTS, LAYER), moments, LAYER)


def allowed(sample, queries, row, *, max_rho, window):
    """Scores by definition, −∞ where the rule or the limit forbids."""
    scores = sample.keys.double() @ queries.whitened[row].double()
    starts = sample.starts.tolist()
    for position in range(len(scores)):
        begin = max(start for start in starts if start <= position)
        if queries.last_tokens[row] in sample.token_ids[max(begin, position - window) : position + 1]:
            scores[position] = -torch.inf
    return scores.masked_fill(scores >= max_rho * queries.self_similarity[row], -torch.inf)


def test_sample_holds_the_corpus_in_blocks(sample, tiny_llama):
    assert sample.keys.shape == (300, tiny_llama.key_width(LAYER))
    assert sample.starts.tolist() == list(range(0, 300, 32))
    row = sample.token_ids[64:96].tolist()
    alone = tiny_llama.keys([row], [LAYER])[LAYER]
    assert torch.allclose(sample.keys[64:96], alone, atol=1e-4)


@pytest.mark.parametrize("n", [1, 7, 64, 1000])
@pytest.mark.parametrize("max_rho", [0.9, 0.05])
def test_hard_negatives_are_the_best_allowed_keys(sample, queries, n, max_rho):
    found = hard_negatives(sample, queries, n=n, max_rho=max_rho, window=3)
    for row, keys in enumerate(found):
        scores = allowed(sample, queries, row, max_rho=max_rho, window=3)
        best = scores.topk(min(n, 300)).values
        best = best[best > -torch.inf]
        assert torch.allclose(keys.double() @ queries.whitened[row].double(), best, rtol=1e-12)


def test_limit_bites_in_these_data(sample, queries):
    """The cases above with max_rho = 0.05 must look past forbidden keys."""
    counts = [(allowed(sample, queries, row, max_rho=0.05, window=3) == -torch.inf).sum() for row in range(2)]
    assert all(int(count) > 64 for count in counts)


def test_keys_as_good_as_the_edit_are_not_negatives(sample, queries):
    keys = sample.keys.clone()
    same = subject_key = torch.linalg.lstsq(queries.whitened[:1].double(), queries.self_similarity[:1]).solution
    keys[100] = same.float()
    planted = CorpusSample(LAYER, keys, sample.token_ids, sample.starts)
    found = hard_negatives(planted, queries, n=20, window=0)[0]
    assert not bool((found == subject_key.float()).all(1).any())


def test_random_keys_are_different_and_repeatable(sample):
    first, again, other = sample.random(50, seed=1), sample.random(50, seed=1), sample.random(50, seed=2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert sample.random(10**6, seed=0).shape == sample.keys.shape


def test_options_are_checked(tiny_llama, sample, queries):
    for options, match in (({"n": 0}, "n=0"), ({"max_rho": 0.0}, r"max_rho=0\.0")):
        with pytest.raises(HparamError, match=match):
            hard_negatives(sample, queries, **options)
    with pytest.raises(LayerError, match="layer 7"):
        CorpusSample.collect(tiny_llama, CORPUS, 7)
