"""Replaces functions of another package in this process, and puts the originals back.

An integration is a list of `Target`s. `Patch.apply` first checks every target that the installed version has: the arguments
of the function must be known, and the replacement must give what the original gives on a small example. If one target differs,
nothing is changed, and one RuntimeWarning says why. Else each function is replaced in the module that defines it and in every
loaded module that has imported it by name.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import LOGIT_DTYPES
from ..logps import token_logps

#: What a function may return in an example: tensors, or a nest of tuples, lists and dicts of them.
Example = Callable[[Callable[..., Any]], Any]
_MISSING = object()
#: The patches that are applied.
_APPLIED: list[Patch] = []


@dataclass(frozen=True)
class Target:
    """A function or a torch module class of another package, and its replacement.

    Attributes:
        module: the module that defines the function.
        name: the function's name there; "Class.method" for a method or static method of a class.
        arguments: the argument lists that the replacement accepts, each as text: "logits, index". () accepts all. For a class,
            those of its constructor and of its forward: "beta; self, logits". For an autograd function, those of its forward
            without ctx.
        replacement: makes the replacement from the original. It returns the original if there is nothing to replace.
        examples: each calls the function that it is given with small tensors and returns the results. Results of original and
            replacement must agree to 1e-4. Also used by the tests.
        here: replace only what the module itself holds under the name, even if that is None.
    """

    module: str
    name: str
    arguments: tuple[str, ...]
    replacement: Callable[[Callable[..., Any]], Callable[..., Any]]
    examples: tuple[Example, ...] = ()
    here: bool = False


class Unsupported(Exception):
    """The installed version of a package differs from what the replacements were written for."""


@dataclass
class _Place:
    """A function that was replaced: the original, the replacement, and the class or module that holds it (None: all modules)."""

    owner: Any
    name: str
    theirs: Any
    ours: Any


class Patch:
    """The replacements of one package.

    Args:
        package: the package's distribution name, for messages.
        targets: makes the list of functions from the settings of `apply`. Versions may lack some of them, but must have at least
            one.
    """

    def __init__(self, package: str, targets: Callable[..., Sequence[Target]]) -> None:
        self.package, self.targets = package, targets
        self.places: list[_Place] = []

    def apply(self, **settings: Any) -> Callable[[], None]:
        """Replaces the functions. A second call first undoes the previous one.

        Args:
            settings: what `targets` takes.

        Returns:
            A function that puts the originals back. It does nothing after a later call of `apply`.

        Raises:
            ImportError: the package cannot be imported.
        """
        self.undo()
        targets = self.targets(**settings)
        try:
            places = [place for target in targets if (place := _place_of(target)) is not None]
            if not places:
                names = ", ".join(f"{target.module}.{target.name}" for target in targets)
                raise Unsupported(f"it has none of the functions to replace ({names})")
        except Unsupported as error:
            warnings.warn(
                f"dpo_kernels: {self.package} {self.version()} was left as it is: {error}", RuntimeWarning, stacklevel=3
            )
            return lambda: None
        self.places = places
        _APPLIED.append(self)
        try:
            for place in places:
                _exchange(place.owner, place.name, place.theirs, place.ours)
        except BaseException:
            self.undo()
            raise
        return lambda: self.undo() if self.places is places else None

    def undo(self) -> None:
        """Puts the originals back, also in modules that were imported after `apply`.

        Where another patch has replaced the replacement since, that patch then puts the original back.
        """
        for place in self.places:
            _exchange(place.owner, place.name, place.ours, place.theirs)
            for other in _APPLIED:
                for later in other.places:
                    if later.theirs is place.ours:
                        later.theirs = place.theirs
        self.places = []
        if self in _APPLIED:
            _APPLIED.remove(self)

    def applied(self, **settings: Any) -> AbstractContextManager[None]:
        """Applies the patch inside a `with` block; arguments and errors as of `apply`."""
        return within(self.apply)(**settings)

    def version(self) -> str:
        """The installed version of the package, as text."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return "of unknown version"


def within(apply: Callable[..., Callable[[], None]]) -> Callable[..., AbstractContextManager[None]]:
    """A context manager with the arguments and errors of `apply`, which returns a function that undoes it."""

    @contextmanager
    def applied(**settings: Any) -> Iterator[None]:
        undo = apply(**settings)
        try:
            yield
        finally:
            undo()

    return applied


