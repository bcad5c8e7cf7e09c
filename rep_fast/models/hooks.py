"""Reading and replacing activations: context managers that always undo themselves.

The smallest useful form is baukit's `Trace`; here a site has one name in all families, and a forward can stop at the
deepest site that is read, so that keys of layer 5 never pay for layers 6 and up, nor for the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rep_fast.errors import LayerError
from rep_fast.models.sites import Site


class Captured:
    """Activations of the last forward pass, by site.

    `captured[site]` is [n, T, *] on the device of its layer, with its autograd graph when grad was enabled.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self._tensors: dict[Site, Tensor | None] = dict.fromkeys(sites)

    def __getitem__(self, site: tuple[str, int]) -> Tensor:
        key = Site(*site)
        if key not in self._tensors:
            raise LayerError(f"{key} was not among the captured sites: {', '.join(map(str, self._tensors))}")
        tensor = self._tensors[key]
        if tensor is None:
            raise LayerError(f"{key} holds nothing yet: no forward pass has reached layer {key.layer} inside `capture`")
        return tensor

    def __contains__(self, site: object) -> bool:
        return self._tensors.get(site) is not None  # type: ignore[call-overload]

    def at(self, site: tuple[str, int], positions: Tensor) -> Tensor:
        """One token per row: [n, *] of `site` at `positions` [n]."""
        tensor = self[site]
        return tensor[torch.arange(tensor.shape[0], device=tensor.device), positions.to(tensor.device)]

    def _store(self, site: Site, tensor: Tensor) -> None:
        self._tensors[site] = tensor


class ForwardStopped(BaseException):
    """Ends a truncated forward; not an Exception, so that no handler in between swallows it."""


def first_tensor(output: Any) -> Tensor:
    """The hidden states of a module output: transformers returns a tensor or a tuple that starts with it."""
    return output[0] if isinstance(output, (tuple, list)) else output


def _with_first(output: Any, tensor: Tensor) -> Any:
    if isinstance(output, (tuple, list)):
        return type(output)((tensor, *output[1:]))
    return tensor


@contextmanager
def watch(module: nn.Module, read: Callable[[Tensor], Tensor | None], *, at_input: bool) -> Iterator[None]:
    """Call `read` with the module's (first) input or output; a tensor it returns takes that place.

    Hooks run in the order they were made: a later one sees what an earlier one put in.
    """

    def on_input(_: nn.Module, args: tuple[Any, ...]) -> Any:
        replaced = read(args[0])
        return None if replaced is None else (replaced, *args[1:])

    def on_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        replaced = read(first_tensor(output))
        return None if replaced is None else _with_first(output, replaced)

    handle = module.register_forward_pre_hook(on_input) if at_input else module.register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def captured_at(places: dict[Site, tuple[nn.Module, bool]]) -> Iterator[Captured]:
    """Record each place (module, whether its input) on every forward; the last forward wins."""
    captured = Captured(list(places))

    def reader(site: Site) -> Callable[[Tensor], None]:
        return lambda tensor: captured._store(site, tensor)

    with ExitStack() as stack:
        for site, (module, at_input) in places.items():
            stack.enter_context(watch(module, reader(site), at_input=at_input))
        yield captured


def run_until(module: nn.Module, forward: Callable[[], object], *, at_input: bool) -> None:
    """Run `forward` up to the input or output of `module` and abandon the rest."""

    def stop(_: Tensor) -> None:
        raise ForwardStopped

    with watch(module, stop, at_input=at_input):
        try:
            forward()
        except ForwardStopped:
            return
