"""Every error that a user can cause: one sentence saying what was found, where, and what to do."""


class BmgraphError(ValueError):
    """The base of all errors that bmgraph raises about its input; the command line prints it in one line."""


class CaptureError(BmgraphError):
    """A model could not be captured as a graph."""


class InputError(BmgraphError):
    """A call was given wrong inputs: a missing key, a wrong dtype or shape, an unknown option."""


class ResourceError(BmgraphError):
    """A pass asks for a named resource that was not given, or that differs from the recorded one."""


class OrderError(BmgraphError):
    """An order of passes that cannot be right; the message holds the mended order where there is one."""


class PassError(BmgraphError):
    """A pass could not do its work: no site matched, or its options do not fit the program."""


class MisplacedError(PassError):
    """A pass does not fit the program; it may fit the one that passes before it were given."""


class VerificationError(BmgraphError):
    """A program broke a rule of its stage after a pass, or an exact pass changed what is computed."""


class DriftError(VerificationError):
    """An approximate pass moved the outputs further than its bound."""


class BackendError(BmgraphError):
    """A program could not be lowered, or an engine could not be built or run."""


class BundleError(BmgraphError):
    """A saved folder is truncated, altered, foreign or hostile; nothing of it was used."""
