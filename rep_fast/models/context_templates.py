"""Short texts sampled from the model itself, put before a prompt so that a key is averaged over contexts.

ROME averages the key of a subject over such prefixes, REP trains on them (methods §2.1). A template is a text with
exactly one `{}`, the place of the prompt.
"""

from __future__ import annotations

import hashlib
import json
import logging
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

from rep_fast.cache_place import cache_root, readable_name
from rep_fast.errors import HparamError, OutputError
from rep_fast.safe_files import write_atomically

if TYPE_CHECKING:
    from rep_fast.models.editable_lm import EditableLM

logger = logging.getLogger(__name__)

SEED_WORDS = ("The", "Therefore", "Because", "I", "You")
BARE = "{}"
_TOP_K = 5
_RECIPE = 1  # part of the cache's key: raised when the same seed gives other texts
# style → (texts per seed word, length in tokens): "length" counts every token, BOS and seed word included
_GROUPS = {
    "rome": ((2, 5), (2, 10)),
    "memit": ((1, 10),),
    "wise": ((1, 5), (1, 10)),
    "rome-original": ((10, 5), (10, 10)),
}
# styles whose only seed is the end-of-text token
_SEEDED_BY_END = ("rome-original",)


def context_templates(
    lm: EditableLM, *, style: str = "rome", seed: int = 0, cache_dir: str | Path | None = None
) -> tuple[str, ...]:
    """Templates of one style, the bare `{}` first.

    Sampled by top-5 sampling from the unedited model, seeded by five words or the end-of-text token.

    Args:
        style: "rome" (21 templates: the bare one, ten of length 5, ten of length 10), "memit" (6: the bare one and
            five of length 10), "wise" (11: the bare one and five of each length) or "rome-original" (as "rome", all
            from the end-of-text token).
        seed: of the sampling; the same seed gives the same texts in every process.
        cache_dir: where they are kept, by model fingerprint, style and seed; default `$REP_FAST_CACHE`, else
            ~/.cache/rep_fast. A place that cannot be written is warned of: they are then drawn by every process.
    Raises:
        HparamError: unknown style, edits are active (templates belong to the unedited model), or the tokenizer has no
            end-of-text token to begin with.
    Cost: one short generation per template.
    """
    if style not in _GROUPS:
        raise HparamError(f"template style {style!r} is unknown; choose from {', '.join(_GROUPS)}")
    if lm.active_edits:
        raise HparamError("context templates are sampled from the unedited model; undo the active edits first")
    key = hashlib.sha256(f"{lm.fingerprint}/{style}/{seed}/{_RECIPE}".encode()).hexdigest()[:24]
    path = cache_root(cache_dir) / "templates" / f"{readable_name(lm.name)}-{style}-seed{seed}-{key}.json"
    stored = _stored(path)
    if stored is not None:
        return stored
    templates = (BARE, *(_sample(lm, word, length, seed, number) for word, length, number in _wanted(style)))
    try:
        write_atomically(path, json.dumps({"digest": _digest(templates), "templates": templates}, indent=1).encode())
    except OutputError as error:
        logger.warning("context templates are not kept (REP_FAST_CACHE or cache_dir says where): %s", error)
    return templates


def _stored(path: Path) -> tuple[str, ...] | None:
    """The templates of a cache file; None where there is none, or one that cannot be used."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        templates = tuple(content["templates"])
        if content["digest"] == _digest(templates):
            return templates
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        logger.warning(
            "cached context templates %s cannot be read (%s) and are drawn again", path, error.strerror or error
        )
        return None
    except (ValueError, KeyError, TypeError):
        pass
    logger.warning("cached context templates %s are damaged and are drawn again", path)
    return None


def _digest(templates: tuple[str, ...]) -> str:
    return hashlib.sha256(json.dumps(templates).encode()).hexdigest()


def _wanted(style: str) -> list[tuple[str, int, int]]:
    """Seed word ("" for the end of text), length and number of each text."""
    words = ("",) if style in _SEEDED_BY_END else SEED_WORDS
    return [(word, length, number) for count, length in _GROUPS[style] for word in words for number in range(count)]


def _sample(lm: EditableLM, word: str, length: int, seed: int, number: int) -> str:
    draw = int.from_bytes(hashlib.sha256(f"{seed}/{word}/{length}/{number}".encode()).digest()[:4], "little")
    seed_ids = lm.encode([word]).rows()[0] if word else [_end_of_text(lm)]
    new_tokens = max(1, length - len(seed_ids))
    return as_template(lm.generate(seed_ids, max_new_tokens=new_tokens, top_k=_TOP_K, seed=draw))


def _end_of_text(lm: EditableLM) -> int:
    if lm.tokenizer.eos_token_id is None:
        raise HparamError(f"the tokenizer of {lm.name} has no end-of-text token to begin with; use style 'rome'")
    return int(lm.tokenizer.eos_token_id)


def as_template(text: str) -> str:
    """A sampled text made into a template: normalised, braces deleted, closed by a full stop."""
    text = unicodedata.normalize("NFKD", text).replace("\n\n", " ").replace("{", "").replace("}", "").strip()
    return f"{text}. {BARE}"
