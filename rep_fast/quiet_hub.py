"""No raw lines of other packages on the terminal: what fails is said once, by an error of ours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

_CLIENTS = ("huggingface_hub", "urllib3")


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Inside, the hub's client prints no line per retry; who asked its logger for more than warnings still gets all."""
    with ExitStack() as stack:
        for name in _CLIENTS:
            logger = logging.getLogger(name)
            if logger.getEffectiveLevel() == logging.WARNING:
                stack.callback(logger.setLevel, logger.level)
                logger.setLevel(logging.ERROR)
        yield


@contextmanager
def no_weight_bars() -> Iterator[None]:
    """Inside, transformers shows no bar for tensors it reads or writes; bars of downloads stay as they are.

    HF_HUB_DISABLE_PROGRESS_BARS in the environment settles the hub's bars, whatever is switched here.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    if not is_progress_bar_enabled():
        yield
        return
    hub_is_silent = are_progress_bars_disabled()
    # both functions of transformers switch the hub's bars too
    restore_hub = disable_progress_bars if hub_is_silent else enable_progress_bars
    _switch(disable_progress_bar, restore_hub)
    try:
        yield
    finally:
        _switch(enable_progress_bar, restore_hub)


def _switch(*switches: Callable[[], object]) -> None:
    """Where the environment settles the hub's bars, its switches do nothing and print a warning that they do not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Cannot (dis|en)able progress bars", category=UserWarning)
        for switch in switches:
            switch()
