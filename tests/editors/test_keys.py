"""Keys of a batch: two-level averages, shared rows, reading upwards."""

from __future__ import annotations

import pytest
import torch

from rep_fast.editors.keys import KeyReader, LookupRows
from rep_fast.facts import Fact
from rep_fast.models import EditableLM, Site

TEMPLATES = ("{}", "I think that. {}", "Because of this, they went. {}")
FACTS = (
    Fact("{} belongs to the continent of", "Slovenia", "Antarctica"),
    Fact("The mother tongue of {} is", "Danielle Darrieux", "Korean"),
    Fact("{} is in", "Slovenia", "Africa"),
)


def test_rows_end_with_the_subject_and_run_once(tiny_llama64: EditableLM) -> None:
    rows = LookupRows.of(tiny_llama64, FACTS, TEMPLATES)
    assert (len(rows.bare), len(rows.prefixed)) == (2, 4)
    assert rows.row_of.tolist()[0] == rows.row_of.tolist()[2]
    all_rows = rows.bare + rows.prefixed
    for fact, numbers in zip(FACTS, rows.row_of.tolist(), strict=True):
        for template, number in zip(TEMPLATES, numbers, strict=True):
            located = tiny_llama64.locate(template.replace("{}", fact.prompt), fact.subject)
            assert all_rows[number] == located.ids[: located.position + 1]


@pytest.mark.parametrize("templates", [TEMPLATES, TEMPLATES[:1], TEMPLATES[:2]])
def test_keys_are_averaged_in_two_levels(tiny_lm64: EditableLM, templates: tuple[str, ...]) -> None:
    """T-key-2level: ½ k({}) + ½ mean k(prefix_j)."""
    site = Site("hidden", 2)
    keys, values = KeyReader(tiny_lm64, LookupRows.of(tiny_lm64, FACTS, templates)).read(1, site)
    for number, fact in enumerate(FACTS):
        found = [tiny_lm64.locate(template.replace("{}", fact.prompt), fact.subject) for template in templates]
        single = [tiny_lm64.keys([own.ids], [1], positions=[own.position])[1][0] for own in found]
        wanted = single[0]
        if len(single) > 1:
            wanted = 0.5 * single[0] + 0.5 * torch.stack(single[1:]).mean(dim=0)
        torch.testing.assert_close(keys[number], wanted, rtol=1e-10, atol=1e-10)
        stream = tiny_lm64.read([found[0].ids], [site])[site][0, found[0].position]
        torch.testing.assert_close(values[number], stream.detach(), rtol=1e-10, atol=1e-10)


def test_later_layers_see_what_was_changed_since(tiny_llama64: EditableLM) -> None:
    for kept in (0, 10**6):
        reader = KeyReader(tiny_llama64, LookupRows.of(tiny_llama64, FACTS, TEMPLATES), kept_tokens=kept)
        site = Site("value", 2)
        first, _ = reader.read(0, site)
        with tiny_llama64.patch(Site("value", 0), lambda value: 2 * value, per_token=True):
            second, value = reader.read(1, site)
            fresh = KeyReader(tiny_llama64, LookupRows.of(tiny_llama64, FACTS, TEMPLATES))
            wanted, wanted_value = fresh.read(1, site)
        torch.testing.assert_close(second, wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(value, wanted_value, rtol=1e-10, atol=1e-10)
        assert float((first - second).norm()) > 1e-3
