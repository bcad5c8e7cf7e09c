"""Nothing of other packages on the terminal, and their settings as they were afterwards."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator

import pytest
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from rep_fast.quiet_hub import no_weight_bars, quiet_hub


@pytest.fixture
def hub_lines() -> Iterator[list[str]]:
    """What the hub's client would print."""

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    lines: list[str] = []
    logger, handler = logging.getLogger("huggingface_hub"), Keeping()
    level = logger.level
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def bars_shown() -> Iterator[None]:
    """Progress bars as they are in a fresh process."""
    was = is_progress_bar_enabled()
    enable_progress_bar()
    yield
    (enable_progress_bar if was else disable_progress_bar)()


def test_retries_are_not_printed_and_errors_are(hub_lines: list[str]) -> None:
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)
    client = logging.getLogger("huggingface_hub.utils._http")
    with quiet_hub():
        client.warning("Retrying in 1s [Retry 1/5].")
        client.error("no space left")
    client.warning("afterwards")
    assert hub_lines == ["no space left", "afterwards"]


def test_who_asked_for_more_gets_it(hub_lines: list[str]) -> None:
    logging.getLogger("huggingface_hub").setLevel(logging.INFO)
    with quiet_hub():
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
    assert hub_lines == ["Retrying in 1s [Retry 1/5]."]


def test_levels_come_back_after_an_error() -> None:
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "urllib3")]
    before = [logger.level for logger in loggers]
    with pytest.raises(OSError, match="offline"), quiet_hub():
        raise OSError("offline")
    assert [logger.level for logger in loggers] == before


@pytest.mark.parametrize("hub_is_silent", [False, True])
def test_bars_of_weights_go_and_come_back(bars_shown: None, hub_is_silent: bool) -> None:
    (disable_progress_bars if hub_is_silent else enable_progress_bars)()
    with no_weight_bars():
        assert not is_progress_bar_enabled()
        assert are_progress_bars_disabled() == hub_is_silent
    assert is_progress_bar_enabled()
    assert are_progress_bars_disabled() == hub_is_silent
    enable_progress_bars()


@pytest.mark.parametrize("disabled", [False, True])
def test_the_environment_settles_the_bars_of_the_hub(
    bars_shown: None, monkeypatch: pytest.MonkeyPatch, disabled: bool
) -> None:
    """HF_HUB_DISABLE_PROGRESS_BARS=0 or 1, which the hub reads at its import."""
    enable_progress_bars()
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", disabled)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with no_weight_bars():
            assert not is_progress_bar_enabled()
            assert are_progress_bars_disabled() == disabled
    assert is_progress_bar_enabled()
    assert are_progress_bars_disabled() == disabled


def test_bars_that_were_off_stay_off(bars_shown: None) -> None:
    disable_progress_bar()
    with no_weight_bars():
        assert not is_progress_bar_enabled()
    assert not is_progress_bar_enabled()