def _place_of(target: Target) -> _Place | None:
    """The function of a target with its replacement; None if the installed version does not have the function."""
    try:
        module = importlib.import_module(target.module)
    except ModuleNotFoundError as error:
        # Only the module itself, or a package above it, may be missing. Another missing module is an incomplete installation.
        if error.name is not None and "." in error.name and f"{target.module}.".startswith(f"{error.name}."):
            return None
        raise
    owner_name, _, name = target.name.rpartition(".")
    owner: Any = getattr(module, owner_name, None) if owner_name else module
    # The raw attribute of a class: a static method as such, and nothing that it inherits.
    theirs: Any = vars(owner).get(name, _MISSING) if owner is not None else _MISSING
    if theirs is _MISSING or (theirs is None and not target.here):
        return None
    held = owner if owner_name or target.here else None
    call: Any = theirs.__func__ if isinstance(theirs, staticmethod) else theirs
    where = f"{target.module}.{target.name}"
    if call is not None and target.arguments:
        functions = [call]
        if isinstance(call, type) and not issubclass(call, torch.autograd.Function):
            functions = [call, getattr(call, "forward", call)]
        arguments = "; ".join(", ".join(arguments_of(function)) for function in functions)
        if arguments not in target.arguments:
            known = " or ".join(f"({text})" for text in target.arguments)
            raise Unsupported(f"{where} has the arguments ({arguments}), and {known} is known")
    ours = target.replacement(call)
    if ours is call:
        return None
    for example in target.examples:
        _compare(where, example, call, ours)
    return _Place(held, name, theirs, staticmethod(ours) if isinstance(theirs, staticmethod) else ours)


def arguments_of(function: Callable[..., Any]) -> list[str]:
    """The names of a function's arguments; for an autograd function those of its `forward` without `ctx`."""
    if isinstance(function, type) and issubclass(function, torch.autograd.Function):
        return list(inspect.signature(function.forward).parameters)[1:]
    return list(inspect.signature(function).parameters)


def _compare(where: str, example: Example, theirs: Callable[..., Any], ours: Callable[..., Any]) -> None:
    """Raise Unsupported unless both functions give the same results in the example."""
    try:
        wanted = _run(example, theirs)
    except Exception as error:
        raise Unsupported(f"{where} failed on a small example: {error!r}") from error
    try:
        torch.testing.assert_close(_run(example, ours), wanted, rtol=1e-4, atol=1e-4)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise Unsupported(f"{where} does not compute what its replacement computes ({reason})") from error


def _run(example: Example, function: Callable[..., Any]) -> Any:
    """The results of an example on the CPU, whatever autocast, default device and gradient mode the caller has set."""
    with torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.inference_mode(False), torch.enable_grad():
        return example(function)


def _exchange(owner: Any, name: str, old: Any, new: Any) -> None:
    """Sets `new` where `old` is: in a class or module, or in every loaded module under any name."""
    if owner is not None:
        if vars(owner).get(name) is old:
            setattr(owner, name, new)
        return
    for module in list(sys.modules.values()):
        try:
            held = list(vars(module).items())
        except Exception:  # None, or an object that imports something when it is asked for its contents
            continue
        for key, value in held:
            if value is old:
                setattr(module, key, new)


def takes(logits: Any) -> bool:
    """Whether the kernels take these logits. Distributed tensors and other subclasses are left to the framework."""
    return type(logits) is Tensor and logits.dtype in LOGIT_DTYPES


def entropy_of(logits: Tensor) -> Tensor:
    """Differentiable entropies [...] in nats of logits [..., V]: float32, or float64 for float64 logits."""
    rows = logits if logits.dim() > 1 else logits.unsqueeze(0)
    labels = torch.zeros(rows.shape[:-1], dtype=torch.int64, device=logits.device)
    _, found = token_logps(rows, labels, statistics=("entropy",), differentiable_entropy=True)
    entropy: Tensor = found["entropy"]  # type: ignore[call-overload]
    return entropy.view(logits.shape[:-1])


def small_logits(rows: int = 2, tokens: int = 5, vocab: int = 11, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(logits [rows, tokens, vocab], labels [rows, tokens]) of an example, the same at every call."""
    generator = torch.Generator("cpu").manual_seed(seed)
    logits = torch.randn(rows, tokens, vocab, generator=generator, dtype=torch.float32)
    return logits, torch.randint(vocab, (rows, tokens), generator=generator)
