"""Every error a user of rep_fast can meet, by name.

Each message is one sentence with the offending value and the remedy. The command line prints it and exits with
status 1; `--debug` adds the traceback.
"""

from __future__ import annotations


class RepFastError(Exception):
    """Base of all errors raised on purpose by rep_fast."""


class PromptError(RepFastError, ValueError):
    """A prompt, subject or target cannot be edited as given (no `{}`, subject absent, empty target …)."""


class NothingToEditError(RepFastError, ValueError):
    """The wanted target already is the model's answer."""


class RecordError(RepFastError, ValueError):
    """A record of a data file is malformed; the message names file, index and field."""


class TextSourceError(RepFastError, ValueError):
    """A text source is missing, empty or of an unknown kind."""


class UnknownFamilyError(RepFastError, ValueError):
    """No layout entry describes this model's modules."""


class ModelLoadError(RepFastError, OSError):
    """A model or tokenizer could not be loaded from the given name or directory."""


class LayerError(RepFastError, ValueError):
    """A layer number lies outside the model, or a layer has not what was asked of it."""


class TokenizationError(RepFastError, ValueError):
    """The tokenizer cannot place a subject or target."""


class FingerprintError(RepFastError, ValueError):
    """A file belongs to another model."""


class CorruptFileError(RepFastError, OSError):
    """A stored file is truncated, altered, of a newer format, or of another kind."""


class NonFiniteError(RepFastError, ValueError):
    """A NaN or infinity stands in keys, queries or weights; the message names the first row."""


class SingularMomentError(RepFastError, ValueError):
    """The second moment is singular or indefinite: too few tokens, or duplicate directions."""


class SolverError(RepFastError, ArithmeticError):
    """A solve did not reach the residual that was asked for."""


class BackendError(RepFastError, RuntimeError):
    """A backend asked for by name is not available here."""


class OutputError(RepFastError, OSError):
    """A result cannot be written where it was asked for, or would overwrite another one."""


class RunMismatchError(RepFastError, ValueError):
    """A run directory belongs to another model, data file or setting."""


class HparamError(RepFastError, ValueError):
    """A hyper-parameter, preset, method or option has an unknown name or a value out of range."""


class MissingDependencyError(RepFastError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class MissingFileError(RepFastError, FileNotFoundError):
    """A stored file that was asked for by name is not there."""
