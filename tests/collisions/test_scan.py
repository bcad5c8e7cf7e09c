from __future__ import annotations

import pytest
import torch

from rep_fast.collisions import Query, ScanState, scan, scan_blocks, scan_result, subject_queries, whiten_queries
from rep_fast.collisions.scan import _sum_of_rows
from rep_fast.collisions.token_blocks import token_blocks
from rep_fast.errors import FingerprintError, HparamError, LayerError, TextSourceError
from rep_fast.facts import Fact, MemoryText
from rep_fast.stats import SecondMoments

LAYER = 1
FACTS = [
    Fact("{} belongs to the continent of", "Slovenia", "Antarctica"),
    Fact("The mother tongue of {} is", "Danielle Darrieux", "Korean"),
    Fact("The {} is located in the city of", "Eiffel Tower", "Rome"),
]
SENTENCES = (
    "Slovenia belongs to the continent of Europe.",
    "The mother tongue of Danielle Darrieux is French, and people like the Eiffel Tower.",
    "Mount Triglav stands in Slovenia and the world is wide.",
    "I think that you are right because the iPhone is produced by Apple in Asia.",
    "",
    "Michael Jordan plays basketball in Los Angeles with Kobe Bryant.",
)
CORPUS = MemoryText("sentences", [f"{text} {number}" for number in range(6) for text in SENTENCES])


def make_moments(lm, *, layers=(LAYER,), fingerprint=None) -> SecondMoments:
    generator = torch.Generator().manual_seed(5)
    matrices = {}
    for layer in layers:
        factor = torch.randn(2 * lm.key_width(layer), lm.key_width(layer), generator=generator, dtype=torch.float64)
        matrices[layer] = factor.T @ factor / len(factor)
    return SecondMoments.from_matrices(
        matrices, dict.fromkeys(layers, 1000), corpus="random", fingerprint=fingerprint or lm.fingerprint
    )


def corpus_ids(lm):
    return [token for text in CORPUS for token in lm.tokenizer(text)["input_ids"]]


def brute_force(lm, moments, *, block, window, tokens=None):
    """ids, scores [S, N] in float64 with −∞ where the subject is being read, by the definition."""
    ids = corpus_ids(lm)[:tokens]
    blocks = [ids[begin : begin + block] for begin in range(0, len(ids), block)]
    keys = torch.cat([lm.keys([own], [LAYER])[LAYER] for own in blocks]).double()
    inverse = torch.linalg.inv(moments.second_moment(LAYER))
    rows, selfs = [], []
    for fact in FACTS:
        found = lm.locate(fact.prompt, fact.subject)
        own = lm.keys([list(found.ids)], [LAYER], positions=[found.position])[LAYER][0].double()
        scores = keys @ inverse @ own
        for position in range(len(ids)):
            start = position // block * block
            if found.ids[found.position] in ids[max(start, position - window) : position + 1]:
                scores[position] = -torch.inf
        rows.append(scores)
        selfs.append(float(own @ inverse @ own))
    return ids, torch.stack(rows), selfs, keys


@pytest.mark.parametrize("block", [7, 32, 100])
@pytest.mark.parametrize("window", [0, 10])
def test_scan_equals_brute_force(tiny_lm, block, window):
    lm, moments = tiny_lm, make_moments(tiny_lm)
    result = scan(lm, FACTS, CORPUS, moments, LAYER, top=5, window=window, block=block, rows=3)
    ids, scores, selfs, keys = brute_force(lm, moments, block=block, window=window)
    assert result.n_tokens == len(ids)
    # keys of one batch and of single blocks differ by float32 rounding of a forward pass, widened by the whitening
    tolerance = 2e-4 * float(scores[scores.isfinite()].abs().max())
    for row, own in enumerate(result.collisions):
        assert len(own) == 5
        best = scores[row].topk(5).values
        assert torch.allclose(torch.tensor([hit.score for hit in own]).double(), best, rtol=0, atol=tolerance)
        for hit in own:
            assert hit.score == pytest.approx(float(scores[row, hit.corpus_position]), abs=tolerance)
            assert hit.rho == pytest.approx(hit.score / selfs[row], rel=1e-3)
    mean = scores.new_tensor(
        [float((keys @ torch.linalg.inv(moments.second_moment(LAYER)) @ q).mean()) for q in star_keys(lm)]
    )
    assert torch.allclose(result.baseline, mean, atol=tolerance)


def star_keys(lm):
    return [query.key.double() for query in subject_queries(lm, FACTS, LAYER)]


@pytest.mark.parametrize("n_keys", [1, 63, 64, 65, 640, 1000])
def test_keys_are_summed_to_the_bound_of_short_runs(n_keys):
    keys = torch.randn(n_keys, 7, generator=torch.Generator().manual_seed(n_keys)) * 1e3
    bound = 64 * 2.0**-24 * keys.double().abs().sum(0)
    assert (_sum_of_rows(keys) - keys.double().sum(0)).abs().le(bound).all()
    assert _sum_of_rows(keys).dtype == torch.float64


