"""The errors a user can cause or must hear about; each is one clear sentence and an exit code."""

INTERRUPTED = 130
"""Exit code of what was stopped by Ctrl-C or by a person in the UI, as shells have it."""


class RankdError(Exception):
    """Bad input or an unusable environment. The message names what was found, what was expected, the next step."""

    exit_code = 2


class GateStopped(RankdError):
    """A gate's verdict (fail or inconclusive) stops the chain; the message says what to do next."""

    exit_code = 3


class ArtifactDamaged(RankdError):
    """A stored file is missing, truncated or edited: its hash is not the one in its manifest."""


class Busy(RankdError):
    """Another rankd process holds what this one needs."""

    exit_code = 4
