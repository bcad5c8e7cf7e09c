"""Devices that exist in name only: tensors say they live there and are computed on the CPU.

Two things that only a GPU shows can be tested with it. An operation on tensors of two devices is refused, as torch
refuses it. And every operation for which the host would wait for a CUDA device is counted, by the rules torch's own
`torch.cuda.set_sync_debug_mode` goes by: a value read, a size that depends on values, a blocking copy between host and
device.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from rep_fast.models import EditableLM
from rep_fast.ops import arriving

# a device type torch has a name for and no kernels; its backward passes run in the calling thread
FIRST, SECOND = torch.device("lazy:0"), torch.device("lazy:1")
_CPU = torch.device("cpu")
_aten = torch.ops.aten
# sizes of their results depend on values, or the result is a Python number
_WAITING = {
    _aten._local_scalar_dense, _aten.item, _aten.nonzero, _aten.masked_select, _aten.equal, _aten.is_nonzero,
    _aten._unique2, _aten.unique_consecutive, _aten.unique_dim, _aten.bincount, _aten.multinomial,
    _aten._linalg_check_errors,
}  # fmt: skip
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}
_WHOLE = {torch.linalg.qr}  # makes its results where its kernel runs
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}


class Pretended(Tensor):
    """A tensor that says it lives on `device`; `held` lies on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> Pretended:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=device,
        )  # fmt: skip
        made.held = held.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, Counter())  # outside of the mode nothing is counted


class PretendDevices(TorchDispatchMode):
    """Makes `FIRST` and `SECOND` usable inside; `waits` counts what would wait for a device, by place and operation."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self._lists = _Lists()
        self._copies = mock.patch.object(arriving, "ASYNC_DEVICES", (FIRST.type,))  # can be waited for one by one

    def __enter__(self) -> PretendDevices:
        self._copies.start()
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._lists.__exit__(*error)
        self._copies.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.waits)

    @property
    def own_waits(self) -> dict[str, int]:
        """`waits` but those of transformers, which looks at the attention mask once or twice per forward pass."""
        return {place: n for place, n in self.waits.items() if not place.startswith("transformers/")}


class _Lists(TorchFunctionMode):
    """Python's lists become tensors on the host and are copied, and the other way round, unseen by a dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs["device"]
            return func(*args, **{**kwargs, "device": None}).to(device)
        if func is Tensor.__getitem__ and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]))
        if func is Tensor.tolist and isinstance(args[0], Pretended):
            return args[0].cpu().tolist()
        if func in _PRODUCTS and args[0].dim() == 1 and args[1].dim() == 2:  # torch drops the new dimension in place
            return (args[0][None] @ args[1])[0]
        if func in _WHOLE and isinstance(args[0], Pretended):
            home = args[0].device
            return tree_map(lambda part: Pretended(part, home), func(*tree_map(_unwrapped, args), **kwargs))
        return func(*args, **kwargs)


def put(module: nn.Module, device: torch.device) -> None:
    """Moves a module's weights and buffers to a pretended device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not isinstance(parameter, Pretended):
                moved = nn.Parameter(Pretended(parameter.detach(), device), requires_grad=parameter.requires_grad)
                part._parameters[name] = moved
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, Pretended):
                part._buffers[name] = Pretended(buffer, device)


def waits_of(lm: EditableLM, run: Callable[[], object]) -> dict[str, int]:
    """Where `run` would wait for the model's device, and how often; transformers' own waits left out."""
    _ = lm.fingerprint
    with PretendDevices() as devices:
        put(lm.model, FIRST)
        run()
    return devices.own_waits


def held(tensor: Tensor) -> Tensor:
    """The values, on the CPU."""
    return tensor.detach().held if isinstance(tensor, Pretended) else tensor.detach()


def _run(func: Any, args: Any, kwargs: dict[str, Any], waits: Counter[str]) -> Any:
    packet = func.overloadpacket
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    home = _home(packet, args, kwargs, tensors)
    is_ours = home != _CPU or any(isinstance(tensor, Pretended) for tensor in tensors)
    if is_ours and _waits(packet, args, kwargs, home):
        waits[f"{_place()} {packet._qualified_op_name}"] += 1
    inner_kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    if inner_kwargs.get("device") is not None:
        inner_kwargs["device"] = _CPU
    found = func(*tree_map(_unwrapped, args), **tree_map(_unwrapped, inner_kwargs))
    written = {id(_unwrapped(tensor)): tensor for tensor in _written(func, args, kwargs)}
    return tree_map(lambda value: _wrapped(value, home, written), found)


def _home(packet: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> torch.device:
    """Where the results live.

    Raises:
        RuntimeError: the operation takes tensors of two devices.
    """
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    if packet is _aten.copy_:
        return args[0].device
    # torch takes single numbers from the host into operations on a device, and indices from there
    homes = {tensor.device for tensor in tensors if tensor.dim() or tensor.device != _CPU}
    if packet in _INDEXING and args[0].device != _CPU:
        homes = {home for home in homes if home != _CPU} | {args[0].device}
    if len(homes) > 1:
        raise RuntimeError(f"{packet}: expected all tensors on one device, found {sorted(map(str, homes))}")
    return homes.pop() if homes else _CPU


def _waits(packet: Any, args: Any, kwargs: dict[str, Any], home: torch.device) -> bool:
    if packet in _WAITING:
        return True
    if packet is _aten.repeat_interleave:
        return kwargs.get("output_size") is None
    if packet in (_aten._to_copy, _aten.copy_):
        source, target = (args[1], args[0].device) if packet is _aten.copy_ else (args[0], home)
        # who asks for a copy that does not block waits for its event where the values are needed on the host
        non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
        return source.numel() > 0 and (source.device == _CPU) != (target == _CPU) and not non_blocking
    if packet in _INDEXING:
        indices = [index for index in args[1] if index is not None]
        fills = packet is not _aten.index and args[2].numel() == 1  # becomes masked_fill
        has_mask = any(index.dtype in (torch.bool, torch.uint8) for index in indices) and not fills
        return has_mask or any(index.device == _CPU for index in indices)
    return False


def _place() -> str:
    """The line of a package but torch that asked."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if "/torch/" not in name and name != __file__:
            break
        frame = frame.f_back
    package, _, rest = name.rpartition("site-packages/")[2].partition("/")
    shown = f"{package}/{rest}" if "site-packages" in name else Path(name).name
    return f"{shown}:{frame.f_lineno}"


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = kwargs.get(argument.name) if argument.name in kwargs or number >= len(args) else args[number]
            yield from (leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor))


def _unwrapped(value: Any) -> Any:
    return value.held if isinstance(value, Pretended) else value


def _wrapped(value: Any, home: torch.device, written: dict[int, Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    if id(value) in written:
        return written[id(value)]
    return value if home == _CPU else Pretended(value, home)