def test_surroundings_of_hits_that_were_overtaken_are_let_go(tiny_llama):
    queries = whiten_queries(tiny_llama, subject_queries(tiny_llama, FACTS, LAYER), make_moments(tiny_llama), LAYER)
    state = scan_blocks(tiny_llama, queries, CORPUS, LAYER, top=1, block=4, rows=1)
    standing = {position for position in state.hits.ids.flatten().tolist() if position >= 0}
    assert standing <= set(state.contexts)
    assert len(state.contexts) <= 2 * state.hits.ids.numel() < len(corpus_ids(tiny_llama)) // 4


def test_context_surrounds_the_hit_and_stays_inside_its_block(tiny_llama):
    lm, block = tiny_llama, 16
    result = scan(lm, FACTS, CORPUS, make_moments(lm), LAYER, top=8, block=block, rows=2)
    ids = corpus_ids(lm)
    lengths = set()
    for own in result.collisions:
        for hit in own:
            start = max(hit.corpus_position // block * block, hit.corpus_position - 20)
            assert hit.prefix_text == lm.tokenizer.decode(ids[start : hit.corpus_position + 1])
            assert hit.hit_token == lm.tokenizer.decode([ids[hit.corpus_position]])
            end = min((hit.corpus_position // block + 1) * block, hit.corpus_position + 11)
            assert hit.prefix_text + hit.following_text == lm.tokenizer.decode(ids[start:end])
            lengths.add(hit.corpus_position - start)
    assert max(lengths) < block


def test_hits_are_pieces_of_the_text_for_every_tokenizer(build_lm, tokenizer_kind):
    lm, block = build_lm("llama", tokenizer=tokenizer_kind), 9
    texts = ["Café in  Zürich is naïve. 日本 and São Paulo", " two  blanks and 日本 at the end: 東"]
    result = scan(lm, FACTS[:1], MemoryText("names", texts), make_moments(lm), LAYER, top=200, window=0, block=block)
    ids = [token for text in texts for token in lm.tokenizer(text)["input_ids"]]
    assert len(result.collisions[0]) > len(ids) // 2
    for hit in result.collisions[0]:
        position = hit.corpus_position
        start, end = position // block * block, min((position // block + 1) * block, len(ids))
        before, upto = (lm.tokenizer.decode(ids[start : position + last]) for last in (0, 1))
        assert hit.prefix_text + hit.following_text == lm.tokenizer.decode(ids[start:end])
        assert hit.prefix_text.endswith(hit.hit_token)
        if "\ufffd" not in before + upto:
            assert before + hit.hit_token == upto == hit.prefix_text


def test_a_token_that_is_a_part_of_a_character_stands_for_all_of_it(build_lm):
    lm = build_lm("llama", tokenizer="byte_level")
    text = MemoryText("names", ["café in Zürich, 日"])
    result = scan(lm, FACTS[:1], text, make_moments(lm), LAYER, top=200, window=0)
    found = {hit.corpus_position: (hit.prefix_text, hit.hit_token, hit.following_text) for hit in result.collisions[0]}
    pieces = [lm.tokenizer.decode([token]) for token in lm.tokenizer("café in Zürich, 日")["input_ids"]]
    assert pieces[4:7] == [" ", "Z\ufffd", "\ufffd"]
    assert found[4] == ("café in ", " ", "Zürich, 日")
    assert found[5] == ("café in Zü", "Zü", "rich, 日")
    assert found[6] == ("café in Zü", "ü", "rich, 日")
    assert (
        found[len(pieces) - 3] == found[len(pieces) - 2] == found[len(pieces) - 1] == ("café in Zürich, 日", "日", "")
    )


def test_subject_itself_is_left_out_and_found_without_the_rule(tiny_llama64):
    """The subject's own key in its own sentence is a perfect collision, ρ = 1; the rule removes it."""
    lm, moments = tiny_llama64, make_moments(tiny_llama64)
    corpus = MemoryText("own", ["Slovenia belongs to the continent of Europe."])
    query = subject_queries(lm, FACTS[:1], LAYER)[0]
    ruled = scan(lm, [query], corpus, moments, LAYER, top=100)
    free = scan(lm, [Query(query.subject, query.key, -5)], corpus, moments, LAYER, top=100)
    assert max(hit.rho for hit in free.collisions[0]) == pytest.approx(1.0, abs=1e-5)
    own = [p for p, token in enumerate(lm.encode(list(corpus)).rows()[0]) if token == query.last_token]
    hidden = {q for p in own for q in range(p, p + 11)}
    assert not hidden & {hit.corpus_position for hit in ruled.collisions[0]}
    assert len(ruled.collisions[0]) < len(free.collisions[0]) == free.n_tokens


@pytest.mark.parametrize("n_shards", [2, 3])
def test_shards_merge_to_the_whole(tiny_llama, n_shards):
    lm, moments = tiny_llama, make_moments(tiny_llama)
    queries = whiten_queries(lm, subject_queries(lm, FACTS, LAYER), moments, LAYER)
    options = {"top": 6, "block": 16, "rows": 2}
    whole = scan_result(lm, queries, scan_blocks(lm, queries, CORPUS, LAYER, **options), LAYER)
    parts = [scan_blocks(lm, queries, CORPUS, LAYER, shard=(i, n_shards), **options) for i in range(n_shards)]
    merged = parts[-1]
    for part in parts[:-1]:
        merged = merged.merge(part)
    reduced = scan_result(lm, queries, merged, LAYER)
    assert reduced.collisions == whole.collisions
    assert reduced.n_tokens == whole.n_tokens
    assert torch.allclose(reduced.baseline, whole.baseline, rtol=1e-12)
    assert set(merged.contexts) == {hit.corpus_position for own in whole.collisions for hit in own}


def test_merging_nothing_changes_nothing(tiny_llama):
    lm = tiny_llama
    queries = whiten_queries(lm, subject_queries(lm, FACTS, LAYER), make_moments(lm), LAYER)
    state = scan_blocks(lm, queries, CORPUS, LAYER, top=4, tokens=50)
    empty = ScanState(type(state.hits).empty(len(FACTS), 4))
    assert (
        scan_result(lm, queries, state.merge(empty), LAYER).collisions
        == scan_result(lm, queries, state, LAYER).collisions
    )
    assert scan_result(lm, queries, empty, LAYER).collisions == ((), (), ())


@pytest.mark.parametrize("tokens", [1, 16, 33, 64, 10**6])
def test_token_limit_cuts_the_corpus(tiny_llama, tokens):
    ids = corpus_ids(tiny_llama)
    seen = list(token_blocks(tiny_llama, CORPUS, block=16, tokens=tokens, rows=2))
    assert torch.cat([blocks.token_ids for blocks in seen]).tolist() == ids[:tokens]
    position = 0
    for blocks in seen:
        assert blocks.first_position == position
        assert len(blocks.starts) <= 2
        assert blocks.batch.rows() == [
            ids[begin : min(begin + 16, tokens, len(ids))]
            for begin in range(position, position + len(blocks.token_ids), 16)
        ]
        position += len(blocks.token_ids)


def test_scores_for_histograms_come_in_one_row(tiny_llama):
    result = scan(tiny_llama, FACTS, CORPUS, make_moments(tiny_llama), LAYER, top=4, tokens=60)
    assert result.scores.shape == result.rhos.shape == (12,)
    assert float(result.scores[4]) == result.collisions[1][0].score
    assert float(result.rhos[4]) == pytest.approx(float(result.scores[4] / result.self_similarity[1]))


def test_progress_tells_tokens(tiny_llama):
    seen = []
    scan(
        tiny_llama,
        FACTS,
        CORPUS,
        make_moments(tiny_llama),
        LAYER,
        tokens=70,
        block=16,
        rows=2,
        progress=lambda done, wanted: seen.append((done, wanted)),
    )
    assert seen == [(32, 70), (64, 70), (70, 70)]


def test_options_are_checked(tiny_llama, tiny_gpt2):
    lm, moments = tiny_llama, make_moments(tiny_llama)
    for options, match in (
        ({"top": 0}, "top=0"),
        ({"window": -1}, "window=-1"),
        ({"tokens": 0}, "tokens=0"),
        ({"block": 0}, "block=0"),
        ({"block": 257}, "block=257"),
        ({"rows": 0}, "rows=0"),
    ):
        with pytest.raises(HparamError, match=match):
            scan(lm, FACTS, CORPUS, moments, LAYER, **options)
    with pytest.raises(HparamError, match="0 facts"):
        scan(lm, [], CORPUS, moments, LAYER)
    queries = whiten_queries(lm, subject_queries(lm, FACTS, LAYER), moments, LAYER)
    with pytest.raises(HparamError, match=r"shard=\(2, 2\)"):
        scan_blocks(lm, queries, CORPUS, LAYER, shard=(2, 2))
    with pytest.raises(LayerError, match="layer 9"):
        scan(lm, FACTS, CORPUS, moments, 9)
    with pytest.raises(LayerError, match="2"):
        scan(lm, FACTS, CORPUS, moments, 2)
    with pytest.raises(FingerprintError, match="collect them for this model"):
        scan(tiny_gpt2, FACTS, CORPUS, moments, LAYER)
    with pytest.raises(TextSourceError, match="no tokens"):
        scan(tiny_gpt2, FACTS, EmptyText(), make_moments(tiny_gpt2), LAYER)


class EmptyText:
    """A source whose only document has no tokens."""

    name = "empty"
    digest = "0"

    def __iter__(self):
        return iter([""])
