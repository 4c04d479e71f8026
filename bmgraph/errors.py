"""The exceptions that bmgraph raises: each message says what was found, where, and what to do."""


class BmgraphError(ValueError):
    """Base class of all errors about input; the command line prints one as a single line."""


class CaptureError(BmgraphError):
    """A model could not be captured as a graph."""


class InputError(BmgraphError):
    """A call was given wrong inputs: a missing key, a wrong dtype or shape, an unknown option."""


class ResourceError(BmgraphError):
    """A pass needs a named resource that was not given, or that differs from the recorded one."""


class OrderError(BmgraphError):
    """The order of passes is invalid; where a valid order exists, the message suggests it."""


class PassError(BmgraphError):
    """A pass cannot run: no site matches, or its options do not fit the program."""


class MisplacedError(PassError):
    """A pass does not fit the current program, but may fit the program before earlier passes changed it."""


class VerificationError(BmgraphError):
    """A program breaks a rule of its stage after a pass, or an exact pass changed the outputs."""


class DriftError(VerificationError):
    """An approximate pass changed the outputs by more than its bound."""


class BackendError(BmgraphError):
    """A program could not be lowered, or an engine could not be built or run."""


class RankError(BmgraphError):
    """Another rank has left, was stopped or does not answer; no rank can go on, and the last checkpoint can."""


class BundleError(BmgraphError):
    """A saved folder is truncated, altered, of another format or malicious; nothing was loaded from it."""


class BusyError(BmgraphError):
    """As many requests wait as may; the same request can be taken later."""
