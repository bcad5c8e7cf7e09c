"""Facts, evaluation cases, their files, and the perturbations an edit should survive. Plain data, no torch."""

from __future__ import annotations

from rep_fast.facts.case import EditCase, RephraseCounts, count_rephrases
from rep_fast.facts.case_file import CaseFile, SkippedRecord, read_cases, write_cases
from rep_fast.facts.fact import Fact, Sided
from rep_fast.facts.perturb import PerturbedCase, SubjectPrompt, long_contexts, perturb, shuffled_subjects
from rep_fast.facts.text_source import DatasetText, FileText, MemoryText, SampledText, TextSource, open_text

__all__ = [
    "CaseFile",
    "DatasetText",
    "EditCase",
    "Fact",
    "FileText",
    "MemoryText",
    "PerturbedCase",
    "RephraseCounts",
    "SampledText",
    "Sided",
    "SkippedRecord",
    "SubjectPrompt",
    "TextSource",
    "count_rephrases",
    "long_contexts",
    "open_text",
    "perturb",
    "read_cases",
    "shuffled_subjects",
    "write_cases",
]
